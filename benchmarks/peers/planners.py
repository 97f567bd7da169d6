"""Other planners: torch's `sac_ilp`, and `ckptplan`. Where they do not run, they say why."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from benchmarks.peers.models import Subject
from benchmarks.peers.ways import Checkpointed, Unavailable, Way


def sac_ilp(subject: Subject) -> Way:
    """torch.distributed._tools.sac_ilp, which decides how much of each module's activations is discarded."""
    if importlib.util.find_spec("pulp") is None:
        raise Unavailable("missing", "torch.distributed._tools.sac_ilp needs pulp, which is not installed")
    if subject.params[0].device.type == "cpu":
        raise Unavailable(
            "refused",
            f"the RuntimeEstimator of torch {torch.__version__}, of which sac_milp has its seconds, times ops with an "
            "accelerator's events or by its data sheet; there is none",
        )
    raise Unavailable(
        "refused",
        f"sac_milp of torch {torch.__version__} answers with a share of bytes to discard per module, and torch has "
        "nothing that trains by such an answer",
    )


class _Seen(Exception):
    """The first block's arguments are known."""


def _first_call(subject: Subject) -> tuple[tuple[Any, ...], dict[str, Any]]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise _Seen

    handle = subject.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            subject.workload.forward(subject.workload.batch(0)[0])
    except _Seen:
        pass
    finally:
        handle.remove()
    return calls[0]


def ckptplan(subject: Subject, share: float = 0.5) -> Way:
    """ckptplan's choice of blocks to save a share of their activation bytes, run by torch's checkpoint."""
    if importlib.util.find_spec("ckptplan") is None:
        raise Unavailable("missing", "ckptplan is not installed")
    import ckptplan as package

    names = {module: name for name, module in subject.model.named_modules()}
    device = subject.params[0].device
    args, kwargs = _first_call(subject)
    try:
        blocks = package.declare_blocks(subject.model, [(names[block], block) for block in subject.blocks])
        profiles = package.profile_blocks(blocks, args, kwargs, device=device, num_warmup=1, num_trials=3)
        plan = package.plan_checkpoints(profiles, blocks, target_kind="activation_saving_fraction", target_value=share)
    except Exception as error:  # whatever it says is the row
        raise Unavailable("refused", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    chosen = [index for index, decision in enumerate(plan.decisions) if decision.checkpointed]
    return Checkpointed(subject, lambda count: chosen)
