"""What a plan does, as a few numbers under names that every logger takes."""

from __future__ import annotations

from keepless.ir.program import DEVICE
from keepless.machine import Plan
from keepless.reporting.page.build import num_parameters

GB = 1e9
"""Bytes of what metrics call gb: 10**9, as loggers and cards count."""

PEAK_PREDICTED = "memory/peak_predicted_gb"
PEAK_MEASURED = "memory/peak_measured_gb"
BUDGET = "memory/budget_gb"
OVERHEAD = "memory/recompute_overhead_pct"
PARAMS = "memory/params_per_gb"


def memory_metrics(plan: Plan, measured_peak: int | None = None) -> dict[str, float]:
    """A plan as metrics for a logger: GB of 10**9 bytes, percent, parameters per GB of the peak.

    The overhead is the predicted step's, over the predicted step with everything kept. Parameters are the model's,
    trained or not, each once, over the measured peak, or over the predicted one where none is known.

    Arguments:
        measured_peak: highest bytes of a step; None for what the plan knows. Left out where neither is known.
    """
    measured = plan.measured_peak if measured_peak is None else measured_peak
    found = {
        PEAK_PREDICTED: plan.predicted_peak / GB,
        BUDGET: plan.budget.limits[DEVICE] / GB,
        OVERHEAD: 100 * plan.overhead,
    }
    if measured is not None:
        found[PEAK_MEASURED] = measured / GB
    num = num_parameters(plan)
    peak = measured or plan.predicted_peak
    if num and peak:
        found[PARAMS] = num / (peak / GB)
    return found
