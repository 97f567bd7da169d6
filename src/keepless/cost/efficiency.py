"""Op classes, and the shares of a device's rate and bandwidth that their kernels reach.

The defaults are round figures for large tensors, not measurements of any one device. What was measured replaces them
(`keepless.cost.roofline.calibrated`); until then seconds of one op may be off by half, and plans say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares, from 0 to 1, of the dense rate and of the memory's bandwidth; above 1 where caches serve."""

    compute: float
    memory: float


MATMUL, ATTENTION, CONV, RNN = "matmul", "attention", "conv", "rnn"
NORM, SOFTMAX, POINTWISE, REDUCE, COPY = "norm", "softmax", "pointwise", "reduce", "copy"
TRANSCENDENT, GATHER, RANDOM = "transcendent", "gather", "random"
LOSS, OPTIMIZER, OTHER = "loss", "optimizer", "other"

DEFAULTS: Mapping[str, Efficiency] = {
    MATMUL: Efficiency(0.7, 0.8),
    ATTENTION: Efficiency(0.45, 0.8),
    CONV: Efficiency(0.5, 0.7),
    RNN: Efficiency(0.3, 0.5),
    NORM: Efficiency(0.2, 0.7),
    SOFTMAX: Efficiency(0.2, 0.7),
    POINTWISE: Efficiency(0.2, 0.85),
    TRANSCENDENT: Efficiency(0.2, 0.85),
    REDUCE: Efficiency(0.2, 0.7),
    COPY: Efficiency(1.0, 0.8),
    GATHER: Efficiency(0.2, 0.5),
    RANDOM: Efficiency(0.1, 0.6),
    LOSS: Efficiency(0.2, 0.6),
    OPTIMIZER: Efficiency(0.2, 0.8),
    OTHER: Efficiency(0.2, 0.5),
}

KINDS = tuple(DEFAULTS)
"""The op classes."""
