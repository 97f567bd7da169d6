"""The eager engine: regions that are recomputed in the backward, whatever their code does."""

from keepless.eager.checkpointing import checkpoint, checkpoint_sequential
from keepless.eager.counters import Counters, checkpoint_counters, reset_checkpoint_counters
from keepless.eager.failures import CheckpointError
from keepless.eager.profile import forget_regions

__all__ = [
    "CheckpointError",
    "Counters",
    "checkpoint",
    "checkpoint_counters",
    "checkpoint_sequential",
    "forget_regions",
    "reset_checkpoint_counters",
]
