"""KFAC in Lightning: `configure_optimizers` returns it, and nothing else changes.

``pip install lightning``. With automatic optimization Lightning passes a closure that computes the
loss; the hooks of KFAC are on the network and on the loss module, wherever these are called.
"""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from train_digits import build_network, evaluate, split_digits

from einconv_kfac import KFAC


class Classifier(LightningModule):  # type: ignore[misc]
    """A network and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build_network(seed=0)
        self.loss_fn = nn.CrossEntropyLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss on a batch."""
        x, y = batch
        loss: Tensor = self.loss_fn(self.network(x), y)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return KFAC(self.network, self.loss_fn)


def main(epochs: int = 5) -> float:
    """Train on the digits; print and return the test accuracy."""
    torch.manual_seed(0)
    data, module = split_digits(seed=0), Classifier()
    loader = DataLoader(TensorDataset(data.x, data.y), 448, shuffle=True, drop_last=True)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    _, accuracy = evaluate(module.network, data)
    print(f"test accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
