"""Switch a training script from SGD to KFAC, by changing three lines.

The change:

.. code-block:: diff

   +from einconv_kfac import KFAC
   -optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True)
   +optimizer = KFAC(model, loss_fn)

The loop, its schedulers and its checkpoints stay as they are. The script below trains on
handwritten digits with either optimizer.
"""

from __future__ import annotations

from itertools import islice

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from train_digits import batches, build_network, evaluate, split_digits

from einconv_kfac import KFAC


def train(name: str, steps: int) -> float:
    """Train with the named optimizer, and return the test accuracy."""
    data, model, loss_fn = split_digits(seed=0), build_network(seed=0), nn.CrossEntropyLoss()
    optimizer: Optimizer
    if name == "SGD":
        optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    else:
        optimizer = KFAC(model, loss_fn)
    scheduler = CosineAnnealingLR(optimizer, steps)
    for x, y in islice(batches(data, batch_size=448, seed=0), steps):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
    _, accuracy = evaluate(model, data)
    return accuracy


def main(steps: int = 45) -> dict[str, float]:
    """Train with both; print and return the test accuracies."""
    accuracies = {name: train(name, steps) for name in ("SGD", "KFAC")}
    for name, accuracy in accuracies.items():
        print(f"{name}: test accuracy {accuracy:.1%} after {steps} steps")
    return accuracies


if __name__ == "__main__":
    main()
