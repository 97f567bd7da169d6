"""The device here as planning describes others: a product of matrices per dtype and a copy, timed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from keepless.cost import DeviceSpec
from keepless.cost.efficiency import KINDS, Efficiency
from keepless.measure.device import device_name, device_nbytes
from keepless.measure.ops import Trial, measure_ops

_SIDE = {"cpu": 768, "cuda": 4096}
_COPY_NBYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
_DTYPES = {
    "cpu": ("float32",),
    "cuda": ("float32", "bfloat16", "float16"),
}


def probed_device(device: torch.device | str = "cpu") -> DeviceSpec:
    """This device with measured rates and bandwidth: some hundred milliseconds, 128 MiB (CUDA: 1 GiB).

    Rates are those that large products reach, so that efficiencies stand about 1 before they are calibrated.

    Raises:
        MeasureError: the device is neither CPU nor CUDA.
    """
    device = torch.device(device)
    kind = device.type
    trials = [_product(_SIDE.get(kind, 1), dtype, device) for dtype in _DTYPES.get(kind, ("float32",))]
    trials.append(_copy(_COPY_NBYTES.get(kind, 1), device))
    costs = measure_ops(trials, device=device, min_seconds=0.05)
    side = _SIDE[kind]
    rates = {dtype: 2 * side**3 / costs[f"probe.mm.{dtype}"].seconds for dtype in _DTYPES[kind]}
    capability = torch.cuda.get_device_capability(device) if kind == "cuda" else (0, 0)
    return DeviceSpec(
        name=device_name(device),
        memory_nbytes=device_nbytes(device),
        bandwidth=2 * _COPY_NBYTES[kind] / costs["probe.copy"].seconds,
        rates=rates,
        source=f"probed: products of {side} x {side} matrices, a copy of {_COPY_NBYTES[kind] >> 20} MiB",
        type=kind,
        capability=capability,
        efficiency={one: Efficiency(1.0, 1.0) for one in KINDS},
    )


def _product(side: int, dtype: str, device: torch.device) -> Trial:
    def make() -> Callable[[], object]:
        a = torch.full((side, side), 0.5, dtype=getattr(torch, dtype), device=device)
        return lambda: a @ a

    return Trial(f"probe.mm.{dtype}", make, 0)


def _copy(nbytes: int, device: torch.device) -> Trial:
    def make() -> Callable[[], object]:
        a = torch.ones(nbytes // 4, device=device)
        b = torch.ones(nbytes // 4, device=device)
        return lambda: b.copy_(a)

    return Trial("probe.copy", make, 0)
