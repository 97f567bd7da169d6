"""What a Trainer makes of its model's output, as a loss function for planning.

A plan has to know which outputs receive gradients, and what the loss itself takes. Where the model's output holds the
loss, which is the rule, it knows without. Values do not matter here: it is the Trainer's own loss that trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keepless.capture import Inputs

LossFn = Callable[[Any, Any], torch.Tensor]


def loss_of_trainer(args: Any, model: torch.nn.Module, inputs: Inputs) -> LossFn | None:
    """The loss of a Trainer's call of its model; None where it is in the output.

    Arguments:
        args: of the Trainer.
        inputs: of the call.
    """
    if inputs.kwargs.get("fused_lm_head"):
        return loss_of_log_probs
    if getattr(args, "label_smoothing_factor", 0) and "labels" not in inputs.kwargs:
        return smoothed(args.label_smoothing_factor, is_causal(model))
    return None


def loss_of_log_probs(output: Any, batch: Any) -> torch.Tensor:
    """TRL's, of a model with a fused head: of the log-probabilities of each token, and of balanced experts."""
    log_probs = output["log_probs"]
    per_token = -log_probs * log_probs.exp().detach()
    loss: torch.Tensor = per_token.sum() / torch.as_tensor(output["label_mask"].sum()).clamp(min=1)
    aux = output.get("aux_loss")
    return loss if aux is None else loss + aux


def smoothed(epsilon: float, shift: bool) -> LossFn:
    """The Trainer's label smoother, on labels of zeros: it takes the labels away before it calls the model."""
    from transformers.trainer_pt_utils import LabelSmoother

    smoother = LabelSmoother(epsilon=epsilon)

    def loss_fn(output: Any, batch: Any) -> torch.Tensor:
        logits = output["logits"] if isinstance(output, dict) else output[0]
        labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        loss: torch.Tensor = smoother(output, labels, shift_labels=shift)
        return loss

    return loss_fn


def is_causal(model: torch.nn.Module) -> bool:
    """Whether the Trainer shifts this model's labels when it smooths them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    get_base = getattr(model, "get_base_model", None)
    inner = get_base() if callable(get_base) else model
    return type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
