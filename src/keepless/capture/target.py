"""Captures for a CUDA device that is not here: fakes stay on the CPU, and the ops that CUDA would pick are traced.

Attention and autocast decide by the device, before anything is traced. Within such a capture they decide as on CUDA:
scaled dot-product attention calls the op that CUDA's selection would call, so that its saved outputs are those that
torch's own shape functions give; and autocast casts by CUDA's lists. Everything else is named and sized on the finished
graph (`keepless.passes.retarget`). Selection: `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`; lists:
`aten/src/ATen/autocast_mode.h`; both of torch 2.14, and what differs from 2.11 on.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from keepless._compat.kernels import cudnn_attention_enabled, cudnn_version, replaced_kernels, torch_release
from keepless.capture.faking import Faking

WHEEL_CUDNN = {(2, 11): 91900, (2, 14): 92400}
"""torch's release -> the cuDNN that its wheels for CUDA 13 bring, for builds without one; between them the earlier."""

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


@dataclass
class Target:
    """The device that a capture is for.

    Arguments:
        capability: CUDA's compute capability.
        release: of the torch that is to train there, (2, 14); the running one's by default.
        cudnn: its cuDNN's version, 91900 for 9.19; by default the running one's, or that of the release's wheels.
        attention: names of the attention variants that were traced, with how often (each forward is traced thrice).
        casts: ops that CUDA's autocast runs in float32 and the CPU's does not, as they were met.
    """

    capability: tuple[int, int]
    release: tuple[int, int] = field(default_factory=torch_release)
    cudnn: int = 0
    attention: dict[str, int] = field(default_factory=dict)
    casts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.cudnn:
            here = cudnn_version() if self.release == torch_release() else 0
            known = [version for release, version in WHEEL_CUDNN.items() if release <= self.release]
            self.cudnn = here or max(known, default=0)


class TargetFaking(Faking):
    """Fakes on the CPU with the ops of a CUDA device."""

    is_here = False

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
        variant = attention_variant(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, self.target)
        self.target.attention[variant] = self.target.attention.get(variant, 0) + 1
        result: torch.Tensor
        if variant == "math":
            result = aten._scaled_dot_product_attention_math.default(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )[0]
            return result
        if variant == "cudnn":
            bias = attn_mask if attn_mask is None or attn_mask.dtype is not torch.bool else _added(attn_mask, query)
            result = aten._scaled_dot_product_cudnn_attention.default(
                query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, False, scale=scale
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
    target: Target,
) -> str:
    """ "cudnn", "flash", "efficient" or "math": what CUDA's attention picks for tensors (batch, heads, length, head
    size), in this order."""
    capability = target.capability
    if query.dim() == 4 and prefers_cudnn(target) and takes_cudnn(query, key, value, dropout, target):
        return "cudnn"
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


def prefers_cudnn(target: Target) -> bool:
    """Whether cuDNN's attention comes first: on Hopper's and Blackwell's data center cards, where cuDNN is newer than
    9.15.0, unless it is switched off or kernels must be deterministic (`check_prefer_cudnn_attention`)."""
    if target.capability[0] not in (9, 10) or target.cudnn <= 91500:
        return False
    if os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED", "0") == "1" or not cudnn_attention_enabled():
        return False
    return not torch.are_deterministic_algorithms_enabled() or torch.is_deterministic_algorithms_warn_only_enabled()


def takes_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, target: Target) -> bool:
    """Whether cuDNN's attention takes a call that is trained (`can_use_cudnn_attention`)."""
    sizes, length, keys = (query.size(-1), value.size(-1)), query.size(2), key.size(2)
    if query.dtype not in HALF or key.size(-1) != sizes[0] or any(size % 8 for size in sizes):
        return False
    if dropout and (length == 1 or (target.release >= (2, 12) and (16 * dropout) % 1)):  # a kernel knows 16ths only
        return False
    if keys == 1 or not length or not keys or max(query.size(0), query.size(1)) > 65535:
        return False
    if any(t.stride(-1) != 1 and t.size(-1) != 1 for t in (query, key, value)):
        return False
    if max(sizes) <= 128:
        return True
    if target.release < (2, 14):
        return max(sizes) <= 256 if target.capability == (9, 0) else target.capability[0] == 10 and sizes == (192, 128)
    if not (target.capability == (9, 0) or target.capability[0] == 10):
        return False
    return sizes == (192, 128) or (sizes == (256, 256) and target.cudnn > 92200)


def _added(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask of booleans as numbers that are added to the scores."""
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), -math.inf)


def _bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """A mask as the kernel takes it: added to the scores, rows padded to 16 elements, one per head."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = _added(mask, query)
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
