"""How many tensor operations a step on ResNet-50 starts, and how often it waits for the device.

The operations of 100 steps late in training, with periods 10 and 100, are counted by the component
of the step that starts them: ten updates of the factors and one inversion are among them. A call of
``torch._foreach_*`` counts once, views and allocations do not. Waits are numbers that the host
reads, and results whose size depends on numbers. No time is measured. Images and batch are small,
and layers have an eighth of ResNet-50's channels by default, so that a processor is fast enough.
The size of a layer decides on the algorithm of its factors, and on which layers are joined.

    python benchmarks/step_operations.py
    python benchmarks/step_operations.py --package path/to/another/checkout
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from evidence.bottlenecks import RESNET50_BLOCKS, bottleneck_resnet
from operation_count import COMPONENTS, OUTSIDE, OperationCount
from step_trace import imported
from tables import RESULTS, command_line, publish
from torch import nn

PERIODS = (10, 100)
_LATE = 100  # periods after which nothing is updated more often than its period says
MODES: dict[str, dict[str, Any]] = {
    "fixed": {"adaptive": False, "lr": 1e-3},
    "automatic": {},
}
ROWS = (OUTSIDE, *dict.fromkeys(name for name, *_ in COMPONENTS))


def build(package: Any, model: nn.Module, loss_fn: nn.Module, mode: str) -> Any:
    """Return an optimizer of a mode, with its step count set late in training."""
    periods = {"factor_update_period": PERIODS[0], "inverse_update_period": PERIODS[1]}
    optimizer = package.KFAC(model, loss_fn, **MODES[mode], **periods)
    state = optimizer.state_dict()
    (curvature,) = (
        own for own in state["kfac"].values() if isinstance(own, dict) and "steps" in own
    )
    curvature["steps"] = _LATE * max(PERIODS)  # under a name that depends on the version
    optimizer.load_state_dict(state)
    return optimizer


def counts(
    package: Any, model: nn.Module, mode: str, size: int, batch: int
) -> tuple[list[Counter[str]], list[Counter[str]]]:
    """Return operations and waits by component, of each step of the longer period.

    The step before them, where everything is due for the first time, does not count.

    Args:
        package: The package.
        model: The network.
        mode: The mode of the optimizer.
        size: Height and width of the images.
        batch: Number of images.
    """
    torch.manual_seed(0)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = build(package, model, loss_fn, mode)
    operations, waits = [], []
    for _ in range(PERIODS[1] + 1):
        x, y = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
        optimizer.zero_grad()
        count = OperationCount(Path(package.__file__).resolve().parent)
        with count.counting():
            loss_fn(model(x), y).backward()
            optimizer.step()
        operations.append(count.operations)
        waits.append(count.waits)
    return operations[1:], waits[1:]


def column(found: Sequence[Counter[str]]) -> list[float]:
    """Return the mean by component, and beyond forward and backward: mean, ordinary, highest."""
    total: Counter[str] = sum(found, Counter())
    beyond = sorted(each.total() - each[OUTSIDE] for each in found)
    means = [total[name] / len(found) for name in ROWS]
    return [*means, sum(beyond) / len(beyond), beyond[len(beyond) // 2], beyond[-1]]


def table(columns: dict[str, list[float]]) -> list[str]:
    """Return the lines of the table."""
    rows = (*ROWS, "beyond these, mean", "  median step", "  costliest step")
    titles = "".join(f"{title:>24}" for title in columns)
    lines = [f"{'':22}{titles}"]
    for index, name in enumerate(rows):
        cells = "".join(f"{values[index]:24.2f}" for values in columns.values())
        lines.append(f"{name:22}{cells}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it to the results."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--package", type=Path, help="root of the checkout to count (default: what is installed)")
    add("--modes", default=",".join(MODES), help="modes of the optimizer")
    add("--width", type=int, default=8, help="channels of the stem; ResNet-50 has 64")
    add("--quick", action="store_true", help="a smoke test: a block per stage, four channels")
    add("--output", type=Path, default=RESULTS, help="folder of step_operations.txt")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    package = imported(options.package)
    blocks = (1, 1) if options.quick else RESNET50_BLOCKS
    width, size, batch = (4, 16, 2) if options.quick else (options.width, 64, 4)
    columns = {}
    for mode in options.modes.split(","):
        torch.manual_seed(0)
        model = bottleneck_resnet(blocks, width, 10)
        operations, waits = counts(package, model, mode, size, batch)
        columns[f"{mode}: operations"], columns["waits" + " " * len(columns)] = map(
            column, (operations, waits)
        )
    details = f"{width} channels, periods {PERIODS[0]} and {PERIODS[1]}, counts per step"
    title = f"ResNet of {sum(blocks)} bottlenecks, {details}"
    name = "step_operations-quick.txt" if options.quick else "step_operations.txt"
    publish([title, "", *table(columns)], options.output / name)


if __name__ == "__main__":
    main()
