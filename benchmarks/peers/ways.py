"""Ways to run a step of one shared model: what stands in the model while a contender has its turn.

A `Way` is made once and then put in and taken out, turn by turn; between turns the model is as it was written.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from benchmarks.peers.models import Subject

Turn = contextlib.AbstractContextManager[Any]


class Unavailable(Exception):
    """A contender cannot train a model.

    Arguments:
        kind: "missing" (a package or compiler is not there) or "refused" (it does not do this).
        reason: for the row that says so.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind, self.reason = kind, reason


class Way:
    """Plain eager; the others differ from it."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def put_in(self) -> None:
        """The next steps are this contender's."""

    def take_out(self) -> None:
        """The model is as it was written."""

    def turn(self) -> Turn:
        """Around a step's forward and loss."""
        return contextlib.nullcontext()

    def forward(self, inputs: Any) -> Any:
        """The model's output."""
        return self.subject.workload.forward(inputs)

    def forward_backward(self, batch: Any) -> torch.Tensor:
        """One batch's gradients; outputs but the loss are released before the backward."""
        inputs, targets = batch
        with self.turn():
            loss = self.subject.workload.loss_of(self.forward(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class Checkpointed(Way):
    """torch's non-reentrant checkpoint around some of the blocks.

    Arguments:
        chosen: which, of their number.
        context: of `checkpoint`, for selective checkpointing.
    """

    def __init__(
        self,
        subject: Subject,
        chosen: Callable[[int], Sequence[int]],
        context: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(subject)
        options = {} if context is None else {"context_fn": context}
        self.forwards = {
            subject.blocks[index]: functools.partial(
                checkpoint, subject.blocks[index].forward, use_reentrant=False, **options
            )
            for index in chosen(len(subject.blocks))
        }

    def put_in(self) -> None:
        """Blocks call checkpoint."""
        for block, forward in self.forwards.items():
            block.__dict__["forward"] = forward

    def take_out(self) -> None:
        """Blocks run as they are."""
        for block in self.forwards:
            block.__dict__.pop("forward", None)


def every(step: int) -> Callable[[int], Sequence[int]]:
    """Each `step`-th block is checkpointed."""
    return lambda count: range(0, count, step)


def half(count: int) -> Sequence[int]:
    """The first half of the blocks."""
    return range((count + 1) // 2)


aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default}
SAVED = {
    *PRODUCTS,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
"""What torchtitan's list saves (products, attention), and convolutions."""


def save_products() -> Any:
    """Results of `SAVED` are kept, all else is recomputed."""

    def policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if func in SAVED else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def save_every_second_product() -> Any:
    """The same, but every second matrix product is recomputed, as in torchtitan's "selective" mode."""
    counts = {False: 0, True: 0}

    def policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if func in PRODUCTS:
            counts[context.is_recompute] += 1
        keeps = func in SAVED and not (func in PRODUCTS and counts[context.is_recompute] % 2 == 0)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class HuggingFace(Way):
    """transformers' own switch.

    Arguments:
        options: of `activation_checkpointing_enable` beyond those of `checkpoint`.
    """

    def __init__(self, subject: Subject, **options: Any) -> None:
        super().__init__(subject)
        model: Any = subject.model
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise Unavailable("refused", "it is no model of transformers")
        self.enable = getattr(model, "activation_checkpointing_enable", None)
        if options and self.enable is None:
            import transformers

            names = ", ".join(options)
            raise Unavailable("missing", f"transformers {transformers.__version__} has no options {names}")
        if self.enable is None:
            self.enable = functools.partial(
                model.gradient_checkpointing_enable, gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.disable = getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)
        self.options = options

    def put_in(self) -> None:
        """Layers checkpoint."""
        self.enable(**self.options)

    def take_out(self) -> None:
        """They do not."""
        self.disable()
        if hasattr(self.subject.model, "disable_input_require_grads"):
            hooks = getattr(self.subject.model, "_require_grads_hooks", None)
            if hooks:
                self.subject.model.disable_input_require_grads()


class SavedOnCpu(Way):
    """torch.autograd.graph.save_on_cpu: on the CPU every saved tensor is copied within the same memory."""

    def turn(self) -> Turn:
        """Saved tensors are packed."""
        return torch.autograd.graph.save_on_cpu(pin_memory=self.subject.params[0].is_cuda)
