"""A plain loop: a small transformer with dropout and AdamW, on text of Python's standard library, inside a budget.

python examples/plain_loop.py
"""

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn

import keepless

LENGTH, ROWS, STEPS = 64, 8, 5


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        rows, length, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        x = x + F.dropout(self.out(mixed.reshape(rows, length, width)), 0.1, self.training)
        return x + self.mlp(self.norms[1](x))


class Characters(nn.Module):
    """Predicts the next character; gives the loss where it is told which they were."""

    def __init__(self, num_characters: int, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(num_characters, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.head = nn.Linear(width, num_characters)

    def forward(self, tokens, targets):
        h = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        return F.cross_entropy(self.head(self.blocks(h)).flatten(0, 1), targets.flatten())


def batches():
    """Rows of the topics of pydoc, as numbers of characters."""
    text = "".join(topics[name] for name in sorted(topics))
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    data = torch.tensor([known[character] for character in text[: STEPS * ROWS * LENGTH + 1]])
    rows = zip(data[:-1].split(ROWS * LENGTH), data[1:].split(ROWS * LENGTH), strict=True)
    return len(known), [(tokens.view(ROWS, LENGTH), targets.view(ROWS, LENGTH)) for tokens, targets in rows]


def train(share: float | None) -> tuple[torch.nn.Module, list[float]]:
    """Some steps: plain, or within this share of what lies between the smallest budget and everything kept."""
    torch.manual_seed(0)
    num_characters, data = batches()
    model = Characters(num_characters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if share is not None:
        needs = keepless.estimate(model, data[0], optimizer=optimizer)
        budget = int(needs.smallest_budget + share * (needs.plain_budget - needs.smallest_budget))
        keepless.fit(model, data[0], budget, optimizer=optimizer, on_plan=print)
    losses = []
    for tokens, targets in data:
        optimizer.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return keepless.remove(model), losses


def main() -> None:
    plain, losses = train(None)
    planned, planned_losses = train(0.3)
    others = planned.state_dict()
    same = losses == planned_losses and all(torch.equal(one, others[name]) for name, one in plain.state_dict().items())
    print(f"losses {', '.join(f'{loss:.3f}' for loss in planned_losses)}")
    print(f"losses and weights are {'the same bits' if same else 'OTHERS'} as plain training's")


if __name__ == "__main__":
    main()
