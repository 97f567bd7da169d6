"""Captures for a CUDA device that is not here: fakes stay on the CPU, and the ops that CUDA would pick are traced.

Attention and autocast decide by the device, before anything is traced. Within such a capture they decide as on CUDA:
scaled dot-product attention calls the op that CUDA's selection would call, so that its saved outputs are those that
torch's own shape functions give; and autocast casts by CUDA's lists. Everything else is named and sized on the finished
graph (`keepless.passes.retarget`). Selection: `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`; lists:
`aten/src/ATen/autocast_mode.h`; both of torch 2.14.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from keepless._compat.kernels import replaced_kernels
from keepless.capture.trace import Faking

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


@dataclass
class Target:
    """The device that a capture is for.

    Arguments:
        capability: CUDA's compute capability.
        attention: names of the attention variants that were traced, with how often (each forward is traced thrice).
        casts: ops that CUDA's autocast runs in float32 and the CPU's does not, as they were met.
    """

    capability: tuple[int, int]
    attention: dict[str, int] = field(default_factory=dict)
    casts: dict[str, int] = field(default_factory=dict)


class TargetFaking(Faking):
    """Fakes on the CPU with the ops of a CUDA device."""

    def __init__(self, device: torch.device, target: Target) -> None:
        super().__init__(device)
        self.target = target

    def all_around(self) -> contextlib.AbstractContextManager[Any]:
        table: dict[tuple[str, str], Callable[..., Any]] = {
            ("scaled_dot_product_attention", "AutogradCPU"): self._attention
        }
        if torch.is_autocast_enabled("cpu"):
            table |= {(name, "AutocastCPU"): self._in_float32(name) for name in FLOAT32_ON_CUDA}
            table |= {(name, "AutocastCPU"): self._to_float32(name) for name in FLOAT32_RESULT_ON_CUDA}
        return replaced_kernels(table)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        variant = attention_variant(
            query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, self.target.capability
        )
        self.target.attention[variant] = self.target.attention.get(variant, 0) + 1
        result: torch.Tensor
        if variant == "math":
            result = aten._scaled_dot_product_attention_math.default(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )[0]
            return result
        if variant == "efficient":
            bias = _bias(attn_mask, query, key)
            result = aten._scaled_dot_product_efficient_attention.default(
                query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
            )[0]
            return result
        head = query.size(-1)
        missing = -head % 8
        if missing:  # the kernels want a multiple of 8: attention pads, and cuts its output
            query, key, value = (torch.constant_pad_nd(t, [0, missing]) for t in (query, key, value))
            scale = 1 / math.sqrt(head) if scale is None else scale
        result = aten._scaled_dot_product_flash_attention.default(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return result[..., :head] if missing else result

    def _in_float32(self, name: str) -> Callable[..., Any]:
        """Runs an op in float32, as autocast's `fp32` policy."""
        target = _overload(name)

        def kernel(*args: Any, **kwargs: Any) -> Any:
            self.target.casts[name] = self.target.casts.get(name, 0) + 1
            with torch.autocast("cpu", enabled=False):
                return target(*map(_widened, args), **{key: _widened(one) for key, one in kwargs.items()})

        return kernel

    def _to_float32(self, name: str) -> Callable[..., Any]:
        """Lets an op give float32 where its caller names no dtype, as autocast's `fp32_set_opt_dtype` policy."""
        target = _overload(name)
        place = [argument.name for argument in target._schema.arguments].index("dtype")

        def kernel(*args: Any, **kwargs: Any) -> Any:
            named = args[place] if len(args) > place else kwargs.get("dtype")
            if named is None and args[0].dtype in HALF:
                self.target.casts[name] = self.target.casts.get(name, 0) + 1
                args, kwargs = args[:place], kwargs | {"dtype": torch.float32}
                if not target._schema.arguments[place].kwarg_only:
                    args = (
                        *args,
                        *(a.default_value for a in target._schema.arguments[len(args) : place]),
                        torch.float32,
                    )
                    kwargs.pop("dtype")
            with torch.autocast("cpu", enabled=False):
                return target(*args, **kwargs)

        return kernel


def attention_variant(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    grouped: bool,
    capability: tuple[int, int],
) -> str:
    """ "flash", "efficient" or "math": what CUDA's attention picks for tensors (batch, heads, length, head size).

    Where cuDNN's attention is preferred (some releases, on Hopper and later), its saved outputs have flash's sizes.
    """
    head = query.size(-1)
    same_heads = key.size(-1) == head == value.size(-1)
    if query.dim() != 4 or not query.dtype.is_floating_point:
        return "math"
    big_head = head > 192 and capability in ((8, 6), (8, 9), (12, 0)) and (head > 224 or dropout > 0)
    square = not is_causal or query.size(-2) == key.size(-2)
    can_flash = capability >= (8, 0) and query.dtype in HALF and mask is None and same_heads and head <= 256
    if can_flash and square and not big_head:
        return "flash"
    if grouped and query.size(1) != key.size(1):
        return "math"
    aligned = 4 if query.dtype is torch.float32 else 8
    can_half = query.dtype in HALF and (query.dtype is torch.float16 or capability >= (8, 0))
    if (can_half or query.dtype is torch.float32) and head % aligned == 0 and value.size(-1) % aligned == 0:
        return "efficient"
    return "math"


def _bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """A mask as the kernel takes it: added to the scores, rows padded to 16 elements, one per head."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), -math.inf)
    length = mask.size(-1)
    if length % 16:
        mask = torch.constant_pad_nd(mask, [0, -length % 16])[..., :length]
    return mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))


def _widened(item: Any) -> Any:
    if isinstance(item, torch.Tensor) and item.dtype in HALF:
        return item.to(torch.float32)
    return [_widened(one) for one in item] if isinstance(item, list) else item


def _overload(name: str) -> Any:
    op, _, overload = name.partition(".")
    return getattr(getattr(aten, op), overload or "default")


FLOAT32_ON_CUDA = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "group_norm", "smooth_l1_loss", "cosine_similarity", "dist", "renorm", "logsumexp",
)  # fmt: skip
"""Ops that autocast runs in float32 on CUDA, and in whatever dtype comes on the CPU."""

FLOAT32_RESULT_ON_CUDA = ("softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum", "sum.dim_IntList")
"""Ops that autocast lets give float32 on CUDA where their caller names no dtype."""
