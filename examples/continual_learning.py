"""Learn one task after the other without forgetting, with the curvature of the earlier ones.

The tasks are the digits under a fixed permutation of pixels each. After a task, its Kronecker
factors are pooled with those of the tasks before. While the next one is learned, moving the weights
by `d` from where they were costs `strength d K d / 2` (Kronecker-factored online Laplace
approximation, Ritter et al., 2018). The script compares with no penalty, and with a penalty on the
distance `strength d d / 2` alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from train_digits import Split, batches, evaluate, split_digits

from einconv_kfac import kronecker_factors
from einconv_kfac.curvature import KroneckerFactors, pooled

Weights = dict[str, Tensor]
Pull = Callable[[Weights], Weights]  # from a change of the weights to the gradient of the penalty
DISTANCE, CURVATURE = 0.03, 10.0  # strengths: the best of powers of ten and three times these


def no_pull(curvature: KroneckerFactors, count: int) -> Pull | None:
    """Return no penalty."""
    return None


def pull_by_distance(curvature: KroneckerFactors, count: int) -> Pull:
    """Return the gradient of half of the squared distance, for each earlier task."""
    return lambda change: {name: DISTANCE * count * d for name, d in change.items()}


def pull_by_curvature(curvature: KroneckerFactors, count: int) -> Pull:
    """Return the gradient of the quadratic form of the pooled curvature, for each earlier task."""
    return (curvature * (CURVATURE * count)).__matmul__


PENALTIES = {"none": no_pull, "distance": pull_by_distance, "curvature": pull_by_curvature}


def tasks(count: int, seed: int) -> list[Split]:
    """Return the digits with their pixels in another order in each task, as rows of 64."""
    data, generator = split_digits(seed), torch.Generator().manual_seed(seed)
    x, x_test = data.x.flatten(1), data.x_test.flatten(1)
    orders = [torch.randperm(64, generator=generator) for _ in range(count)]
    return [Split(x[:, order], data.y, x_test[:, order], data.y_test) for order in orders]


def build_network(seed: int) -> nn.Sequential:
    """Return a network of two layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


def learn(model: nn.Module, data: Split, pull: Pull | None, steps: int, seed: int) -> None:
    """Train on one task; the gradient of the penalty is added to that of the loss."""
    loss_fn, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=3e-3)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for x, y in islice(batches(data, 128, seed), steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        if pull is not None:
            change = {name: p.detach() - start[name] for name, p in model.named_parameters()}
            for name, gradient in pull(change).items():
                model.get_parameter(name).grad += gradient  # type: ignore[operator]
        optimizer.step()


def sequence(penalty: str, data: list[Split], steps: int, seed: int) -> list[list[float]]:
    """Learn all tasks; return the accuracies on the tasks so far, after each task."""
    model, rows = build_network(seed), list[list[float]]()
    curvature: KroneckerFactors | None = None
    for index, task in enumerate(data):
        pull = PENALTIES[penalty](curvature, index) if curvature is not None else None
        learn(model, task, pull, steps, seed + index)
        new = kronecker_factors(model, nn.CrossEntropyLoss(), [(task.x, task.y)], fisher="exact")
        # all tasks have the same number of images
        curvature = new if curvature is None else pooled([curvature, new], [index, 1])
        rows.append([evaluate(model, earlier)[1] for earlier in data[: index + 1]])
    return rows


def draw(results: dict[str, list[list[float]]], path: Path) -> None:
    """Save the mean accuracies on the tasks so far."""
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in results.items():
        means = [fmean(row) for row in rows]
        axes.plot(range(1, len(rows) + 1), means, marker="o", label=f"penalty: {name}")
    axes.set_xticks(range(1, len(results["none"]) + 1))
    axes.set(xlabel="tasks learned", ylabel="mean test accuracy on these tasks")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[list[float]]]:
    """Run the example, and return the accuracies, of which it prints the last ones."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tasks", type=int, default=5, help="number of tasks (5)")
    parser.add_argument("--steps", type=int, default=200, help="training steps per task (200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (0)")
    parser.add_argument("--output", type=Path, help="write a picture")
    options = parser.parse_args(arguments)
    data = tasks(options.tasks, options.seed)
    results = {name: sequence(name, data, options.steps, options.seed) for name in PENALTIES}
    print("penalty    mean test accuracy, and of each task from the first to the last")
    for name, rows in results.items():
        print(f"{name:10} {fmean(rows[-1]):6.1%}  ", *(f"{accuracy:6.1%}" for accuracy in rows[-1]))
    if options.output:
        draw(results, options.output)
    return results


if __name__ == "__main__":
    main()
