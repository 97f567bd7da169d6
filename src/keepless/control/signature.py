"""What a plan was made for, as JSON values, and what differs when it is used for something else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from keepless.capture import FlatInputs, planned_device
from keepless.control.captured import Settings
from keepless.errors import PlanError
from keepless.ir import Graph
from keepless.ir.text import fingerprint
from keepless.measure import describe_device
from keepless.modules.kinds import autocast_now
from keepless.reporting.account import block_of


def model_signature(model: torch.nn.Module) -> dict[str, object]:
    """Names, shapes and dtypes of parameters and buffers, and the modes of the modules."""

    def table(pairs: Any) -> dict[str, object]:
        return {name: [str(t.dtype), list(t.shape), bool(t.requires_grad)] for name, t in pairs}

    modes = "".join("1" if module.training else "0" for module in model.modules())
    device = planned_device(model)
    return {
        "model": type(model).__qualname__,
        "parameters": table(model.named_parameters()),
        "buffers": table(model.named_buffers()),
        "modes": hashlib.sha256(modes.encode()).hexdigest()[:16],
        "device": device.type,
    }


def module_facts(model: torch.nn.Module, device: torch.device, settings: Settings, graph: Graph) -> dict[str, object]:
    """What a plan of module calls was asked for, and where it was made."""
    return {
        "autocast": autocast_now(model),
        "torch": torch.__version__,
        "device_facts": {key: str(value) for key, value in describe_device(device).items()},
        "fingerprint": fingerprint(graph),
        "accumulate": settings.accumulate,
        "release_outputs": settings.release_outputs,
        "state_nbytes": settings.shape.state_nbytes,
        "outside_nbytes": settings.outside,
        "has_optimizer": settings.optimizer is not None,
        "own_loss": settings.own_loss,
        **optimizer_facts(model, settings),
    }


def optimizer_facts(model: torch.nn.Module, settings: Settings) -> dict[str, object]:
    """What accounts say of an optimizer beyond the bytes of its state: whose they are, and its first step's."""
    footprint = settings.optimizer
    facts: dict[str, object] = {}
    if footprint is None:
        return facts
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(names) == len(footprint.by_parameter):
        blocks: dict[str, int] = {}
        for name, nbytes in zip(names, footprint.by_parameter, strict=True):
            block = block_of(name.rpartition(".")[0])
            blocks[block] = blocks.get(block, 0) + nbytes
        facts["state_by_block"] = {block: nbytes for block, nbytes in blocks.items() if nbytes}
    told = {
        "first_scratch_nbytes": footprint.first_scratch_nbytes,
        "steady_scratch_nbytes": footprint.steady_scratch_nbytes,
        "missing_state_nbytes": footprint.missing_nbytes,
    }
    return facts | {name: nbytes for name, nbytes in told.items() if nbytes is not None}


def batch_signature(flat: FlatInputs) -> dict[str, object]:
    """Structure, shapes and dtypes of a call."""
    leaves: list[object] = []
    for leaf in flat.leaves:
        if isinstance(leaf, torch.Tensor):
            leaves.append([str(leaf.dtype), list(leaf.shape), list(leaf.stride()), bool(leaf.requires_grad)])
        else:
            leaves.append(repr(leaf)[:200])
    return {"structure": str(flat.spec)[:2000], "arguments": leaves}


def check_signature(planned: Mapping[str, object], now: Mapping[str, object], what: str) -> None:
    """Refuses a plan that was made for something else.

    Raises:
        PlanError: names the first thing that differs.
    """
    for key, value in now.items():
        other = planned.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            for name in sorted(set(value) | set(other)):
                if value.get(name) != other.get(name):
                    raise PlanError(
                        f"The plan was made for another {what}: {key.removesuffix('s')} {name} is "
                        f"{_text(value.get(name))} here and {_text(other.get(name))} in the plan. Plan again."
                    )
        elif isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
            for index, (a, b) in enumerate(zip(value, other, strict=True)):
                if a != b:
                    raise PlanError(
                        f"The plan was made for another {what}: {key.removesuffix('s')} {index} is {_text(a)} here "
                        f"and {_text(b)} in the plan. Plan again."
                    )
        elif value != other:
            raise PlanError(
                f"The plan was made for another {what}: {key} is {_text(value)} here and {_text(other)} in the plan. "
                "Plan again."
            )


def _text(item: object) -> str:
    if item is None:
        return "absent"
    if isinstance(item, list) and len(item) >= 2 and isinstance(item[0], str) and item[0].startswith("torch."):
        return f"{item[0].removeprefix('torch.')}{item[1]}" + (f" {item[2:]}" if len(item) > 2 else "")
    return str(item)
