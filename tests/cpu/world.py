"""All that planning must leave as it was: the model, what belongs to it, torch, Python, and the process.

`World(...)` takes it all down; `differences()` names what is not as it was. Tensors count by identity, place in memory,
bits, version and hooks; containers by their items in order; everything else by identity. What was there is held, so
that nothing new can have an old identity.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch._dynamo.config
import torch._dynamo.utils
import torch._functorch.config

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque, OrderedDict)
_GLOBAL_HOOKS = [name for name in vars(torch.nn.modules.module) if name.startswith("_global_")]
_OPTIMIZERS = sys.modules["torch.optim.optimizer"]  # torch.optim hides it
_OPTIMIZER_HOOKS = [name for name in vars(_OPTIMIZERS) if name.startswith("_global_")]
_CONFIGS = (torch._dynamo.config, torch._functorch.config)


class World:
    """What the world is like.

    Arguments:
        model: with parameters, buffers, attributes and hooks of every module.
        optimizer: with its state.
        batch: tensors of it.
        generators: of random numbers, beside those of torch, Python and NumPy.
        others: objects whose attributes count: a data loader's iterator, say.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        batch: Iterable[torch.Tensor] = (),
        generators: Iterable[torch.Generator] = (),
        others: Iterable[Any] = (),
    ) -> None:
        self._of = model, optimizer, list(batch), list(generators), list(others)
        self._held: list[Any] = []
        self.facts = self._taken()

    def differences(self) -> list[str]:
        """Names of what is not as it was, with both."""
        now = World(*self._of).facts
        names = [*self.facts, *(name for name in now if name not in self.facts)]
        gone = object()
        return [
            f"{name}: {_short(self.facts.get(name, gone))} -> {_short(now.get(name, gone))}"
            for name in names
            if self.facts.get(name, gone) != now.get(name, gone)
        ]

    def _taken(self) -> dict[str, Any]:
        model, optimizer, batch, generators, others = self._of
        facts: dict[str, Any] = {}
        for path, module in model.named_modules():
            self._object(facts, f"model.{path}", module)
            facts[f"model.{path} class"] = self._items(dict(vars(type(module))))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._tensor(facts, name, tensor)
        for index, tensor in enumerate(batch):
            self._tensor(facts, f"batch {index}", tensor)
        if optimizer is not None:
            self._optimizer(facts, optimizer)
        for index, generator in enumerate(generators):
            facts[f"generator {index}"] = _bits(generator.get_state()), generator.initial_seed()
        for index, other in enumerate(others):
            self._object(facts, f"other {index}", other)
        return facts | self._random() | self._torch() | self._python() | self._process()

    def _object(self, facts: dict[str, Any], label: str, owner: Any) -> None:
        facts[f"{label} itself"] = self._identity(owner)
        facts[f"{label} attributes"] = self._items(dict(vars(owner)))
        for name, value in vars(owner).items():
            if isinstance(value, _CONTAINERS):
                facts[f"{label}.{name} items"] = self._items(value)
            elif isinstance(value, np.ndarray):
                facts[f"{label}.{name} values"] = value.tobytes()
            elif isinstance(value, torch.Tensor):
                facts[f"{label}.{name} bits"] = _bits(value)
            elif isinstance(value, torch.Generator):
                facts[f"{label}.{name} state"] = _bits(value.get_state())
            elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module) and not callable(value):
                facts[f"{label}.{name} attributes"] = self._items(dict(vars(value)))

    def _tensor(self, facts: dict[str, Any], label: str, tensor: torch.Tensor) -> None:
        grad = tensor.grad if tensor.is_leaf else None
        facts[label] = {
            "identity": self._identity(tensor),
            "memory": (tensor.data_ptr(), tensor.untyped_storage().nbytes()),
            "layout": (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device),
            "bits": _bits(tensor),
            "version": tensor._version,
            "requires_grad": tensor.requires_grad,
            "graph": self._identity(tensor.grad_fn),
            "hooks": self._items(tensor._backward_hooks),
            "post-accumulate hooks": self._items(tensor._post_accumulate_grad_hooks),
            "grad": self._identity(grad),
            "grad bits": None if grad is None else _bits(grad),
            "grad version": None if grad is None else grad._version,
            "attributes": self._items(vars(tensor)),
        }

    def _optimizer(self, facts: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        self._object(facts, "optimizer", optimizer)
        for index, group in enumerate(optimizer.param_groups):
            facts[f"optimizer group {index}"] = self._identity(group), self._items(group), self._items(group["params"])
        for index, (parameter, state) in enumerate(optimizer.state.items()):
            facts[f"optimizer state {index}"] = self._identity(parameter), self._identity(state), self._items(state)
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    self._tensor(facts, f"optimizer state {index} {name}", value)

    def _random(self) -> dict[str, Any]:
        return {
            "torch's random numbers": (_bits(torch.get_rng_state()), torch.initial_seed()),
            "Python's random numbers": random.getstate(),
            "NumPy's random numbers": str(np.random.get_state(legacy=False)),
            "torch's default generator": self._identity(torch.default_generator),
        }

    def _torch(self) -> dict[str, Any]:
        c: Any = torch._C
        backends: Any = torch.backends
        flags = {
            "grad mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
            "autocast cache": torch.is_autocast_cache_enabled(),
            "default dtype": torch.get_default_dtype(),
            "default device": torch.get_default_device(),
            "deterministic": (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                torch.utils.deterministic.fill_uninitialized_memory,
            ),
            "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
            "matmul precision": torch.get_float32_matmul_precision(),
            "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            "multithreading": torch.autograd.is_multithreading_enabled(),
            "view replay": torch.autograd.is_view_replay_enabled(),
            "profiler": torch.autograd._profiler_enabled(),
            "kernels": (
                *(getattr(c, f"_get_{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math", "cudnn")),
                c._get_sdp_priority_order(),
                c._get_mkldnn_enabled(),
                c._get_nnpack_enabled() if hasattr(c, "_get_nnpack_enabled") else None,
            ),
            "cudnn": [(name, getattr(backends.cudnn, name)) for name in ("enabled", "benchmark", "deterministic")],
            "dispatch modes": c._len_torch_dispatch_stack(),
            "dispatch mode keys": [self._identity(c._get_dispatch_mode(k)) for k in _mode_keys()],
            "function modes": c._len_torch_function_stack(),
            "saved-tensor hooks": self._items(c._autograd._top_saved_tensors_default_hooks(True)),
            "saved-tensor hooks allowed": c._autograd._saved_tensors_hooks_is_enabled(),
            "transforms": c._functorch.peek_interpreter_stack() is None,
            "forward AD": int(torch.autograd.forward_ad._current_level),
            "compiling": (torch.compiler._is_compiling_flag, torch.compiler.is_exporting()),
            "tracing": self._identity(torch._guards.TracingContext.try_get()),
            "stance": str(torch._dynamo.eval_frame._stance),
            "backward": c._current_graph_task_id(),
        }
        found: dict[str, Any] = {f"torch: {name}": value for name, value in flags.items()}
        found["torch: counters of dynamo"] = str(dict(torch._dynamo.utils.counters))
        for config in _CONFIGS:
            found[f"torch: {config.__name__}"] = str(sorted(config.get_config_copy().items()))
        for name in _GLOBAL_HOOKS:
            value = getattr(torch.nn.modules.module, name)
            found[f"torch: {name}"] = self._items(value) if isinstance(value, _CONTAINERS) else self._identity(value)
        for name in _OPTIMIZER_HOOKS:
            found[f"torch: {name}"] = self._items(getattr(_OPTIMIZERS, name))
        homes: tuple[Any, ...] = (torch, torch.random, torch.Tensor, torch.nn.Module, torch.fx.Graph, torch.Generator)
        for home in homes:
            found[f"torch: names in {home.__name__}"] = self._items(
                {name: value for name, value in vars(home).items() if callable(value)}
            )
        found["torch: Python kernels"] = {
            name: self._items(overload.py_kernels) for name, overload in _overloads() if overload.py_kernels
        }
        return found

    def _python(self) -> dict[str, Any]:
        loggers = ["", *(name for name in logging.root.manager.loggerDict if name.startswith(("torch", "keepless")))]
        return {
            "python: warnings": (self._items(warnings.filters), self._identity(warnings.showwarning)),
            "python: path": list(sys.path),
            "python: import hooks": (self._items(sys.meta_path), self._items(sys.path_hooks)),
            "python: recursion limit": sys.getrecursionlimit(),
            "python: switch interval": sys.getswitchinterval(),
            "python: streams": self._items([sys.stdin, sys.stdout, sys.stderr]),
            "python: hooks": self._items([sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook]),
            "python: profile": self._identity(sys.getprofile()),
            "python: garbage": (
                gc.isenabled(),
                gc.get_freeze_count(),
                gc.get_threshold(),
                gc.get_debug(),
                self._items(gc.callbacks),
            ),
            "python: at exit": atexit._ncallbacks(),
            "python: signals": {number: self._identity(signal.getsignal(number)) for number in signal.valid_signals()},
            "python: loggers": {
                name: (
                    logging.getLogger(name).level,
                    logging.getLogger(name).disabled,
                    len(logging.getLogger(name).handlers),
                )
                for name in loggers
            },
            "python: logging": logging.root.manager.disable,
        }

    def _process(self) -> dict[str, Any]:
        files = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                files[name] = os.readlink(f"/proc/self/fd/{name}")
            except OSError:  # the folder that is being read
                continue
        mask = os.umask(0o022)
        os.umask(mask)
        return {
            "process: environment": dict(os.environ),
            "process: folder": os.getcwd(),
            "process: umask": mask,
            "process: files": {name: where for name, where in files.items() if "/fd" not in where},
            "process: threads": sorted(thread.name for thread in threading.enumerate()),
            "process: system threads": len(os.listdir("/proc/self/task")),
            "process: children": _children(),
        }

    def _identity(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        self._held.append(value)
        return type(value).__name__, id(value)

    def _items(self, value: Any) -> Any:
        """What a container holds, by identity, in order."""
        if value is None:
            return None
        if isinstance(value, dict):
            return [(self._identity(key), self._identity(item)) for key, item in value.items()]
        if isinstance(value, (set, frozenset)):
            return sorted(map(str, map(self._identity, value)))
        return [self._identity(item) for item in value]


def _bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def _mode_keys() -> list[Any]:
    keys: Any = torch._C._TorchDispatchModeKey
    return [keys.FAKE, keys.PROXY, keys.FUNCTIONAL]


def _overloads() -> list[tuple[str, Any]]:
    aten = torch.ops.aten
    packets = [(name, getattr(aten, name)) for name in sorted(aten._dir) if hasattr(aten, name)]
    return [(f"{name}.{o}", getattr(packet, o)) for name, packet in packets for o in packet.overloads()]


def _children() -> list[str]:
    found: list[str] = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                found += file.read().split()
        except OSError:
            continue
    return sorted(found)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 300 else f"{text[:140]} ... {text[-140:]}"
