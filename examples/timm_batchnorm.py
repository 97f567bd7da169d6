"""A timm model with BatchNorm, in two ways: planned inside a budget, and timm's own switch with Keepless behind it.

python examples/timm_batchnorm.py
"""

import timm
import torch
import torch.nn.functional as F

import keepless
from keepless.integrations.timm import set_grad_checkpointing


def train(way: str) -> torch.nn.Module:
    """Three steps; the model after them."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, drop_rate=0.1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(0, 10, (16,))
    if way == "planned":
        # Asked for too little, the refusal says what is needed at least.
        try:
            keepless.plan(
                model, images, "1MiB", optimizer=optimizer, loss_fn=lambda out, _: F.cross_entropy(out, labels)
            )
        except keepless.InfeasibleBudget as error:
            budget = error.smallest_budget
        keepless.fit(
            model,
            images,
            budget,
            optimizer=optimizer,
            loss_fn=lambda out, _: F.cross_entropy(out, labels),
            on_plan=print,
        )
    elif way == "switch":
        set_grad_checkpointing(model)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    if way == "switch":
        set_grad_checkpointing(model, False)
    return keepless.remove(model)


def main() -> None:
    plain = train("plain").state_dict()
    for way in ("planned", "switch"):
        state = train(way).state_dict()
        same = all(torch.equal(state[name], plain[name]) for name in plain)
        print(
            f"{way}: weights and BatchNorm statistics are {'the same bits' if same else 'OTHERS'} as plain training's"
        )


if __name__ == "__main__":
    main()
