"""A module of factories, as a user of the command line has one; tests write it into their folders."""

FACTORIES = """
import torch


def loss_of(output, batch):
    return (output ** 2).mean()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(
            *[torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Dropout(0.1),
                                  torch.nn.Linear(256, 64)) for _ in range(4)])

    def forward(self, x):
        return (self.blocks(x) ** 2).mean()


def tiny():
    return Net(), torch.randn(512, 64)


class Looks(Net):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            assert x.sum().item() < 1e9
        return (x ** 2).mean()


def looks():
    return Looks(), torch.randn(512, 64)


def own_loss():
    return torch.nn.Linear(8, 8), torch.randn(4, 8), loss_of


def frozen():
    return torch.nn.Linear(8, 1).requires_grad_(False), torch.randn(4, 8), loss_of


def sized(batch_size=64, depth=2):
    layers = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(depth)]
    return torch.nn.Sequential(*layers), torch.randn(batch_size, 64), loss_of


def noisy():
    print("a factory that prints")
    return tiny()


def broken():
    raise RuntimeError("the factory is broken")


def wrong():
    return 3


number = 7
"""
