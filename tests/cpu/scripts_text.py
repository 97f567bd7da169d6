"""Training scripts that know nothing of Keepless; tests write them into their folders and run them both ways."""

NETS = """
import hashlib
import sys

import torch


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(4 * width, width)
        )
        self.norm = torch.nn.BatchNorm1d(width)

    def forward(self, x):
        return x + self.inner(self.norm(x))


class Net(torch.nn.Module):
    def __init__(self, out=16):
        super().__init__()
        self.blocks = torch.nn.Sequential(*[Block(32) for _ in range(3)])
        self.head = torch.nn.Linear(32, out)

    def forward(self, x):
        return self.head(self.blocks(x))


def digest(*models):
    found = hashlib.sha256()
    for model in models:
        for tensor in model.state_dict().values():
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()
"""

TRAIN = (
    "from nets import *\n"
    + """
def main():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        x, y = torch.randn(256, 32), torch.randint(0, 16, (256,))
        optimizer.zero_grad()
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(step, loss.item().hex())
        if step == 2:
            model.eval()
            with torch.no_grad():
                print("evaluation", model(x).sum().item().hex())
            model.train()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "middle.pt")
            state = torch.load("middle.pt", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
    print(digest(model), torch.rand(1).item(), sys.argv, __name__)


if __name__ == "__main__":
    main()
"""
)

ADVERSARIES = (
    "from nets import *\n"
    + """
class Maker(Net):
    pass


class Judge(Net):
    pass


torch.manual_seed(0)
maker, judge = Maker(32), Judge(1)
first = torch.optim.Adam(maker.parameters(), lr=1e-3)
second = torch.optim.SGD(judge.parameters(), lr=1e-3)
for step in range(5):
    noise, real = torch.randn(64, 32), torch.randn(64, 32)
    made = maker(noise)
    second.zero_grad()
    loss = (judge(real).sigmoid() - 1).square().mean() + judge(made.detach()).sigmoid().square().mean()
    loss.backward()
    second.step()
    first.zero_grad()
    fooled = (judge(made).sigmoid() - 1).square().mean()
    fooled.backward()
    first.step()
    print(loss.item().hex(), fooled.item().hex())
print(digest(maker, judge), torch.rand(1).item())
"""
)

HOOKS = (
    "from nets import *\n"
    + """
torch.manual_seed(0)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
calls = []


def look(gradient):
    calls.append(gradient.norm().item().hex())
    return gradient.clamp(-0.01, 0.01)


for parameter in model.parameters():
    parameter.register_hook(look)
for step in range(3):
    x, y = torch.randn(256, 32), torch.randint(0, 16, (256,))
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y) + 1e-2 * model.head.weight.square().sum()
    loss.backward()
    optimizer.step()
print(len(calls), *sorted(calls))
print(digest(model))
"""
)
"""Hooks that change the gradients of parameters, one of which the loss reads, too."""

WORDS = (
    "from nets import *\n"
    + """
class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(512, 32)
        self.blocks = torch.nn.Sequential(*[Block(32) for _ in range(2)])
        self.head = torch.nn.Linear(32, 512)

    def forward(self, words, labels):
        logits = self.head(self.blocks(self.embed(words)))
        return torch.nn.functional.cross_entropy(logits, labels), logits


torch.manual_seed(0)
model = Words()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(3):
    words, labels = torch.randint(0, 512, (512,)), torch.randint(0, 512, (512,))
    optimizer.zero_grad()
    outputs = [model(words, labels) for call in range(len(sys.argv))]
    loss = sum(output[0] for output in outputs)
    loss.backward()
    optimizer.step()
    print(step, loss.item().hex())
print(digest(model))
"""
)
"""The loss of a wide head in the model, called once and once more for each argument; its outputs stand until those of
the next step do."""

LATE = """
import sys

import torch

torch.manual_seed(0)
sizes = ((64, 256), (256, 256), (256, 32))
net = torch.nn.Sequential(
    *[part for a, b in sizes for part in (torch.nn.Linear(a, b), torch.nn.GELU(), torch.nn.Dropout(0.1))]
)
optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
for step in range(3):
    views = [net(torch.randn(1024, 64)) for call in range(len(sys.argv))]
    loss = sum(view.square().mean() for view in views)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, loss.item().hex())
"""
"""Views of a batch, one and one more for each argument; gradients are reset between them and the backward."""

ODD = (
    "from nets import *\n"
    + """
class Looks(Net):
    def forward(self, x, scale):
        for block in self.blocks:
            x = block(x)
            assert x.sum().item() < 1e9
        y = self.head(x) * scale
        return {"loss": y.square().mean(), "aside": (y, x)}


torch.manual_seed(0)
model = Looks()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
scale = torch.ones((), requires_grad=True)
for step in range(4):
    x = torch.randn(128, 32, requires_grad=True)
    out = model(x, scale)
    loss = out["loss"]
    loss /= 2
    loss.backward(retain_graph=step == 0)
    if step == 0:
        loss.backward()
    if step % 2:
        optimizer.step()
        optimizer.zero_grad()
    print(loss.item().hex(), x.grad.sum().item().hex(), scale.grad.item().hex())
print(digest(model), torch.rand(1).item())
"""
)

PENALTY = (
    "from nets import *\n"
    + """
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
for step in range(3):
    x = torch.randn(64, 32, requires_grad=True)
    slope, = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    optimizer.zero_grad()
    loss = (slope.norm(dim=1) - 1).square().mean()
    loss.backward()
    optimizer.step()
    print(loss.item().hex())
print(digest(model))
"""
)

FOREIGN = (
    "from nets import *\n"
    + """
class Prompted(Net):
    def forward(self, x):
        return super().forward(x + self.prompt[0])


torch.manual_seed(0)
model = Prompted()
model.prompt = [torch.zeros(32, requires_grad=True)]
optimizer = torch.optim.SGD([*model.parameters(), model.prompt[0]], lr=1e-2)
for step in range(2):
    optimizer.zero_grad()
    model(torch.randn(64, 32)).square().mean().backward()
    optimizer.step()
print(digest(model), model.prompt[0].sum().item().hex())
"""
)
