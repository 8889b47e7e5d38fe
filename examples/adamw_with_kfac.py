"""Keep AdamW, and put ``KFACPreconditioner`` in front of it.

Before AdamW's step, the preconditioner replaces the gradients of layers with Kronecker factors by
preconditioned ones. AdamW normalises these entry by entry, so the curvature affects only their
direction. Tune ``damping`` and AdamW's learning rate together.
"""

from __future__ import annotations

from itertools import islice

from torch import nn
from torch.optim import AdamW
from train_digits import batches, build_network, evaluate, split_digits

from einconv_kfac import KFACPreconditioner


def train(steps: int, *, precondition: bool) -> float:
    """Train with AdamW, and return the test accuracy."""
    data, model, loss_fn = split_digits(seed=0), build_network(seed=0), nn.CrossEntropyLoss()
    preconditioner = KFACPreconditioner(model, loss_fn, damping=0.03)
    adamw = AdamW(model.parameters(), lr=3e-3)
    for x, y in islice(batches(data, batch_size=448, seed=0), steps):
        adamw.zero_grad()
        loss_fn(model(x), y).backward()
        if precondition:
            preconditioner.step()
        adamw.step()
    _, accuracy = evaluate(model, data)
    return accuracy


def main(steps: int = 30) -> dict[str, float]:
    """Train without and with the preconditioner; print and return the test accuracies."""
    accuracies = {
        "AdamW": train(steps, precondition=False),
        "AdamW behind K-FAC": train(steps, precondition=True),
    }
    for name, accuracy in accuracies.items():
        print(f"{name}: test accuracy {accuracy:.1%} after {steps} steps")
    return accuracies


if __name__ == "__main__":
    main()
