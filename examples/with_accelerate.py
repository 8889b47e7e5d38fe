"""KFAC under Accelerate, with gradient accumulation: what `prepare` returns is used as usual.

``pip install accelerate``. KFAC gets the model before `prepare`, whose wrapper is a copy of no
weights; the optimizer that `prepare` returns steps only where gradients are complete.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from train_digits import build_network, evaluate, split_digits

from einconv_kfac import KFAC


def main(epochs: int = 5) -> float:
    """Train on the digits; print and return the test accuracy."""
    data, loss_fn = split_digits(seed=0), nn.CrossEntropyLoss()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build_network(seed=0)
    optimizer = KFAC(model, loss_fn)
    loader = DataLoader(TensorDataset(data.x, data.y), 224, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(loss_fn(model(x), y))
                optimizer.step()
    _, accuracy = evaluate(accelerator.unwrap_model(model), data)
    print(f"test accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
