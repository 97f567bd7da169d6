"""Models that a checkpoint goes around block by block, tiny and with random weights: transformers' and timm's.

Each builder returns a `Case`: a model in train mode, its batches, and the way the regions are put into it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Checkpoint = Callable[..., Any]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model and what it is trained on.

    Arguments:
        model: in train mode.
        batch: keyword arguments of a batch number.
        loss: of (model, batch): (outputs, loss).
        install: puts a checkpoint around every block of the model.
        num_blocks: how many regions a forward has at least.
    """

    model: torch.nn.Module
    batch: Callable[[int], Batch]
    loss: Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]
    install: Callable[[Checkpoint], None]
    num_blocks: int


def wrap(blocks: Iterable[torch.nn.Module], checkpoint: Checkpoint) -> None:
    """Each block's forward becomes a region, as fine-tuning scripts do it."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def generator(number: int) -> torch.Generator:
    """The stream of a batch."""
    return torch.Generator().manual_seed(100 + number)


def _own_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    found = model(**batch)
    return found.logits, found.loss


def _enable(model: Any, checkpoint: Checkpoint) -> None:
    model._set_gradient_checkpointing(gradient_checkpointing_func=functools.partial(checkpoint, use_reentrant=False))


def _tokens(number: int, *, padded: bool = False) -> Batch:
    ids = torch.randint(1, 48, (3, 12), generator=generator(number))
    if not padded:
        return {"input_ids": ids, "labels": ids}
    mask = torch.arange(12) < torch.tensor([[12], [7], [3]])
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def _transformer(model: Any, num_blocks: int, batch: Callable[[int], Batch] = _tokens) -> Case:
    model.train()
    return Case(model, batch, _own_loss, functools.partial(_enable, model), num_blocks)


_DECODER = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "attention_dropout": 0.1,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def gpt2() -> Case:
    """GPT-2 with dropout in embeddings, attention and residuals, through transformers' own switch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return _transformer(GPT2LMHeadModel(config), 2)


def gpt2_wrapped() -> Case:
    """The same model, each block's forward wrapped by hand."""
    case = gpt2()
    blocks = case.model.transformer.h
    return Case(case.model, case.batch, case.loss, lambda checkpoint: wrap(blocks, checkpoint), 2)


def llama() -> Case:
    """Llama with grouped attention and attention dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _transformer(LlamaForCausalLM(LlamaConfig(**_DECODER)), 2)


def qwen3() -> Case:
    """Qwen3: norms of queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _transformer(Qwen3ForCausalLM(Qwen3Config(**_DECODER)), 2)


def gemma3() -> Case:
    """Gemma3: a sliding window in one layer, all in the other."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **_DECODER, sliding_window=4, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    )
    return _transformer(Gemma3ForCausalLM(config), 2)


def mixtral() -> Case:
    """Mixtral: experts are chosen by the data; the router's loss is on."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **_DECODER, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_jitter_noise=0.1
    )
    return _transformer(MixtralForCausalLM(config), 2)


def _encoder(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 48,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        **more,
    }


def bert() -> Case:
    """BERT on rows of three lengths."""
    from transformers import BertConfig, BertForMaskedLM

    return _transformer(BertForMaskedLM(BertConfig(**_encoder())), 2, functools.partial(_tokens, padded=True))


def albert() -> Case:
    """ALBERT: one layer's parameters, three times; the layer is wrapped where transformers has no switch."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(**_encoder(num_hidden_layers=3, embedding_size=8))
    model = AlbertForMaskedLM(config).train()
    groups = model.albert.encoder.albert_layer_groups
    batch = functools.partial(_tokens, padded=True)
    return Case(model, batch, _own_loss, lambda checkpoint: wrap(groups, checkpoint), 3)


def t5() -> Case:
    """T5: a position bias that the first block makes and the others read; every decoder block reads the encoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=48,
        d_model=16,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.1,
        use_cache=False,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return _transformer(T5ForConditionalGeneration(config), 4, functools.partial(_tokens, padded=True))


def vit() -> Case:
    """ViT with dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**{**_encoder(image_size=16, patch_size=4, num_labels=5), "vocab_size": None})

    def images(number: int) -> Batch:
        stream = generator(number)
        return {
            "pixel_values": torch.randn(3, 3, 16, 16, generator=stream),
            "labels": torch.randint(0, 5, (3,), generator=stream),
        }

    return _transformer(ViTForImageClassification(config), 2, images)


def _images(number: int) -> Batch:
    stream = generator(number)
    return {"x": torch.randn(4, 3, 32, 32, generator=stream), "y": torch.randint(0, 5, (4,), generator=stream)}


def _class_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(batch["x"])
    return logits, F.cross_entropy(logits, batch["y"])


def _timm(name: str, kinds: tuple[str, ...], num_blocks: int, **options: Any) -> Case:
    import timm

    model = timm.create_model(name, num_classes=5, drop_rate=0.1, drop_path_rate=0.2, **options).train()
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    return Case(model, _images, _class_loss, lambda checkpoint: wrap(blocks, checkpoint), num_blocks)


def resnet() -> Case:
    """ResNet: BatchNorm, ReLU in place, drop path."""
    return _timm("resnet18", ("BasicBlock",), 8, channels=(4, 8, 8, 16))


def efficientnet() -> Case:
    """EfficientNet: depthwise convolutions, squeeze and excite, BatchNorm, drop path."""
    return _timm("efficientnet_b0", ("DepthwiseSeparableConv", "InvertedResidual"), 16)


def convnext() -> Case:
    """ConvNeXt: LayerNorm, layer scale, drop path."""
    return _timm("convnext_atto", ("ConvNeXtBlock",), 4, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))


LIBRARY: dict[str, Callable[[], Case]] = {
    "gpt2": gpt2,
    "gpt2 wrapped": gpt2_wrapped,
    "llama": llama,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "mixtral": mixtral,
    "bert": bert,
    "albert": albert,
    "t5": t5,
    "vit": vit,
    "resnet": resnet,
    "efficientnet": efficientnet,
    "convnext": convnext,
}
