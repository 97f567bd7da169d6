"""The deciding meter: known programs to the byte, and two methods that share nothing against each other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from keepless.errors import MeasureError
from keepless.measure import interposer, measure_peak

MIB = 2**20
Step = Callable[[], dict[str, Any] | None]


def known(held_mib: int) -> Step:
    """Holds a block; each step makes 8 MiB, frees it, makes 4 MiB twice, and leaks 1 MiB."""
    held = torch.empty(held_mib * MIB, dtype=torch.uint8)
    leaked: list[torch.Tensor] = []

    def step() -> dict[str, Any]:
        first = torch.empty(8 * MIB, dtype=torch.uint8)
        del first
        second = [torch.empty(4 * MIB, dtype=torch.uint8) for _ in range(2)]
        leaked.append(torch.empty(MIB, dtype=torch.uint8))
        return {"held": held.numel(), "blocks": len(second)}

    return step


class _Block(torch.nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(dim), torch.nn.LayerNorm(dim)
        self.qkv, self.out = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)
        self.up, self.down = torch.nn.Linear(dim, 4 * dim), torch.nn.Linear(4 * dim, dim)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        parts = self.qkv(self.norm1(x)).split(dim, 2)
        q, k, v = (part.view(batch, length, self.num_heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, dim)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


def gpt(num_layers: int = 2, dim: int = 128, vocab: int = 2048) -> Step:
    """A small transformer trained with AdamW; answers the loss and a hash of the parameters."""
    torch.manual_seed(0)
    blocks = [_Block(dim, 4) for _ in range(num_layers)]
    model = torch.nn.Sequential(torch.nn.Embedding(vocab, dim), *blocks, torch.nn.Linear(dim, vocab))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, vocab, (4, 128))

    def step() -> dict[str, Any]:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        digest = hashlib.sha256()
        for param in model.parameters():
            digest.update(param.detach().numpy().tobytes())
        return {"loss": loss.item(), "parameters": digest.hexdigest()}

    return step


def conv() -> Step:
    """A small convolution net with batch norm, trained with momentum."""
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(0, 10, (8,))

    def step() -> dict[str, Any]:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    return step


def failing() -> Step:
    """A target with a mistake in it."""
    raise RuntimeError("no bananas")


def endless() -> Step:
    """A step that does not end."""

    def step() -> None:
        while True:
            pass

    return step


def _needs_interposer() -> None:
    reason = interposer.available()
    if reason is not None:
        if os.environ.get(interposer.REQUIRE) == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.mark.slow
def test_known_program_is_exact() -> None:
    """Sizes that can be added by hand come back to the byte, the answer of the last step with them."""
    found = measure_peak(f"{__name__}:known", {"held_mib": 3}, steps=2)
    assert found.static_nbytes == 3 * MIB
    assert found.build_peak == 3 * MIB
    assert found.starts == (3 * MIB, 4 * MIB)
    assert found.peaks == (12 * MIB, 13 * MIB)
    assert found.ends == (4 * MIB, 5 * MIB)
    assert found.peak == 13 * MIB
    assert found.method == "profiler"
    assert found.result == {"held": 3 * MIB, "blocks": 2}


@pytest.mark.slow
def test_interposer_counts_torch_blocks() -> None:
    """The interposer sees torch's aligned allocations, to a page per block."""
    _needs_interposer()
    found = measure_peak(f"{__name__}:known", {"held_mib": 3}, method="interposer", steps=2)
    assert found.static_nbytes == pytest.approx(3 * MIB, abs=64 * 1024)
    assert found.peaks == pytest.approx((12 * MIB, 13 * MIB), abs=64 * 1024)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gpt", "conv"])
def test_methods_agree(target: str) -> None:
    """Above the start of a warm step, the profiler and the interposer agree within 0.5 %, and the training is equal."""
    _needs_interposer()
    one = measure_peak(f"{__name__}:{target}", method="profiler")
    two = measure_peak(f"{__name__}:{target}", method="interposer")
    for step in (1, 2):
        rise = one.peaks[step] - one.starts[step]
        assert rise > 4 * MIB
        assert two.peaks[step] - two.starts[step] == pytest.approx(rise, rel=0.005)
    assert one.result == two.result
    # Levels differ by what is no tensor: Python's large objects, and the buffers that MKL keeps.
    assert 0 <= two.peak - one.peak < 48 * MIB


@pytest.mark.slow
def test_failures_are_told() -> None:
    """A mistake in the target, a target that does not exist, and one that does not end are typed errors."""
    with pytest.raises(MeasureError, match="no bananas"):
        measure_peak(f"{__name__}:failing")
    with pytest.raises(MeasureError, match="more than 5 seconds"):
        measure_peak(f"{__name__}:endless", timeout=5)
    with pytest.raises(MeasureError, match="unknown"):
        measure_peak(f"{__name__}:known", method="guess")
    with pytest.raises(MeasureError, match="at least one"):
        measure_peak(f"{__name__}:known", steps=0)


def test_interposer_without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """Without a compiler the interposer gives its reason."""
    monkeypatch.setenv("KEEPLESS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "compiler" in str(interposer.available())
