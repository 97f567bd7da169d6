"""Private parts of torch for what stands around a call: autocast, default dtype, kernels, torch-function modes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def device_types() -> tuple[str, ...]:
    """ "cpu", and the accelerator where there is one."""
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        if device is not None:
            return ("cpu", device.type)
    return ("cpu",)


any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any kind of device."""

num_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
"""How many torch-function modes are around this call."""


_default_dtype: Callable[[], torch.dtype] = torch.get_default_dtype


def ambient_flags() -> tuple[Any, ...]:
    """The default dtype and the switches that choose kernels, as `set_ambient_flags` takes them."""
    c: Any = torch._C
    return (
        _default_dtype(),
        c._get_flash_sdp_enabled(),
        c._get_mem_efficient_sdp_enabled(),
        c._get_math_sdp_enabled(),
        c._get_cudnn_sdp_enabled(),
        c._get_mkldnn_enabled(),
        c._get_cudnn_enabled(),
        c._get_cudnn_benchmark(),
        c._get_cudnn_deterministic(),
        c._get_deterministic_algorithms(),
        c._get_deterministic_algorithms_warn_only(),
        c._get_float32_matmul_precision(),
        c._get_sdp_priority_order(),
    )


def set_ambient_flags(flags: tuple[Any, ...]) -> None:
    """Sets what `ambient_flags` gave."""
    c: Any = torch._C
    torch.set_default_dtype(flags[0])
    setters = (
        c._set_sdp_use_flash,
        c._set_sdp_use_mem_efficient,
        c._set_sdp_use_math,
        c._set_sdp_use_cudnn,
        c._set_mkldnn_enabled,
        c._set_cudnn_enabled,
        c._set_cudnn_benchmark,
        c._set_cudnn_deterministic,
    )
    for setter, value in zip(setters, flags[1:9], strict=True):
        setter(value)
    c._set_deterministic_algorithms(flags[9], warn_only=flags[10])
    c._set_float32_matmul_precision(flags[11])
    c._set_sdp_priority_order(flags[12])


def function_mode_stack() -> list[Any]:
    """The torch-function modes around this call, outermost first."""
    if not torch._C._len_torch_function_stack():
        return []
    return list(torch.overrides._get_current_function_mode_stack())  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def function_modes_replaced(modes: list[Any]) -> Iterator[None]:
    """The stack of torch-function modes is this one inside. Modes are moved as they are, without their own enter and
    exit; a default device is set anew, since it also lives outside the stack."""
    from torch.utils._device import DeviceContext

    c: Any = torch._C
    before = []
    try:
        while c._len_torch_function_stack():
            before.append(c._pop_torch_function_stack())
        with contextlib.ExitStack() as stack:
            for mode in modes:
                if isinstance(mode, DeviceContext):
                    stack.enter_context(DeviceContext(mode.device))
                else:
                    c._push_on_torch_function_stack(mode)
                    stack.callback(c._pop_torch_function_stack)
            yield
    finally:
        while before:
            c._push_on_torch_function_stack(before.pop())


def function_modes() -> tuple[Any, ...]:
    """The torch-function modes around this call; a default device counts with its device."""
    return tuple((type(mode).__name__, str(getattr(mode, "device", ""))) for mode in function_mode_stack())


_forward_ad: Any = torch.autograd.forward_ad


def forward_ad_active() -> bool:
    """Whether a forward-mode AD level is open."""
    return int(getattr(_forward_ad, "_current_level", -1)) >= 0


def kernel_choices() -> tuple[bool, ...]:
    """Switches that decide which attention or recurrent kernel eager takes."""
    c: Any = torch._C
    return (
        c._get_flash_sdp_enabled(),
        c._get_mem_efficient_sdp_enabled(),
        c._get_math_sdp_enabled(),
        c._get_cudnn_sdp_enabled(),
        c._get_mkldnn_enabled(),
    )


def ambient_state(device_type: str) -> tuple[Any, ...]:
    """What changes the captured ops without being an argument."""
    return (
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        kernel_choices(),
        function_modes(),
    )
