"""Models that checkpoint already: refused, or taken over for as long as a plan stands in them."""

from __future__ import annotations

import copy
import functools
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import keepless
from keepless.capture.checkpointed import checkpointed_places
from keepless.control.takeover import Taken
from keepless.errors import CheckpointingError

ENGINES = ("graph", "eager")
KWARGS = {"use_reentrant": False, "determinism_check": "none"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Flagged(nn.Module):
    """Blocks that are recomputed where a flag of the stage says so, as diffusers has it."""

    def __init__(self, flag: str = "gradient_checkpointing") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.flag = flag
        setattr(self, flag, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if getattr(self, self.flag) else block(x)
        return x


class Net(nn.Module):
    """Two stages with flags; no switch."""

    def __init__(self, flag: str = "gradient_checkpointing") -> None:
        super().__init__()
        self.down = Flagged(flag)
        self.up = Flagged(flag)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.up(self.down(x)) ** 2).mean()

    def switch(self, value: bool) -> None:
        for stage in (self.down, self.up):
            setattr(stage, stage.flag, value)


class Diffuser(Net):
    """diffusers' names of the switches."""

    def __init__(self) -> None:
        super().__init__()
        self.switched: list[str] = []

    def disable_gradient_checkpointing(self) -> None:
        self.switched.append("off")
        self.switch(False)


class Wrapped(nn.Module):
    def __init__(self, impl: Any = None) -> None:
        super().__init__()
        wrap = wrappers.checkpoint_wrapper if impl is not None else lambda block: block
        options = {} if impl is None else {"checkpoint_impl": impl}
        self.blocks = nn.Sequential(*(wrap(Block(), **options) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.blocks(x) ** 2).mean()


def gpt2(on: bool) -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=61, n_positions=16, use_cache=False)
    model = GPT2LMHeadModel(config).train()
    if on:
        enable_hugging_face(model)
    ids = torch.randint(0, 61, (2, 16))
    return model, {"input_ids": ids, "labels": ids}


def enable_hugging_face(model: Any) -> None:
    """Under the name of transformers 5, or of 4."""
    new = getattr(model, "activation_checkpointing_enable", None)
    new(KWARGS) if new is not None else model.gradient_checkpointing_enable(KWARGS)


def vit(on: bool) -> tuple[nn.Module, Any]:
    timm = pytest.importorskip("timm")
    body = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    body.set_grad_checkpointing(on)
    return keepless.with_loss(body, lambda out, _: out.square().mean()).train(), torch.randn(2, 3, 16, 16)


def convnext(on: bool) -> tuple[nn.Module, Any]:
    timm = pytest.importorskip("timm")
    body = timm.models.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), num_classes=5)
    body.set_grad_checkpointing(on)
    return keepless.with_loss(body, lambda out, _: out.square().mean()).train(), torch.randn(2, 3, 32, 32)


def diffuser(on: bool) -> tuple[nn.Module, Any]:
    model = Diffuser()
    model.switch(on)
    return model, torch.randn(64, 16)


def flagged(on: bool) -> tuple[nn.Module, Any]:
    model = Net("grad_checkpointing")
    model.switch(on)
    return model, torch.randn(64, 16)


def wrapped(on: bool) -> tuple[nn.Module, Any]:
    return Wrapped(wrappers.CheckpointImpl.NO_REENTRANT if on else None), torch.randn(64, 16)


Build = Callable[[bool], tuple[nn.Module, Any]]
MODELS: dict[str, tuple[Build, str]] = {
    "transformers": (gpt2, "gradient_checkpointing"),
    "timm ViT": (vit, "model.grad_checkpointing"),
    "timm ConvNeXt": (convnext, "model.stages.0.grad_checkpointing"),
    "diffusers": (diffuser, "down.gradient_checkpointing"),
    "flags without a switch": (flagged, "up.grad_checkpointing"),
    "torch's checkpoint_wrapper": (wrapped, "blocks.1"),
}
by_model = pytest.mark.parametrize("name", MODELS)
by_engine = pytest.mark.parametrize("engine", ENGINES)


def made(name: str, on: bool = True) -> tuple[nn.Module, Any]:
    torch.manual_seed(7)
    return MODELS[name][0](on)


def standing(model: nn.Module) -> list[dict[str, Any]]:
    """Everything that stands in the modules, hooks one by one."""
    found = []
    for module in model.modules():
        own = dict(module.__dict__)
        hooks = {name: list(table.items()) for name, table in own.items() if _is_table(name, table)}
        found.append({name: value for name, value in own.items() if name != "switched"} | {"all hooks": hooks})
    return found


def _is_table(name: str, table: Any) -> bool:
    return "hooks" in name and isinstance(table, dict) and bool(table)


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether the same objects stand in the same places."""

    def alike(a: Any, b: Any) -> bool:
        return a is b or (type(a) is dict and a == b)

    return len(one) == len(other) and all(
        list(a) == list(b) and all(alike(a[name], b[name]) for name in a) for a, b in zip(one, other, strict=True)
    )


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, batch: Any) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients of a seeded step, and how many ops it ran."""
    model.zero_grad()
    torch.manual_seed(11)
    with Count() as count:
        output = model(**batch) if isinstance(batch, dict) else model(batch)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)], count.ops


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 1 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def planned(model: nn.Module, batch: Any, engine: str, **options: Any) -> keepless.Plan:
    return keepless.plan(model, batch, "1GB", engine=engine, cache=False, **options)


@by_model
@by_engine
def test_refused_without_takeover(name: str, engine: str) -> None:
    """The error names where, and the remedy; nothing changes."""
    model, batch = made(name)
    before = standing(model)
    with pytest.raises(CheckpointingError, match="takeover=True") as caught:
        planned(model, batch, engine)
    assert any(place.endswith(MODELS[name][1]) for place in caught.value.places)
    assert caught.value.places[0] in str(caught.value)
    assert same(before, standing(model))


@by_model
@by_engine
def test_taken_over_and_given_back(name: str, engine: str) -> None:
    """Off while the plan stands, with the bits of the model without checkpointing; on again as it was."""
    plain, batch = made(name, on=False)
    reference, plain_ops = step(plain, batch)
    model, batch = made(name)
    model.load_state_dict(plain.state_dict())
    _, checkpointed_ops = step(model, batch)
    assert checkpointed_ops > plain_ops
    before = standing(model)
    plan = planned(model, batch, engine, takeover=True)
    assert same(before, standing(model)), "planning changed the model"
    assert step(model, batch)[1] == checkpointed_ops
    keepless.apply(model, plan)
    assert checkpointed_places(model) == ()
    assert equal(step(model, batch)[0], reference)
    keepless.remove(model)
    assert same(before, standing(model)), "removing the plan did not put everything back"
    assert step(model, batch)[1] == checkpointed_ops


@pytest.mark.slow
@by_engine
def test_the_plan_is_the_one_of_the_model_without_checkpointing(engine: str) -> None:
    """The step that is captured keeps what the model would recompute."""
    plain, batch = made("transformers", on=False)
    model, _ = made("transformers")
    graphs = [planned(m, batch, engine, **options).graph for m, options in ((plain, {}), (model, {"takeover": True}))]
    assert [op.name for op in graphs[0].ops] == [op.name for op in graphs[1].ops]


@by_engine
def test_a_file_takes_over_where_its_plan_did(engine: str, tmp_path: Path) -> None:
    """Saved, loaded, and applied to another instance."""
    model, batch = made("timm ViT")
    planned(model, batch, engine, takeover=True).save(tmp_path / "step.plan")
    other, _ = made("timm ViT")
    before = standing(other)
    loaded = keepless.load(tmp_path / "step.plan")
    keepless.apply(other, loaded)
    assert checkpointed_places(other) == ()
    reference, _ = made("timm ViT", on=False)
    assert equal(step(other, batch)[0], step(reference, batch)[0])
    keepless.remove(other)
    assert same(before, standing(other))
    assert keepless.verify(other, batch, loaded).equal
    assert same(before, standing(other))


@by_engine
def test_a_plan_without_takeover_is_applied_with_it_only(engine: str) -> None:
    """`apply` refuses, and a plan that stands in the model goes on."""
    model, batch = made("diffusers", on=False)
    plan = planned(model, batch, engine)
    model.switch(True)  # type: ignore[operator]
    before = standing(model)
    with pytest.raises(CheckpointingError, match="takeover=True"):
        keepless.apply(model, plan)
    with pytest.raises(CheckpointingError, match="takeover=True"):
        keepless.verify(model, batch, plan)
    assert same(before, standing(model))
    keepless.apply(model, plan, takeover=True)
    assert checkpointed_places(model) == ()
    assert model.switched == ["off"]
    step(model, batch)
    keepless.remove(model)
    assert same(before, standing(model))


@by_engine
def test_a_planned_model_is_planned_and_verified_again(engine: str) -> None:
    """What was taken over stays so until the plan is removed, and is asked for each time."""
    model, batch = made("flags without a switch")
    before = standing(model)
    plan = planned(model, batch, engine, takeover=True)
    keepless.apply(model, plan)
    forward = model.__dict__["forward"]
    with pytest.raises(CheckpointingError, match="checkpoints already"):
        planned(model, batch, engine)
    assert model.__dict__["forward"] is forward
    again = planned(model, batch, engine, takeover=True)
    assert keepless.verify(model, batch, plan).equal
    assert checkpointed_places(model) == ()
    keepless.apply(model, again)
    assert checkpointed_places(model) == ()
    keepless.remove(model)
    keepless.remove(model)
    assert same(before, standing(model))


def test_other_batches_are_planned_without_checkpointing() -> None:
    """On the spot, under the same takeover; a switch that is turned on under a plan is refused there."""
    model, batch = made("diffusers")
    keepless.fit(model, batch, "1GB", cache=False, takeover=True)
    model(batch[:32]).backward()
    model.switch(True)  # type: ignore[operator]
    with pytest.raises(CheckpointingError, match="checkpoints already"):
        model(batch[:16])


@pytest.mark.slow
def test_curve_and_timeline_take_over() -> None:
    """Every way to a plan has the option."""
    model, batch = made("torch's checkpoint_wrapper")
    before = standing(model)
    with pytest.raises(CheckpointingError):
        keepless.curve(model, batch, points=2, cache=False)
    curve = keepless.curve(model, batch, points=2, cache=False, takeover=True)
    plan = curve.plan(curve.smallest_budget)
    assert keepless.timeline(model, batch, plan, repeats=1).seconds > 0
    assert same(before, standing(model))
    keepless.apply(model, plan)
    assert checkpointed_places(model) == ()


def test_reentrant_wrappers_are_taken_over() -> None:
    """Whatever the wrapper's own function would do with the call."""
    plain = Wrapped()
    model = Wrapped(wrappers.CheckpointImpl.REENTRANT)
    model.load_state_dict(plain.state_dict())
    batch = torch.randn(64, 16)
    keepless.fit(model, batch, "1GB", cache=False, takeover=True)
    assert equal(step(model, batch)[0], step(plain, batch)[0])


def test_hooks_that_the_switch_takes_off_come_back() -> None:
    """transformers hooks the embeddings where it checkpoints, in 4 with adapters only; its switch may leave that."""
    part: Any = made("transformers")[0]
    model: nn.Module = part
    part.get_input_embeddings().register_forward_pre_hook(lambda *_: None)
    if not hasattr(part, "_require_grads_hook"):  # transformers before 5
        part.enable_input_require_grads()
    part.get_input_embeddings().register_forward_hook(lambda *_: None)
    part.get_input_embeddings().register_forward_hook(lambda *_: None, prepend=True)
    before = standing(model)
    taken = Taken(model, checkpointed_places(model))
    assert not same(before, standing(model))
    assert len(part.get_input_embeddings()._forward_hooks) == 2
    taken.give_back()
    assert same(before, standing(model))
    part.disable_input_require_grads()  # its handle still works
    assert len(part.get_input_embeddings()._forward_hooks) == 2


@by_engine
def test_a_whole_model_in_a_wrapper(engine: str) -> None:
    """The wrapper shows its parameters by other names than their modules have."""
    plain, batch = made("torch's checkpoint_wrapper", on=False)
    model = wrappers.checkpoint_wrapper(copy.deepcopy(plain))
    keepless.fit(model, batch, "1GB", cache=False, takeover=True, engine=engine)
    assert equal(step(model, batch)[0], step(plain, batch)[0])
    keepless.remove(model)
    assert checkpointed_places(model) == ("CheckpointWrapper",)


class Stuck(Net):
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.down.gradient_checkpointing = False
        raise RuntimeError("not today")


class Unknown(Net):
    """Says that it checkpoints, by no flag that is known here."""

    @property
    def is_gradient_checkpointing(self) -> bool:
        return True


def fairscale() -> nn.Module:
    model = Net()

    def _checkpointed_forward(original: Any, module: Any, offload: bool, x: Any) -> Any:
        return original(module, x)

    _checkpointed_forward.__module__ = "fairscale.nn.checkpoint.checkpoint_activations"
    model.up.forward = functools.partial(_checkpointed_forward, Flagged.forward, model.up, False)  # type: ignore[method-assign]
    return model


@by_engine
@pytest.mark.parametrize(
    ("make", "text"),
    [(Stuck, "RuntimeError: not today"), (Unknown, "leaves it on"), (fairscale, "fairscale's checkpoint_wrapper")],
)
def test_what_cannot_be_turned_off_is_refused(make: Callable[[], Net], text: str, engine: str) -> None:
    """The model is left as it was found."""
    model = make()
    if make is Stuck:
        model.switch(True)
    before = standing(model)
    with pytest.raises(CheckpointingError, match=text):
        planned(model, torch.randn(8, 16), engine, takeover=True)
    assert same(before, standing(model))


def test_a_plan_that_cannot_be_made_or_applied_leaves_checkpointing_on() -> None:
    """Errors in between give back, too."""
    model, batch = made("diffusers")
    before = standing(model)
    with pytest.raises(keepless.InfeasibleBudget):
        keepless.plan(model, batch, "1KB", cache=False, takeover=True)
    assert same(before, standing(model))
    other = Wrapped()
    plan = planned(other, batch, "eager")
    with pytest.raises(keepless.PlanError):
        keepless.apply(model, plan, takeover=True)
    assert same(before, standing(model))


@by_engine
def test_a_planned_model_is_free_to_go(engine: str) -> None:
    """What was taken over holds no model."""
    model, batch = made("diffusers")
    keepless.fit(model, batch, "1GB", cache=False, takeover=True, engine=engine)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_copy_of_a_planned_model_stays_without_checkpointing() -> None:
    """A copy has no plan; what was taken over is the original's to give back."""
    model, batch = made("diffusers")
    keepless.fit(model, batch, "1GB", cache=False, takeover=True)
    copied = copy.deepcopy(model)
    keepless.remove(model)
    assert checkpointed_places(model) == ("down.gradient_checkpointing", "up.gradient_checkpointing")
    assert checkpointed_places(copied) == ()


FACTORY = """
import torch
from torch.utils.checkpoint import checkpoint


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.grad_checkpointing = True
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            x = x.tanh()
        return (x ** 2).mean()


def build():
    return Net(), torch.randn(32, 16)
"""


@pytest.mark.slow
def test_the_command_line_takes_over(invoke: Callable[..., Any], tmp_path: Path) -> None:
    """`--takeover` of plan, curve, train and verify; a file's plan needs it only where it was made without."""
    (tmp_path / "taken.py").write_text(FACTORY)
    refused = invoke("plan", "taken:build", "-b", "1GB")
    assert refused.exit_code == 1
    assert "checkpoints already" in refused.stderr
    assert "grad_checkpointing" in refused.stderr
    file = str(tmp_path / "step.plan")
    assert invoke("plan", "taken:build", "-b", "1GB", "--takeover", "-o", file).exit_code == 0
    assert json.loads(Path(file).read_text())["plan"]["signature"]["takeover"] is True
    checked = invoke("verify", "taken:build", "--plan", file, "--json")
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["equal"] is True
    assert invoke("train", "taken:build", "-b", "1GB", "--takeover", "-n", "1").exit_code == 0
    assert invoke("curve", "taken:build", "--points", "2", "--takeover").exit_code == 0
