"""torch.compile with torch's own activation memory budget, a share from 0 to 1, as a contender."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers.models import Subject
from benchmarks.peers.ways import Unavailable, Way

EAGER_KERNELS, INDUCTOR = "aot_eager", "inductor"
MOST_COMPILED = 256
"""Compiled forms of one function in a process: each share is a form of its own."""


def backend_of(name: str, share: float) -> Callable[..., Any]:
    """A backend of its own for a share: Dynamo takes compiled code for another one only where backends are the same."""
    import torch._functorch.config as functorch
    from torch._dynamo.backends.registry import lookup_backend

    inner = lookup_backend(name)

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        with functorch.patch(activation_memory_budget=share):
            return inner(graph, inputs)

    return backend


class Compiled(Way):
    """A compiled model that shares the parameters of the model as written.

    Arguments:
        backend: "aot_eager" (eager's kernels) or "inductor".
        share: of the activation memory, as torch understands it.
    """

    def __init__(self, subject: Subject, backend: str, share: float) -> None:
        super().__init__(subject)
        if backend == INDUCTOR and subject.params[0].device.type == "cpu" and not shutil.which("g++"):
            raise Unavailable("missing", "inductor needs a C++ compiler (g++) on the CPU")
        import torch._dynamo.config as dynamo

        limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
        setattr(dynamo, limit, max(getattr(dynamo, limit), MOST_COMPILED))
        dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 64 * MOST_COMPILED)
        self.compiled = torch.compile(subject.model, backend=backend_of(backend, share))

    def forward(self, inputs: Any) -> Any:
        """By the compiled model."""
        if isinstance(inputs, dict):
            return self.compiled(**inputs)
        return self.compiled(*inputs) if isinstance(inputs, tuple) else self.compiled(inputs)
