"""The models of `tests/cpu/test_any_model.py`, as they are there but for their sizes: steps of 10 to 60 MB, in which a
prediction's error means something. A step of the tests is some hundred KiB, less than what a budget keeps in reserve.

`build(name)` gives a `Case` with the same weights each time; the names are those of the tests.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import keepless
from benchmarks.common import ZOO as _PATH  # the models of the tests are found through it

import any_models  # isort: skip
import checkpoint_models  # isort: skip
import checkpoint_nets  # isort: skip
from checkpoint_models import Batch, Case, generator, wrap  # isort: skip

assert _PATH

ROWS, LENGTH, VOCAB = 8, 96, 512
WIDTH, INNER, LAYERS, HEADS = 128, 320, 3, 4

_DECODER: dict[str, Any] = {
    **checkpoint_models._DECODER,
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": WIDTH // HEADS,
    "max_position_embeddings": LENGTH,
}


def _tokens(number: int, *, padded: bool = False) -> Batch:
    ids = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=generator(number))
    if not padded:
        return {"input_ids": ids, "labels": ids}
    ends = torch.linspace(LENGTH // 4, LENGTH, ROWS).long()
    mask = torch.arange(LENGTH) < ends[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


_padded = functools.partial(_tokens, padded=True)


def _transformer(model: Any, batch: Callable[[int], Batch] = _tokens) -> Case:
    return checkpoint_models._transformer(model, LAYERS, batch)


def _gpt2(**more: Any) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    return _transformer(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **shape, bos_token_id=0, eos_token_id=0, **more)))


def _gpt2_wrapped() -> Case:
    case = _gpt2(use_cache=False)
    blocks = case.model.transformer.h
    return Case(case.model, case.batch, case.loss, lambda checkpoint: wrap(blocks, checkpoint), LAYERS)


def _decoder(kind: str, **more: Any) -> Case:
    import transformers

    names = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}
    config, model = names.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
    return _transformer(getattr(transformers, model)(getattr(transformers, config)(**_DECODER, **more)))


def _gemma3() -> Case:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return _decoder("Gemma3", sliding_window=32, layer_types=kinds, query_pre_attn_scalar=WIDTH // HEADS)


def _mixtral(eager: bool) -> Case:
    from transformers import MixtralConfig, MixtralForCausalLM

    more: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    if not eager:
        more |= {"output_router_logits": True, "router_jitter_noise": 0.1}
    config = MixtralConfig(**_DECODER, **more)
    if eager:
        config._experts_implementation = "eager"
    return _transformer(MixtralForCausalLM(config))


def _encoder(**more: Any) -> dict[str, Any]:
    return checkpoint_models._encoder(
        **{
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": INNER,
            "max_position_embeddings": LENGTH,
            **more,
        }
    )


def _bert() -> Case:
    from transformers import BertConfig, BertForMaskedLM

    return _transformer(BertForMaskedLM(BertConfig(**_encoder())), _padded)


def _albert() -> Case:
    from transformers import AlbertConfig, AlbertForMaskedLM

    model = AlbertForMaskedLM(AlbertConfig(**_encoder(num_hidden_layers=4, embedding_size=64))).train()
    groups = model.albert.encoder.albert_layer_groups
    loss = checkpoint_models._own_loss
    return Case(model, _padded, loss, lambda checkpoint: wrap(groups, checkpoint), 4)


def _t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=INNER,
        num_layers=2,
        num_heads=HEADS,
        dropout_rate=0.1,
        use_cache=False,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return _transformer(T5ForConditionalGeneration(config), _padded)


def _vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**{**_encoder(image_size=64, patch_size=8, num_labels=5), "vocab_size": None})

    def images(number: int) -> Batch:
        stream = generator(number)
        pixels = torch.randn(12, 3, 64, 64, generator=stream)
        return {"pixel_values": pixels, "labels": torch.randint(0, 5, (12,), generator=stream)}

    return _transformer(ViTForImageClassification(config), images)


def _whisper() -> Case:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=40,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        max_source_positions=100,
        max_target_positions=LENGTH,
        dropout=0.1,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )

    def speech(number: int) -> Batch:
        stream = generator(number)
        heard = torch.randn(ROWS, 40, 200, generator=stream)
        return {"input_features": heard, "labels": torch.randint(1, VOCAB, (ROWS, 80), generator=stream)}

    return _transformer(WhisperForConditionalGeneration(config), speech)


def _timm(name: str, kinds: tuple[str, ...], image: int, rows: int, **options: Any) -> Case:
    case = checkpoint_models._timm(name, kinds, 1, **options)

    def images(number: int) -> Batch:
        stream = generator(number)
        pixels = torch.randn(rows, 3, image, image, generator=stream)
        return {"x": pixels, "y": torch.randint(0, 5, (rows,), generator=stream)}

    return Case(case.model, images, case.loss, case.install, case.num_blocks)


class _UNet3d(checkpoint_nets.UNet3d):
    """Wider."""

    def __init__(self) -> None:
        super().__init__()
        widths = [8, 16, 32]
        block = checkpoint_nets._volume_block
        self.encoder = nn.ModuleList(block(a, b) for a, b in itertools.pairwise([1, *widths]))
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2) for a, b in itertools.pairwise(widths))
        self.decoder = nn.ModuleList(block(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv3d(8, 2, 1)


class _Lstm(checkpoint_nets.Lstm):
    """Wider."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"num_layers": 2, "dropout": 0.2, "batch_first": True}
        self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, **options) for _ in range(2))


class _UnrolledCell(checkpoint_nets.UnrolledCell):
    """Wider."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sequences in and out."""
        h = c = x.new_zeros(x.shape[0], WIDTH)
        found = []
        for part in x.split(4, 1):
            out, h, c = self.region(self.chunk, part, h, c)
            found.append(out)
        return torch.cat(found, 1)


class _Gnn(checkpoint_nets.Gnn):
    """Wider."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * WIDTH, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, WIDTH))
            for _ in range(4)
        )


def _gnn() -> Case:
    case = checkpoint_nets.gnn()
    model = _Gnn().train()
    nodes, edges = 1000, 4000

    def batch(number: int) -> Batch:
        stream = generator(number)
        ends = torch.randint(0, nodes, (2, edges), generator=stream)
        mask = torch.rand(edges, generator=stream) > 0.4
        return {"h": torch.randn(nodes, WIDTH, generator=stream), "e": ends, "m": mask}

    return Case(model, batch, case.loss, functools.partial(checkpoint_nets._install, model), 4)


def _widened(model: nn.Module) -> nn.Module:
    """Linear layers of 8 and 16 features become 128 and 512, in place of those that there are."""
    sizes = {8: WIDTH, 16: 4 * WIDTH}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, nn.Linear(sizes[child.in_features], sizes[child.out_features]))
    return model


def _spectral(old: bool) -> nn.Module:
    spectral: Any = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    up, down = spectral(nn.Linear(WIDTH, 4 * WIDTH)), spectral(nn.Linear(4 * WIDTH, WIDTH))
    return nn.Sequential(up, nn.Tanh(), nn.Dropout(0.1), down)


def _blocks(make: Callable[[], nn.Module], count: int) -> Case:
    return checkpoint_nets._case(checkpoint_nets.Blocks(make, count), count, 1024, WIDTH)


def _net(kind: type[any_models.Net], *blocks: type[any_models.Block]) -> Case:
    case = any_models._net(lambda: kind(*blocks))

    def batch(number: int) -> Batch:
        return {"x": torch.randn(16, 128, 8, generator=generator(number))}

    return Case(case.model, batch, case.loss, case.install, case.num_blocks)


_A, _B = any_models, any_models.Block

MODELS: dict[str, Callable[[], Case]] = {
    "gpt2": lambda: _gpt2(use_cache=False),
    "gpt2 wrapped": _gpt2_wrapped,
    "llama": lambda: _decoder("Llama"),
    "qwen3": lambda: _decoder("Qwen3"),
    "gemma3": _gemma3,
    "mixtral": lambda: _mixtral(eager=False),
    "bert": _bert,
    "albert": _albert,
    "t5": _t5,
    "vit": _vit,
    "resnet": lambda: _timm("resnet18", ("BasicBlock",), 64, 16, channels=(16, 32, 64, 128)),
    "efficientnet": lambda: _timm("efficientnet_b0", ("DepthwiseSeparableConv", "InvertedResidual"), 64, 4),
    "convnext": lambda: _timm("convnext_atto", ("ConvNeXtBlock",), 64, 16, depths=(2, 2, 2, 2), dims=(24, 48, 96, 192)),
    "3D U-Net": lambda: checkpoint_nets._case(_UNet3d(), 5, 2, 1, 24, 24, 24),
    "LSTM": lambda: checkpoint_nets._case(_Lstm(), 2, 24, 64, WIDTH),
    "unrolled LSTMCell": lambda: checkpoint_nets._case(_UnrolledCell(), 6, 64, 24, WIDTH),
    "GNN": _gnn,
    "spectral norm": lambda: _blocks(lambda: _spectral(old=False), 3),
    "old spectral norm": lambda: _blocks(lambda: _spectral(old=True), 3),
    "layer drop": lambda: _blocks(lambda: _widened(checkpoint_nets.LayerDrop()), 4),
    "item branch": lambda: _blocks(lambda: _widened(checkpoint_nets.ItemBranch()), 4),
    "print": lambda: _blocks(lambda: _widened(checkpoint_nets.Talks()), 3),
    "mixtral eager experts": lambda: _mixtral(eager=True),
    "gpt2 by default": _gpt2,
    "whisper": _whisper,
    "dict": lambda: _net(_A.Net, _B, _B),
    "break between blocks": lambda: _net(_A.Between, _B, _B, _B),
    "break inside a block": lambda: _net(_A.Between, _B, _A.Looks, _B),
    "break inside all blocks": lambda: _net(_A.Net, _A.Looks, _A.Looks, _A.Looks),
    "dataclass": lambda: _net(_A.Dataclasses, _B, _B, _B),
    "dataclasses between blocks": lambda: _net(_A.Inner, _A.Wraps, _A.Wraps, _A.Wraps),
    "blocks twice": lambda: _net(_A.Again, _B, _B),
    "blocks left out": lambda: _net(_A.Drops, _B, _B, _B, _B),
    "skips": lambda: _net(_A.Skips, _B, _B),
}
"""By the names of the tests."""


def seed(number: int) -> None:
    """All the streams that these models draw from."""
    torch.manual_seed(number)
    random.seed(number)


def build(name: str) -> Case:
    """A model with the same weights each time."""
    seed(0)
    return MODELS[name]()


class _Noted(Exception):
    """The call is known."""


def call_of(case: Case) -> keepless.Inputs:
    """How a case's loss calls its model, on batch 0."""
    calls: list[keepless.Inputs] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(keepless.Inputs(*args, **kwargs))
        raise _Noted

    handle = case.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        case.loss(case.model, case.batch(0))
    except _Noted:
        pass
    finally:
        handle.remove()
    return calls[0]


def loss_fn_of(case: Case) -> Callable[[Any, Any], torch.Tensor]:
    """The case's loss as `keepless.plan` takes it."""
    batch = case.batch(0)

    def loss_fn(output: Any, _: Any) -> torch.Tensor:
        return case.loss(lambda *args, **kwargs: output, batch)[1]  # type: ignore[arg-type]

    return loss_fn
