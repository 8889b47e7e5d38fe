"""The cost of an automatic step whose factors and products use a part of the examples.

The settings and SGD take turns at each step, on the same batch. One complete period of the factors
is measured, late in training. The network is convolutional, without normalisation.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from tables import RESULTS, command_line, heading, publish
from torch import Tensor, nn
from torch.optim import Optimizer

from einconv_kfac.optim import KFAC

_LATE = 10_000
_WARM_UP = 3
FRACTIONS = ((1.0, 1.0), (1.0, 0.25), (0.25, 1.0), (0.25, 0.25))
"""Fractions of the examples for the factors, and for the products."""


def network(widths: Sequence[int]) -> nn.Sequential:
    """Return a network without normalisation; a layer with more channels halves the image."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        stride = 2 if 3 < channels < width else 1
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def optimizer(model: nn.Module, loss_fn: nn.Module, period: int, parts: Sequence[float]) -> KFAC:
    """Return an optimizer with its step count set late in training."""
    opt = KFAC(
        model,
        loss_fn,
        factor_update_period=period,
        factor_fraction=parts[0],
        curvature_fraction=parts[1],
    )
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = _LATE
    opt.load_state_dict(state)
    return opt


def seconds(
    model: nn.Module, loss_fn: nn.Module, opt: Optimizer, batch: tuple[Tensor, Tensor]
) -> float:
    """Return the seconds that a step takes."""
    start = perf_counter()
    opt.zero_grad()
    loss_fn(model(batch[0]), batch[1]).backward()
    opt.step()
    return perf_counter() - start


def table(widths: Sequence[int], batch: tuple[Tensor, Tensor], period: int) -> list[str]:
    """Return the lines of the table."""
    runs: dict[str, tuple[nn.Module, nn.Module, Optimizer]] = {}
    sgd = network(widths)
    runs["SGD"] = sgd, nn.CrossEntropyLoss(), torch.optim.SGD(sgd.parameters(), lr=1e-3)
    for every in (1, period):
        for parts in FRACTIONS:
            model, loss_fn = network(widths), nn.CrossEntropyLoss()
            name = f"{every:8}{parts[0]:10}{parts[1]:10}"
            runs[name] = model, loss_fn, optimizer(model, loss_fn, every, parts)
    totals = dict.fromkeys(runs, 0.0)
    for step in range(_WARM_UP + period):
        for name, run in runs.items():
            taken = seconds(*run, batch)
            totals[name] += taken if step >= _WARM_UP else 0.0
    lines = [f"{'period':>8}{'factors':>10}{'products':>10}{'ms/step':>10}{'by SGD':>9}"]
    for name, total in totals.items():
        lines.append(f"{name:>28}{1e3 * total / period:10.1f}{total / totals['SGD']:9.2f}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it to the results."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--batch", type=int, default=64, help="images per step")
    add("--quick", action="store_true", help="a smoke test: tiny, period 2")
    add("--output", type=Path, default=RESULTS, help="folder of fractions.txt")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    widths: tuple[int, ...] = (32, 32, 64, 64, 128, 128)
    size, batch, period = 32, options.batch, 10
    if options.quick:
        widths, size, batch, period = (2, 4), 8, 8, 2
    channels = f"{len(widths)} convolutions of {widths[0]} to {widths[-1]} channels"
    title = heading(channels, f"{size}x{size}", f"batch {batch}")
    data = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    name = "fractions-quick.txt" if options.quick else "fractions.txt"
    publish([title, "", *table(widths, data, period)], options.output / name)


if __name__ == "__main__":
    main()
