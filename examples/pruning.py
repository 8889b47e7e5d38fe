"""Prune a trained network by the diagonal of its Gauss-Newton matrix.

Removing the weight `w` changes the loss by about `w^2 G / 2` for its diagonal entry `G` (optimal
brain damage, LeCun et al., 1990). A network trained on digits loses the weights with the smallest
such saliency, the smallest magnitude, or random ones, and is not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from train_digits import Split, batches, build_network, evaluate, split_digits

from einconv_kfac import KFAC, kronecker_factors

SHARES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)  # of weights that are removed


def trained(data: Split, steps: int, seed: int) -> nn.Module:
    """Return a network trained by KFAC."""
    model, loss_fn = build_network(seed), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn)
    for x, y in islice(batches(data, 448, seed), steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    optimizer.remove_hooks()
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights, without the biases, which stay."""
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}


def gauss_newton_diagonal(model: nn.Module, data: Split) -> dict[str, Tensor]:
    """Return the exact diagonal, averaged over the training images."""
    curvature = kronecker_factors(
        model, nn.CrossEntropyLoss(), [(data.x, data.y)], fisher="exact", kind="diagonal"
    )
    return curvature.diagonal()


def scores(model: nn.Module, data: Split, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return how much each weight matters, by each of three rules."""
    diagonal, generator = gauss_newton_diagonal(model, data), torch.Generator().manual_seed(seed)
    kept = weights(model)
    return {
        "Gauss-Newton": {name: w.square() * diagonal[name] / 2 for name, w in kept.items()},
        "magnitude": {name: w.abs() for name, w in kept.items()},
        "random": {name: torch.rand(w.shape, generator=generator) for name, w in kept.items()},
    }


@torch.no_grad()
def pruned_accuracy(model: nn.Module, score: dict[str, Tensor], share: float, data: Split) -> float:
    """Return the test accuracy without the given share of weights; the model stays as it is."""
    state = {name: w.clone() for name, w in model.state_dict().items()}
    count = round(share * sum(s.numel() for s in score.values()))
    if count:
        threshold = torch.cat([s.flatten() for s in score.values()]).kthvalue(count).values
        for name, weight in weights(model).items():
            weight[score[name] <= threshold] = 0
    _, accuracy = evaluate(model, data)
    model.load_state_dict(state)
    return accuracy


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Save the accuracies over the share of removed weights."""
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, accuracies in curves.items():
        axes.plot(SHARES, accuracies, marker="o", label=name)
    axes.set(xlabel="share of weights removed", ylabel="test accuracy")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Run the example, and return the accuracies that it prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="training steps (60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (0)")
    parser.add_argument("--output", type=Path, help="write a picture")
    options = parser.parse_args(arguments)
    data = split_digits(options.seed)
    model = trained(data, options.steps, options.seed)
    curves = {
        name: [pruned_accuracy(model, score, share, data) for share in SHARES]
        for name, score in scores(model, data, options.seed).items()
    }
    print("removed      ", *(f"{share:7.0%}" for share in SHARES))
    for name, accuracies in curves.items():
        print(f"{name:13}", *(f"{accuracy:7.1%}" for accuracy in accuracies))
    if options.output:
        draw(curves, options.output)
    return curves


if __name__ == "__main__":
    main()
