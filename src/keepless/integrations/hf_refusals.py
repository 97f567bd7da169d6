"""Settings of a Trainer that a plan does not go with, refused when training begins, with what to do instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from keepless.capture.checkpointed import checkpointed_places
from keepless.errors import CheckpointingError, IntegrationError
from keepless.machine import OPTIMIZER_IN_BACKWARD

_ONE = "A plan is for one process and one device so far"
_WRAPPERS = (
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
    "PipelineModule",
)


def refuse_settings(args: Any, model: Any, rewrites: Sequence[str]) -> None:
    """Refuses what cannot be planned for.

    Raises:
        IntegrationError: says which setting, and what to do.
    """
    if not isinstance(model, torch.nn.Module):
        raise IntegrationError(f"The Trainer gives a {type(model).__name__} as its model, not a torch.nn.Module.")
    names = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    wrapper = next((name for name in _WRAPPERS if name in names), "")
    if getattr(args, "deepspeed", None) or wrapper in ("DeepSpeedEngine", "PipelineModule"):
        raise IntegrationError(f"{_ONE}, and DeepSpeed has the model: leave deepspeed= out, or KeeplessCallback.")
    if getattr(args, "fsdp", None) or wrapper in ("FullyShardedDataParallel", "FSDPModule"):
        raise IntegrationError(f"{_ONE}, and FSDP shards the model: leave fsdp= out, or KeeplessCallback.")
    mode = getattr(getattr(args, "parallel_mode", None), "value", "not_parallel")
    if mode == "not_distributed" or wrapper == "DataParallel":
        raise IntegrationError(
            f"{_ONE}, and the Trainer would spread each batch over {args.n_gpu} cards: show it one, as "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if mode != "not_parallel" or wrapper:
        raise IntegrationError(
            f"{_ONE}, and the Trainer runs in several ({mode}; world size {args.world_size}): start the script with "
            "python, not with torchrun or accelerate launch."
        )
    devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        raise IntegrationError(
            f"{_ONE}, and this model's device_map spreads it over {', '.join(devices)}: load it with "
            'device_map={"": 0}, or without; what does not fit is what the budget is for.'
        )
    if OPTIMIZER_IN_BACKWARD in rewrites:
        _refuse_optimizer_in_backward(args)


def _refuse_optimizer_in_backward(args: Any) -> None:
    if args.max_grad_norm:
        raise IntegrationError(
            f"rewrites=({OPTIMIZER_IN_BACKWARD!r},) updates each parameter in the backward, so that no gradients are "
            f"left to clip, and the Trainer would clip at max_grad_norm={args.max_grad_norm}: set max_grad_norm=0."
        )
    if getattr(args, "fp16", False):
        raise IntegrationError(
            f"rewrites=({OPTIMIZER_IN_BACKWARD!r},) updates by gradients as they come, and fp16=True scales them: "
            "train with bf16=True."
        )


def refuse_checkpointing(model: torch.nn.Module) -> None:
    """Refuses a model that checkpoints, by whatever name the Trainer was told to.

    Raises:
        CheckpointingError: names the places and the ways out.
    """
    places = checkpointed_places(model)
    if places:
        raise CheckpointingError(
            f"The model checkpoints already ({places[0]}{', ...' if len(places) > 1 else ''}). Set "
            "activation_checkpointing=False (gradient_checkpointing=False in transformers 4 and in TRL, where True is "
            "the default) in the Trainer's arguments, or give KeeplessCallback takeover=True: it is then off while "
            "Keepless trains, and on again after it.",
            places=places,
        )
