"""Fine-tune a network with one optimizer: some layers are frozen first, and unfrozen later.

A network trained on the digits below 5 gets a new head for all ten. Its first convolutions are
frozen at first. `KFAC` covers them from the first step after they are unfrozen.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from train_digits import Run, Split, batches, build_network, evaluate, split_digits, train_epoch

from einconv_kfac import KFAC

BATCH_SIZE = 224


def train(model: nn.Module, optimizer: KFAC, loss_fn: nn.Module, data: Split, epochs: int) -> float:
    """Train for ``epochs`` epochs, and return the test accuracy."""
    run = Run(steps_per_epoch=len(data.x) // BATCH_SIZE)
    stream = batches(data, BATCH_SIZE, seed=0)
    for _ in range(epochs):
        train_epoch(model, loss_fn, optimizer, stream, run)
    _, accuracy = evaluate(model, data)
    return accuracy


def main(epochs: int = 3) -> dict[str, float]:
    """Pre-train and fine-tune; print and return the test accuracies."""
    data, model, loss_fn = split_digits(seed=0), build_network(seed=0), nn.CrossEntropyLoss()
    few, few_test = data.y < 5, data.y_test < 5
    known = Split(data.x[few], data.y[few], data.x_test[few_test], data.y_test[few_test])
    pretraining = KFAC(model, loss_fn)
    accuracies = {"pre-training": train(model, pretraining, loss_fn, known, epochs)}
    pretraining.remove_hooks()

    model[7] = nn.Linear(512, 10)
    model[:4].requires_grad_(False)
    some = replace(data, x=data.x[:448], y=data.y[:448])
    optimizer = KFAC(model, loss_fn, params=model.parameters())
    print(optimizer.coverage())
    accuracies["frozen"] = train(model, optimizer, loss_fn, some, epochs)
    model.requires_grad_(True)
    accuracies["unfrozen"] = train(model, optimizer, loss_fn, some, epochs)
    for name, accuracy in accuracies.items():
        print(f"{name}: test accuracy {accuracy:.1%}")
    return accuracies


if __name__ == "__main__":
    main()
