"""The error of a recompute that went wrong: ours, and torch's for code that catches torch's."""

from __future__ import annotations

import torch.utils.checkpoint

from keepless.errors import RecomputeError

_Torch: type[RuntimeError] = getattr(torch.utils.checkpoint, "CheckpointError", RuntimeError)


REMEDY = (
    "The region is watched from its next call on, and runs right: the loop can go on. What this call changed stays "
    "changed: run the step again only with that state put back, or with keepless.forget_regions() called where the "
    "loop begins to do otherwise, so that no step is refused"
)


class CheckpointError(RecomputeError, _Torch):  # type: ignore[misc, valid-type]
    """A region was not recomputed as it ran; no gradient was made from it."""
