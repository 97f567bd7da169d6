"""`torch.compile(step, backend="keepless", options={"budget": "8GiB"})`: Dynamo's graph, run by a plan.

Dynamo captures a function and watches over when that holds; its graph is then captured, measured, planned and run as
by `keepless.plan` and `apply`, on the first call. Nothing is put into the model. The ops are eager's own, and so are
the bits: there is no Inductor behind this.

The budget is one step's. So the compiled function must be the step's forward up to its loss, as one graph: what
Dynamo breaks in two cannot share a budget, and is refused.

Options are those of `keepless.plan` and `apply`, and `on_plan`, which is called with each plan. `optimizer` is given to
be counted; without it the step is planned without its state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from keepless import api
from keepless.capture import Inputs
from keepless.errors import IntegrationError
from keepless.machine import Plan

_BESIDE = ("background", "on_oom", "black_box", "on_plan")
_REFUSED = {
    "on": "nothing can be trained on a device that is not here",
    "engine": "a graph of Dynamo's is planned op by op",
    "blocks": "a graph of Dynamo's is planned op by op",
    "takeover": "compile a model whose checkpointing is off",
    "rewrites": "the step's optimizer and loss are not in Dynamo's graph; use keepless.fit",
    "arena": "use keepless.fit",
}


def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
    """Dynamo's entry point; see the module."""
    return torch.compiler.disable(CompiledStep(gm, given), recursive=True)  # type: ignore[no-any-return,no-untyped-call]


class CompiledStep:
    """One graph of Dynamo's. It is planned when it is first called for training.

    Attributes:
        plan: None before that, and for a graph in which nothing is trained.

    Raises (when called):
        IntegrationError: an option is missing or unknown, or the graph gives no loss.
        InfeasibleBudget, CaptureError: as `keepless.plan`.
    """

    def __init__(self, gm: torch.fx.GraphModule, given: Mapping[str, Any]) -> None:
        self.gm = gm
        self.given = dict(given)
        self.plan: Plan | None = None
        self._step: _Step | None = None
        self.__name__ = "keepless_step"

    def __call__(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled() or not any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs):
            return self.gm(*inputs)
        if self._step is None or not self._step.holds(inputs):
            options, budget, beside = _read(self.given)
            on_plan = beside.pop("on_plan", None)
            step = _Step(self.gm, inputs, options.get("loss_fn"))
            self.plan = api.plan(step, Inputs(*step.rest(inputs)), budget, engine="graph", **options)
            self._step = api.apply(step, self.plan, **beside)
            if on_plan is not None:
                on_plan(self.plan)
        output = self._step(*self._step.rest(inputs))
        return self._step.as_dynamo_has_it(output)


class _Step(torch.nn.Module):
    """Dynamo's graph as a module: the parameters and buffers that it takes as inputs are the module's own again.

    Arguments:
        inputs: of the first call.
    """

    def __init__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], loss_fn: Any) -> None:
        super().__init__()
        self._graph = (gm,)  # no submodule: it compiles itself when it is first called
        if any(True for _ in gm.parameters()):
            raise IntegrationError(
                "Dynamo's graph has parameters of its own; set torch._dynamo.config.inline_inbuilt_nn_modules."
            )
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        self.homes: dict[int, str] = {}
        for position, (name, given) in enumerate(zip(names, inputs, strict=True)):
            if isinstance(given, torch.nn.Parameter):
                self.register_parameter(name, given)
            elif isinstance(given, torch.Tensor) and not given.requires_grad and "_buffers_" in name:
                self.register_buffer(name, given)
            else:
                continue
            self.homes[position] = name
        self.loss: int | None = None
        if loss_fn is None:
            self.loss = _loss_of(gm)

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether these are the inputs of the model that it was made for."""
        return all(getattr(self, name) is inputs[position] for position, name in self.homes.items())

    def rest(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The inputs that are not the module's own."""
        return tuple(given for position, given in enumerate(inputs) if position not in self.homes)

    def forward(self, *rest: Any) -> Any:
        """The graph's output, the loss in front."""
        given = iter(rest)
        total = len(self.homes) + len(rest)
        inputs = [getattr(self, self.homes[i]) if i in self.homes else next(given) for i in range(total)]
        output = tuple(self._graph[0](*inputs))
        return output if not self.loss else (output[self.loss], *output[: self.loss], *output[self.loss + 1 :])

    def as_dynamo_has_it(self, output: tuple[Any, ...]) -> tuple[Any, ...]:
        """An output of `forward` in the graph's own order."""
        return output if not self.loss else (*output[1 : self.loss + 1], output[0], *output[self.loss + 1 :])


def _loss_of(gm: torch.fx.GraphModule) -> int:
    """Where in the graph's output the loss stands.

    Raises:
        IntegrationError: there is not one scalar with a gradient.
    """
    (last,) = [node for node in gm.graph.nodes if node.op == "output"]
    found, seen = [], []
    for position, node in enumerate(last.args[0]):
        value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None
        if isinstance(value, torch.Tensor) and value.requires_grad:
            seen.append(list(value.shape))
            if value.numel() == 1 and value.is_floating_point():
                found.append(position)
    if len(found) == 1:
        return found[0]
    raise IntegrationError(
        f"Dynamo's graph gives {len(found)} scalars that could be the loss (it gives gradients to outputs of shapes "
        f"{seen}): a budget is for a whole step. Compile a function that returns the loss, as torch.compile(lambda x, "
        'y: loss_fn(model(x), y), backend="keepless", fullgraph=True, ...), where fullgraph tells of breaks; or give '
        'options={"loss_fn": loss of (the tuple of outputs, the inputs)}.'
    )


def _read(given: Mapping[str, Any]) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """The options of the plan, the budget, and those of apply.

    Raises:
        IntegrationError: there is no budget, or an option that is none.
    """
    options = dict(given.get("options") or {})
    other = sorted(set(given) - {"options"})
    if other:
        raise IntegrationError(f"backend='keepless' takes no {other[0]}=: everything is in options={{'budget': ...}}.")
    if "budget" not in options:
        raise IntegrationError('backend="keepless" needs a budget: options={"budget": "8GiB"}.')
    budget = options.pop("budget")
    known = {*inspect.signature(api.plan).parameters, *_BESIDE} - {"model", "batch", "budget", *_REFUSED}
    for name in options:
        if name in _REFUSED:
            raise IntegrationError(f'backend="keepless" takes no option {name!r}: {_REFUSED[name]}.')
        if name not in known:
            raise IntegrationError(f'backend="keepless" has no option {name!r}; it has {", ".join(sorted(known))}.')
    beside = {name: options.pop(name) for name in _BESIDE if name in options}
    return options, budget, beside
