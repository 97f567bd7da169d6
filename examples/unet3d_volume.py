"""A 3D U-Net with BatchNorm on one volume: batch 1, and a patch that cannot be made smaller, inside a budget.

python examples/unet3d_volume.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import keepless

SIDE, STEPS = 24, 3


def pair(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, each with its statistics."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv3d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, width: int = 8, num_classes: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList([pair(1, width), pair(width, 2 * width)])
        self.bottom = pair(2 * width, 4 * width)
        self.raise_ = nn.ModuleList(
            [nn.ConvTranspose3d(4 * width, 2 * width, 2, 2), nn.ConvTranspose3d(2 * width, width, 2, 2)]
        )
        self.up = nn.ModuleList([pair(4 * width, 2 * width), pair(2 * width, width)])
        self.head = nn.Conv3d(width, num_classes, 1)

    def forward(self, volume):
        h, skips = volume, []
        for block in self.down:
            h = block(h)
            skips.append(h)
            h = F.max_pool3d(h, 2)
        h = self.bottom(h)
        for enlarge, block in zip(self.raise_, self.up, strict=True):
            h = block(torch.cat([enlarge(h), skips.pop()], 1))
        return self.head(F.dropout3d(h, 0.1, self.training))


def train(planned: bool) -> nn.Module:
    """Some steps on a ball in noise."""
    torch.manual_seed(0)
    model = UNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    axis = torch.linspace(-1, 1, SIDE)
    radius = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).norm(dim=0)
    labels = ((radius < 0.7).long() + (radius < 0.4).long())[None]
    volume = labels[:, None].float() + 0.3 * torch.randn(1, 1, SIDE, SIDE, SIDE)
    if planned:

        def loss_fn(scores, _):
            return F.cross_entropy(scores, labels)

        needs = keepless.estimate(model, volume, optimizer=optimizer, loss_fn=loss_fn)
        budget = needs.smallest_budget + (needs.plain_budget - needs.smallest_budget) // 4
        keepless.fit(model, volume, budget, optimizer=optimizer, loss_fn=loss_fn, on_plan=print)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(volume), labels).backward()
        optimizer.step()
    return keepless.remove(model)


def main() -> None:
    plain, planned = train(planned=False).state_dict(), train(planned=True).state_dict()
    same = all(torch.equal(planned[name], plain[name]) for name in plain)
    print(f"weights and BatchNorm statistics are {'the same bits' if same else 'OTHERS'} as plain training's")


if __name__ == "__main__":
    main()
