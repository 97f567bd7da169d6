"""A captured step on a device that is not here: its ops there, and analytic costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Binding
from keepless.capture.target import Target, TargetFaking
from keepless.cost import CostModel, DeviceSpec, Work, analytic_cost
from keepless.cost import efficiency as kinds
from keepless.errors import DeviceError, LossError, PlanError
from keepless.ir import Graph
from keepless.ir.text import fingerprint
from keepless.machine import Plan
from keepless.machine.elsewhere import ON, device_of
from keepless.measure.optimizer import Storages
from keepless.passes import Retargeted, retarget

FUSED_ON_CUDA: tuple[type[torch.nn.Module], ...] = (torch.nn.GRU, torch.nn.RNN, torch.nn.RMSNorm)
"""Modules that run one kernel on CUDA, and many small ops in a capture on the CPU."""


@dataclass(frozen=True)
class Elsewhere:
    """A step on a device that is not here.

    Arguments:
        graph: of that device's ops.
        device: that device.
    """

    graph: Graph
    device: DeviceSpec


def target_of(model: torch.nn.Module, device: DeviceSpec) -> Target:
    """What a capture for a device must know of it.

    Raises:
        DeviceError: it is no CUDA device, or the model is on a device of its own.
    """
    if device.type != "cuda":
        raise DeviceError(
            f"The device {device.name!r} is a {device.type}: plans for a device that is not here are made for CUDA's. "
            "Leave on= out to plan for this machine."
        )
    found = {t.device.type for t in (*model.parameters(), *model.buffers())}
    if found - {"cpu", "meta"}:
        raise DeviceError(
            f"The model is on {', '.join(sorted(found))}: a plan for {device.name} is made from a model on the CPU, or "
            "without weights on the meta device. Leave on= out to plan for the device that it is on."
        )
    return Target(device.capability)


def faking_for(target: Target) -> TargetFaking:
    """Fakes of a capture for a target."""
    return TargetFaking(torch.device("cpu"), target)


def step_elsewhere(
    model: torch.nn.Module,
    binding: Binding,
    device: DeviceSpec,
    target: Target,
    works: tuple[Work, ...],
) -> tuple[Elsewhere, CostModel, dict[str, object]]:
    """The captured step there, its costs, and what the plan's signature says of both."""
    fused = [name for name, module in model.named_modules() if isinstance(module, FUSED_ON_CUDA)]
    there = retarget(binding.graph, works, device, other_modules=fused)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    cost = analytic_cost(device, there.works, unmapped=there.unmapped, tf32=tf32)
    facts: dict[str, object] = {
        "device": "cuda",
        "fingerprint": fingerprint(there.graph),
        ON: {
            "device": device.as_dict(),
            "margin": margin_nbytes(there),
            "unmapped": there.unmapped_names()[:100],
            "rows": there.rows,
            "attention": sorted(target.attention),
            "casts": sorted(target.casts),
        },
    }
    return Elsewhere(there.graph, device), cost, facts


def margin_nbytes(there: Retargeted) -> int:
    """Bytes of a peak that may be more or less: scratch is an estimate, and what unmapped ops need is not known.

    The largest scratch of an op beside the optimizer's, and the largest of what an unmapped op reads and makes.
    """
    scratch = max((w.scratch for w in there.works if w.kind != kinds.OPTIMIZER), default=0)
    unknown = max((there.works[op].read + there.works[op].written for op in there.unmapped), default=0)
    return scratch + unknown


def loss_work(binding: Binding, loss_fn: Callable[[Any, Any], torch.Tensor], batch: Any) -> Work:
    """Work of the caller's own loss, forward and backward, on fake outputs of the captured shapes.

    Raises:
        LossError: it cannot be run on fakes.
    """
    try:
        with _compat.FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
            outputs = {
                position: torch.empty_strided(
                    binding.examples[slot].size(), binding.examples[slot].stride(), dtype=binding.examples[slot].dtype
                ).requires_grad_(position in binding.grad_outputs)
                for position, slot in binding.outputs.items()
            }
            count = len(binding.outputs) + len(binding.output_constants)
            flat = [outputs.get(i, binding.output_constants.get(i)) for i in range(count)]
            output = _compat.tree_unflatten(flat, binding.output_spec)
            with Storages(_compat.data_dependent_errors()) as storages:
                grads = torch.autograd.grad(
                    loss_fn(output, batch), [outputs[position] for position in binding.grad_outputs]
                )
            peak = storages.peak
    except Exception as error:  # whatever the caller's loss raises
        raise LossError(
            f"The loss function cannot be run without data: {type(error).__name__}: {str(error)[:300]}. A model that "
            "returns its loss (keepless.with_loss) is planned with it."
        ) from error
    tangents = sum(grad.numel() * grad.element_size() for grad in grads)
    read = sum(t.numel() * t.element_size() for t in outputs.values())
    return Work(0.0, 2 * read, peak + tangents, kinds.LOSS, kernels=4, scratch=max(0, peak - tangents))


def refuse_elsewhere(plan: Plan) -> None:
    """Refuses to run a step by a plan that was made for a device that was not there.

    Raises:
        PlanError: it was; says how to plan on the device.
    """
    name = device_of(plan.signature)
    if name:
        raise PlanError(
            f"The plan was made for {name} from its table: its bytes and seconds were never measured, and no step runs "
            f"by it. On the device, keepless.plan(model, batch, {plan.budget.limits['device']}) measures and plans "
            "within the same budget."
        )
