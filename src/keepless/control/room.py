"""Planning fits: what trials of single ops may take, so that measuring stays within the budget, too.

A trial reads the model's own parameters, and makes its other inputs and its outputs: no more than the op has in the
step itself. An op for which there is no room has none in any step within the budget. It is not run, and its scratch
bytes are left out of what is said of larger budgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from keepless.binding import Binding
from keepless.capture.state import named_state
from keepless.measure import OpCost, Trial, device_nbytes

ALWAYS_NBYTES = 64 * 2**20
"""A trial may take this much beside the model, however small the budget: then the smallest budget is known exactly."""
_BYTES_PER_S = 5e9
"""Stands for seconds of ops that are not run."""


def room_for_trials(model: torch.nn.Module, tensors: Iterable[torch.Tensor], budget: int, device: torch.device) -> int:
    """Bytes that a trial may allocate: what the budget leaves beside what stands on the device.

    Arguments:
        tensors: of the batch.
        budget: bytes; 0 for those that the device has.
    """
    storages = {}
    for tensor in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *tensors):
        if tensor is not None and tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    resident = sum(storages.values())
    if budget:
        room = budget - resident
    elif device.type == "cuda":
        room = device_nbytes(device) - torch.cuda.memory_allocated(device)
    else:
        room = device_nbytes(device)  # what is available now: the model is not in it
    return max(ALWAYS_NBYTES, room)


def split_by_room(trials: Iterable[Trial], room: int) -> tuple[list[Trial], list[Trial]]:
    """The trials that fit, and those that do not."""
    fitting: list[Trial] = []
    others: list[Trial] = []
    for trial in trials:
        (fitting if trial.input_nbytes + trial.output_nbytes <= room else others).append(trial)
    return fitting, others


def cost_of_unrun(trial: Trial) -> OpCost:
    """The cost of an op that is not run: no scratch bytes, and seconds by the bytes that it moves."""
    return OpCost((trial.input_nbytes + trial.output_nbytes) / _BYTES_PER_S, 0, 0.0, 0)


def own_params(binding: Binding, model: torch.nn.Module) -> Mapping[int, torch.Tensor]:
    """Parameters by the value that each is, where a trial can read the model's own: on the device, with its strides."""
    found: dict[int, torch.Tensor] = {}
    state = dict(named_state(model))
    for name, slot in binding.params.items():
        tensor, example = state.get(name), binding.examples[slot]
        if (
            tensor is not None
            and tensor.device == binding.device
            and tensor.dtype == example.dtype
            and (tensor.size(), tensor.stride(), tensor.storage_offset())
            == (example.size(), example.stride(), example.storage_offset())
        ):
            found[binding.slot_value[slot]] = tensor.detach()
    return found
