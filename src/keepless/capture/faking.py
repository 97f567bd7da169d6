"""How a run of the forward gets its fakes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from keepless._compat import fakes as fakes_compat
from keepless.capture.inputs import FlatInputs
from keepless.capture.questions import Questions


class Faking:
    """How a run of the forward gets its fakes: each like its tensor.

    Arguments:
        device: of fakes for tensors on the meta device.
    """

    is_here = True
    """Whether the step is captured for the device that fakes are on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def hint(self, size: Any) -> int:
        """What a symbolic size is here."""
        return int(size)

    def mode(self) -> Any:
        """The mode of one run."""
        return fakes_compat.WatchedFakes(allow_non_fake_inputs=True)

    def all_around(self) -> contextlib.AbstractContextManager[Any]:
        """What is around all runs of the forward."""
        return contextlib.nullcontext()

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """What is around the first run; AOTAutograd sees to the others."""
        return contextlib.nullcontext()

    def made(self, node: torch.fx.Node) -> None:
        """Told of each op that the export traces, those that come to nothing too."""

    def held(self, mode: Any, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter or buffer."""
        return fake_like(mode, tensor, self.device)

    def given(self, mode: Any, position: int, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor at a flat position of the call."""
        return fake_like(mode, tensor, self.device)


def fake_like(mode: Any, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A fake like this tensor; of a tensor on the meta device, one on the device of the plan."""
    if tensor.is_meta:
        with mode:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    else:
        fake = mode.from_tensor(tensor.detach(), static_shapes=True)
    return fake.requires_grad_(tensor.requires_grad)


def given_fakes(mode: Any, flat: FlatInputs, faking: Faking, questions: Questions | None) -> list[torch.Tensor]:
    """Fakes of the call's tensors; from here on it is noted what is known of the data of this run's fakes."""
    fakes = [faking.given(mode, i, flat.leaves[i]) for i in flat.tensor_positions]
    if questions is not None:
        mode.watcher = questions
        for i, fake in zip(flat.tensor_positions, fakes, strict=True):
            questions.give(i, fake, flat.leaves[i])
    return fakes
