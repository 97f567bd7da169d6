"""The error of a recompute that went wrong: ours, and torch's for code that catches torch's."""

from __future__ import annotations

import torch.utils.checkpoint

from keepless.errors import RecomputeError

_Torch: type[RuntimeError] = getattr(torch.utils.checkpoint, "CheckpointError", RuntimeError)


class CheckpointError(RecomputeError, _Torch):  # type: ignore[misc, valid-type]
    """A region was not recomputed as it ran; no gradient was made from it."""
