"""A LightningModule trained inside a memory budget, by one callback.

python examples/lightning_module.py
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from keepless.integrations.lightning import KeeplessCallback


class Classifier(L.LightningModule):
    """Written as any other: Keepless plans the module that training_step calls."""

    def __init__(self, width: int = 128, depth: int = 6) -> None:
        super().__init__()
        blocks = [(nn.Linear(width, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(0.1)) for _ in range(depth)]
        self.net = nn.Sequential(*(layer for block in blocks for layer in block), nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(2048, 128), torch.randint(0, 10, (2048,)))
    loader = DataLoader(data, batch_size=512, shuffle=True)
    callback = KeeplessCallback(budget="5MiB", release_outputs=True, release_gradients=True)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader, DataLoader(data, batch_size=512))
    print(callback.plan)
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
