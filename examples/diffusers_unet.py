"""A denoising step of a small conditional UNet of diffusers, random weights, inside a memory budget.

python examples/diffusers_unet.py
"""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel

import keepless


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        dropout=0.1,
    ).train()


def train(budget: float | None) -> torch.nn.Module:
    """Three steps; the model after them.

    Arguments:
        budget: as a share of what plain training needs; None to train plainly.
    """
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = DDPMScheduler()
    latents, text = torch.randn(4, 4, 16, 16), torch.randn(4, 8, 32)
    noise = torch.randn_like(latents)
    if budget is not None:
        times = torch.zeros(4, dtype=torch.int64)
        batch = keepless.Inputs(latents, times, text, return_dict=False)
        options = {"optimizer": optimizer, "loss_fn": lambda out, _: F.mse_loss(out[0], noise)}
        needed = keepless.estimate(model, batch, **options).plain_budget
        keepless.fit(model, batch, int(budget * needed), on_plan=print, **options)
    for _ in range(3):
        times = torch.randint(0, 1000, (4,))
        noisy = scheduler.add_noise(latents, noise, times)
        optimizer.zero_grad()
        F.mse_loss(model(noisy, times, text, return_dict=False)[0], noise).backward()
        optimizer.step()
    return keepless.remove(model)


def main() -> None:
    plain, planned = train(None).state_dict(), train(0.8).state_dict()
    same = all(torch.equal(planned[name], plain[name]) for name in plain)
    print(f"weights after three steps are {'the same bits' if same else 'OTHERS'} as plain training's")


if __name__ == "__main__":
    main()
