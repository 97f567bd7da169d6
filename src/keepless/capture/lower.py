"""From a traced joint graph to a `Graph` and its `Binding`: nodes are drafted, drafts are assembled."""

from __future__ import annotations

import torch

from keepless.binding import Binding
from keepless.capture.assembly import Assembly
from keepless.capture.chunking import with_chunked_loss
from keepless.capture.drafting import Drafting, StepShape
from keepless.capture.inputs import FlatInputs
from keepless.capture.trace import Traced
from keepless.errors import CaptureError
from keepless.machine import CHUNKED_LOSS


def lower(traced: Traced, flat: FlatInputs, model: torch.nn.Module, shape: StepShape) -> Binding:
    """The graph and binding of a traced step.

    Raises:
        RewriteError: a rewrite that is asked for does not apply.
        CaptureError: the step does something that this engine cannot run exactly.
    """
    withheld: frozenset[int] = frozenset()
    if CHUNKED_LOSS in shape.rewrites:
        traced, withheld = with_chunked_loss(traced)
    work = Drafting(traced, flat, model, shape)
    for node in traced.module.graph.nodes:
        if node.op == "placeholder":
            work.placeholder(node)
        elif node.op == "get_attr":
            work.constant(node)
        elif node.op == "call_function":
            work.call(node)
        elif node.op != "output":
            raise CaptureError(f"The captured step holds a node of kind {node.op}.")
    return Assembly(work, model, withheld).binding()
