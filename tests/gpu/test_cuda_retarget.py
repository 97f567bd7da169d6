"""The table from ops captured on the CPU to CUDA's, against what is captured on a card."""

from __future__ import annotations

from collections import Counter

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from keepless.capture import Inputs, StepShape, flatten_inputs, lower, trace_step  # noqa: E402
from keepless.capture.target import Target, TargetFaking  # noqa: E402
from keepless.control.works import works_of  # noqa: E402
from keepless.cost import find_device  # noqa: E402
from keepless.errors import DeviceError  # noqa: E402
from keepless.ir import Graph, Kind  # noqa: E402
from keepless.passes import retarget  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = 2048
"""Bytes below which values are not compared: generator states and numbers that torch keeps on the host or wraps."""


class Attention(nn.Module):
    """A transformer's block with dropout everywhere."""

    def __init__(self, heads: int = 4, width: int = 256) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)
        return F.dropout(self.out(y.transpose(1, 2).flatten(2)), 0.1).float().pow(2).mean()


class Convolutions(nn.Module):
    """Convolution, BatchNorm, pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            self.head(self.body(x).mean((2, 3))), torch.zeros(len(x), dtype=torch.long, device=x.device)
        )


class Words(nn.Module):
    """An embedding with many indices, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(1000, 128), nn.LayerNorm(128), nn.Linear(128, 1000)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.norm(self.table(words))).flatten(0, 1), words.flatten())


CASES = {
    "attention, float32": (Attention, lambda: torch.randn(4, 64, 256), torch.float32),
    "attention, bfloat16": (Attention, lambda: torch.randn(4, 64, 256), torch.bfloat16),
    "attention, float16": (Attention, lambda: torch.randn(4, 64, 256), torch.float16),
    "convolutions": (Convolutions, lambda: torch.randn(8, 3, 32, 32), torch.float32),
    "words, bfloat16": (Words, lambda: torch.randint(0, 1000, (8, 512)), torch.bfloat16),
}


def graph_of(model: nn.Module, x: torch.Tensor, target: Target | None = None) -> Graph:
    flat = flatten_inputs(Inputs(x))
    faking = None if target is None else TargetFaking(torch.device("cpu"), target)
    traced = trace_step(model, flat, batch=x, loss_fn=None, grad_outputs=None, faking=faking)
    binding = lower(traced, flat, model, StepShape())
    if target is None:
        return binding.graph
    name = torch.cuda.get_device_name()
    try:
        device = find_device(name)
    except DeviceError:
        device = find_device("rtx4090")
    return retarget(binding.graph, works_of(binding), device).graph


def sizes(graph: Graph) -> Counter[tuple[str, int]]:
    """Name of the op and bytes, rounded as the allocator does, of each value that matters."""
    found: Counter[tuple[str, int]] = Counter()
    for op in graph.ops:
        for value in op.outputs:
            nbytes = -(-graph.values[value].nbytes // 512) * 512
            known = graph.values[value]
            if nbytes > SMALL and known.kind is not Kind.RNG and not known.name.endswith(".reserve"):
                found[op.name.removesuffix(".default").replace("keepless.cudnn", "aten.cudnn"), nbytes] += 1
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_table_gives_what_a_card_captures(case: str) -> None:
    make, batch, dtype = CASES[case]
    torch.manual_seed(0)
    model, x = make().to(dtype), batch()
    x = x.to(dtype) if x.is_floating_point() else x
    there = graph_of(model, x, Target(torch.cuda.get_device_capability()))
    here = graph_of(model.cuda(), x.cuda())
    missing, extra = sizes(here) - sizes(there), sizes(there) - sizes(here)
    assert not missing, f"a card has these, and the table has not: {missing}; the table has: {extra}"
    assert not extra, f"the table has these, and a card has not: {extra}"


def test_autocast_by_cuda_s_lists() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 64, 256)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        there = graph_of(model, x, Target(torch.cuda.get_device_capability()))
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        here = graph_of(model.cuda(), x.cuda())
    assert sizes(there) == sizes(here)
