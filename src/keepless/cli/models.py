"""From a model's name on the command line to a model, a batch, a loss and an optimizer.

`package.module:factory` calls a function of the user's, which returns (model, batch) or (model, batch, loss_fn).
`hf:PATH_TO_CONFIG.json` builds a Hugging Face model from its config with random weights, and a batch of random data.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keepless.cli.session import UsageError, said_by
from keepless.cost import DeviceSpec, find_device
from keepless.errors import KeeplessError

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
AXES = {"batch": "batch_size", "length": "seq_len", "depth": "depth"}
"""Sizes, and what a factory's parameter of each is called."""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FactoryError(KeeplessError):
    """A user's factory, or its module, has raised something."""


@dataclass(frozen=True)
class Recipe:
    """How to build what is trained; JSON values only, so that another process can build the same.

    Arguments:
        spec: the model's name on the command line.
        batch_size, seq_len: of the batch; None is 8 and 128 of an hf: model, and a factory's own.
        dtype: of an hf: model's floating-point parameters.
        optimizer: a name in `OPTIMIZERS`, or "none".
        device: "cpu", "cuda", "cuda:1", or "meta" (planning only: no weights are made).
        learning_rate: of the optimizer.
        seed: of random weights, data and dropout.
    """

    spec: str
    batch_size: int | None = None
    seq_len: int | None = None
    dtype: str = "float32"
    optimizer: str = "adamw"
    device: str = "cpu"
    learning_rate: float = 1e-3
    seed: int = 0

    @property
    def rows(self) -> int:
        """Of an hf: model's batch."""
        return 8 if self.batch_size is None else self.batch_size

    @property
    def tokens(self) -> int:
        """Per row of it."""
        return 128 if self.seq_len is None else self.seq_len


@dataclass
class Built:
    """What a recipe gives."""

    model: torch.nn.Module
    batch: Any
    loss_fn: Callable[[Any, Any], torch.Tensor] | None
    optimizer: torch.optim.Optimizer | None


def device_and_target(spec: str, device: str) -> tuple[str, DeviceSpec | None]:
    """Where the model of a --device is made, and the device that is planned for where that is not here.

    For "rtx4090", or a file that describes a device, a model from a config is made without weights; a factory makes its
    own on the CPU.

    Raises:
        DeviceError: it is no device of torch's and not in the table.
    """
    if device == "meta" or re.fullmatch(r"(cpu|cuda)(:\d+)?", device):
        return device, None
    try:
        torch.device(device)
    except RuntimeError:
        return ("meta" if spec.startswith("hf:") else "cpu"), find_device(device)
    return device, None  # mps, xpu ...: `build` says that they cannot be used


def build(recipe: Recipe, sizes: Mapping[str, int] | None = None) -> Built:
    """Builds what a recipe says.

    Arguments:
        sizes: what a factory is called with; None for the recipe's.

    Raises:
        UsageError: the name, the factory or an option cannot be used.
    """
    if recipe.optimizer not in (*OPTIMIZERS, "none"):
        raise UsageError(f"There is no optimizer {recipe.optimizer!r}; use {', '.join(OPTIMIZERS)} or none.")
    if recipe.rows < 1 or recipe.tokens < 1:
        raise UsageError("--batch-size and --seq-len must be at least 1.")
    try:
        device = torch.device(recipe.device)
    except RuntimeError:
        raise UsageError(f"There is no device {recipe.device!r}; use cpu, cuda, cuda:1 or meta.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device here; use --device cpu, or --device meta to plan without weights.")
    torch.manual_seed(recipe.seed)
    if recipe.spec.startswith("hf:"):
        model, batch, loss_fn = _hugging_face(recipe, device)
    else:
        model, batch, loss_fn = call_factory(recipe.spec, device, _own_sizes(recipe) if sizes is None else sizes)
    optimizer = None
    trainable = [p for p in model.parameters() if p.requires_grad]
    if recipe.optimizer != "none" and trainable:  # planning says what is wrong where nothing can be trained
        kind: Any = OPTIMIZERS[recipe.optimizer]
        optimizer = kind(trainable, lr=recipe.learning_rate)
    return Built(model, batch, loss_fn, optimizer)


def _own_sizes(recipe: Recipe) -> dict[str, int]:
    """What a recipe's factory is called with.

    Raises:
        UsageError: it does not take that.
    """
    given = {"batch": recipe.batch_size, "length": recipe.seq_len}
    found = {AXES[axis]: size for axis, size in given.items() if size is not None}
    taken = axes_of(factory_of(recipe.spec)) if found else set()
    for axis in (axis for axis, size in given.items() if size is not None and axis not in taken):
        raise UsageError(unchangeable(recipe.spec, axis))
    return found


def axes_of(factory: Callable[..., Any]) -> set[str]:
    """Which sizes a factory takes."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # callables without a signature
        return set()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return set(AXES)
    taken = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    return {axis for axis, name in AXES.items() if name in taken}


def unchangeable(spec: str, axis: str) -> str:
    """Why a factory's model or batch has no other size."""
    name = spec.rpartition(":")[2].rpartition(".")[2]
    return (
        f"The {axis} of {spec!r} is what its factory says: the function has no parameter {AXES[axis]}. Give it one, as "
        f"def {name}({AXES[axis]}=...), and make {'the model' if axis == 'depth' else 'the batch'} by it."
    )


def factory_of(spec: str) -> Callable[..., Any]:
    """The function that package.module:factory names.

    Raises:
        UsageError: there is none.
    """
    name, colon, attribute = spec.partition(":")
    if not colon or not name or not attribute:
        raise UsageError(f"The model {spec!r} is neither package.module:factory nor hf:PATH_TO_CONFIG.json.")
    if name.endswith(".py") and Path(name).is_file():
        module = Path(name).with_suffix("")
        inside = f", in the folder {str(module.parent)!r}" if module.parent != Path() else ""
        raise UsageError(f"The model {spec!r} names a file; give its module: {module.name}:{attribute}{inside}.")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise UsageError(f"There is no module {error.name!r} (looked for the model {spec!r}).") from None
        raise FactoryError(f"The module {name!r} of the model {spec!r} cannot be imported: {said_by(error)}") from error
    except KeeplessError:
        raise
    except Exception as error:
        raise FactoryError(f"The module {name!r} of the model {spec!r} cannot be imported: {said_by(error)}") from error
    except SystemExit as error:
        raise FactoryError(f"The module {name!r} of the model {spec!r} ends the program: {said_by(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"The module {name!r} has no {attribute!r}.")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{spec!r} is a {type(found).__name__}, not a function that returns (model, batch).")
    return found  # type: ignore[no-any-return]


def call_factory(spec: str, device: torch.device, sizes: Mapping[str, int]) -> tuple[torch.nn.Module, Any, Any]:
    """Model, batch and loss that a factory returns.

    Arguments:
        sizes: what it is called with (`batch_size`, `seq_len`, `depth`); empty for its own sizes.

    Raises:
        UsageError: there is no such factory, or it returns something else.
        FactoryError: it, or its module, has raised something.
    """
    factory = factory_of(spec)
    try:
        made = factory(**sizes)
    except KeeplessError:
        raise
    except Exception as error:
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        called = f", called with {given}" if given else ""
        raise FactoryError(f"The factory {spec!r} has raised{called}: {said_by(error)}") from error
    except SystemExit as error:
        raise FactoryError(f"The factory {spec!r} ends the program: {said_by(error)}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], torch.nn.Module):
        found = f"({', '.join(type(one).__name__ for one in made)})" if isinstance(made, tuple) else type(made).__name__
        raise UsageError(
            f"{spec!r} must return (model, batch) or (model, batch, loss_fn), the model a Module; it returns {found}."
        )
    loss_fn = made[2] if len(made) == 3 else None
    return made[0].to(device), _move(made[1], device), loss_fn


def _move(batch: Any, device: torch.device) -> Any:
    if device.type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _move(item, device) for key, item in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_move(item, device) for item in batch)
    return batch


def _hugging_face(recipe: Recipe, device: torch.device) -> tuple[torch.nn.Module, Any, None]:
    config = config_of(recipe)
    model = model_of(recipe, config, device)
    longest: int = getattr(config, "max_position_embeddings", None) or 0
    is_learned = any(isinstance(m, torch.nn.Embedding) and m.num_embeddings == longest for m in model.modules())
    if is_learned and recipe.tokens > longest:
        path = recipe.spec.removeprefix("hf:")
        raise UsageError(f"--seq-len {recipe.tokens} is more than the {longest} positions of the config {path!r}.")
    return model, batch_of(model, recipe, device), None


def config_of(recipe: Recipe) -> Any:
    """The config that an hf: model is made from.

    Raises:
        UsageError: it cannot be read, or transformers cannot use it.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    path = recipe.spec.removeprefix("hf:")
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"The config {path!r} cannot be read: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise UsageError(f"The config {path!r} has no model_type.")
    try:
        import transformers
    except ModuleNotFoundError:
        raise UsageError("hf: models need transformers: pip install transformers") from None
    try:
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # transformers and its checks of fields have many
        raise UsageError(f"transformers cannot use the config {path!r}: {str(error)[:500]}") from None
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


def model_of(recipe: Recipe, config: Any, device: torch.device) -> torch.nn.Module:
    """The model of a config, in the recipe's dtype and in training mode.

    Raises:
        UsageError: it cannot be made.
    """
    import transformers

    path = recipe.spec.removeprefix("hf:")
    if recipe.dtype not in DTYPES:
        raise UsageError(f"There is no dtype {recipe.dtype!r}; use {', '.join(DTYPES)}.")
    make = _constructor(transformers, config.architectures, path)
    try:
        with device:
            model: torch.nn.Module = make(config)
    except Exception as error:  # whatever a config of odd numbers ends in
        raise UsageError(
            f"transformers cannot make a model of the config {path!r}: {type(error).__name__}: {str(error)[:500]}"
        ) from None
    return model.to(DTYPES[recipe.dtype]).train()


def _constructor(transformers: Any, names: Any, path: str) -> Callable[[Any], Any]:
    """What makes the model that a config names; a causal language model where it names none."""
    if names is None or names == []:
        causal: Callable[[Any], Any] = transformers.AutoModelForCausalLM.from_config
        return causal
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise UsageError(f"The config {path!r} has architectures {names!r}: a list of class names is wanted.")
    kind = getattr(transformers, names[0], None)
    if not isinstance(kind, type) or not issubclass(kind, torch.nn.Module):
        raise UsageError(
            f"The config {path!r} is of {names[0]!r}, which is no model of transformers {transformers.__version__}. "
            "Name one in 'architectures', or write a factory of your own: package.module:factory."
        )
    return kind


_NO_BATCH = ("MultipleChoice", "NextSentencePrediction", "ForPreTraining")
"""Heads for which `batch_of` has no labels."""


def _check_batch(model: Any) -> None:
    """Refuses models for which there is no random batch with a loss.

    Raises:
        UsageError: with what to do instead.
    """
    name = type(model).__name__
    own = "write a factory of your own, package.module:factory, which returns (model, batch, loss_fn)"
    given = getattr(model, "main_input_name", "input_ids")
    if given not in ("input_ids", "pixel_values") or any(kind in name for kind in _NO_BATCH):
        raise UsageError(f"hf: makes batches of text and of images to classify, and none for {name}: {own}.")
    if not {"labels", "start_positions"} & inspect.signature(model.forward).parameters.keys():
        raise UsageError(
            f"{name} takes no labels and has no loss: name a model with a head in 'architectures', or {own}."
        )


def batch_of(model: Any, recipe: Recipe, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of random data for a model of transformers.

    Raises:
        UsageError: for a kind of model for which there is none.
    """
    _check_batch(model)
    config = model.config
    name = type(model).__name__
    size, count = recipe.rows, recipe.tokens

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, max(1, high), shape, device=device)

    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        if recipe.seq_len is not None:
            raise UsageError(f"--seq-len is of texts, and {recipe.spec!r} is a model of images.")
        side = getattr(config, "image_size", 224)
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        channels = getattr(config, "num_channels", 3)
        pixels = torch.randn(size, channels, height, width, device=device, dtype=DTYPES[recipe.dtype])
        batch = {"pixel_values": pixels}
        return batch | {"labels": integers(config.num_labels, size)} if "Classification" in name else batch
    vocabulary = getattr(config, "vocab_size", None) or config.get_text_config().vocab_size
    batch = {"input_ids": integers(vocabulary, size, count)}
    if "SequenceClassification" in name:
        return batch | {"labels": integers(config.num_labels, size)}
    if "TokenClassification" in name:
        return batch | {"labels": integers(config.num_labels, size, count)}
    if "QuestionAnswering" in name:
        return batch | {"start_positions": integers(count, size), "end_positions": integers(count, size)}
    return batch | {"labels": batch["input_ids"]}
