"""Keepless: train a PyTorch model inside a memory budget, with the same gradients bit for bit.

::

    import keepless
    model = keepless.fit(model, batch, budget="8GiB", optimizer=optimizer)

Public names load on first use: `import keepless` imports no torch, no solver, no plotting library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keepless.api import Estimate as Estimate
    from keepless.api import Fits as Fits
    from keepless.api import FitsGrid as FitsGrid
    from keepless.api import Inputs as Inputs
    from keepless.api import Plan as Plan
    from keepless.api import ReportData as ReportData
    from keepless.api import StepCurve as StepCurve
    from keepless.api import Verification as Verification
    from keepless.api import account as account
    from keepless.api import apply as apply
    from keepless.api import curve as curve
    from keepless.api import estimate as estimate
    from keepless.api import fit as fit
    from keepless.api import fits_grid as fits_grid
    from keepless.api import land as land
    from keepless.api import load as load
    from keepless.api import max_batch as max_batch
    from keepless.api import max_depth as max_depth
    from keepless.api import max_length as max_length
    from keepless.api import plan as plan
    from keepless.api import remove as remove
    from keepless.api import report as report
    from keepless.api import timeline as timeline
    from keepless.api import verify as verify
    from keepless.api import with_depth as with_depth
    from keepless.api import with_loss as with_loss
    from keepless.eager import checkpoint as checkpoint
    from keepless.eager import checkpoint_sequential as checkpoint_sequential
    from keepless.eager import forget_regions as forget_regions
    from keepless.errors import BatchError as BatchError
    from keepless.errors import BudgetError as BudgetError
    from keepless.errors import CaptureError as CaptureError
    from keepless.errors import CheckpointingError as CheckpointingError
    from keepless.errors import DeviceError as DeviceError
    from keepless.errors import GuardError as GuardError
    from keepless.errors import InfeasibleBudget as InfeasibleBudget
    from keepless.errors import IntegrationError as IntegrationError
    from keepless.errors import KeeplessError as KeeplessError
    from keepless.errors import LossError as LossError
    from keepless.errors import OutOfMemory as OutOfMemory
    from keepless.errors import PlanError as PlanError
    from keepless.errors import RecomputeError as RecomputeError
    from keepless.errors import ReportError as ReportError
    from keepless.errors import SizeError as SizeError
    from keepless.errors import StaleTensorError as StaleTensorError
    from keepless.errors import TornStep as TornStep
    from keepless.measure.out_of_memory import is_out_of_memory as is_out_of_memory

__version__ = "0.1.0"

_HOMES = {
    "keepless.api": (
        "Estimate",
        "Fits",
        "FitsGrid",
        "Inputs",
        "Plan",
        "ReportData",
        "StepCurve",
        "Verification",
        "account",
        "apply",
        "curve",
        "estimate",
        "fit",
        "fits_grid",
        "land",
        "load",
        "max_batch",
        "max_depth",
        "max_length",
        "plan",
        "remove",
        "report",
        "timeline",
        "verify",
        "with_depth",
        "with_loss",
    ),
    "keepless.eager": (
        "checkpoint",
        "checkpoint_sequential",
        "forget_regions",
    ),
    "keepless.errors": (
        "BatchError",
        "BudgetError",
        "CaptureError",
        "CheckpointingError",
        "DeviceError",
        "GuardError",
        "InfeasibleBudget",
        "IntegrationError",
        "KeeplessError",
        "LossError",
        "OutOfMemory",
        "PlanError",
        "RecomputeError",
        "ReportError",
        "SizeError",
        "StaleTensorError",
        "TornStep",
    ),
    "keepless.measure.out_of_memory": ("is_out_of_memory",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'keepless' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
