"""Whether a thousand steps leave memory, hooks, tensors or nodes of autograd graphs behind.

Each way of training runs in a process of its own. A small convolutional network with dropout and
batch normalisation (without the latter where a part of the examples is taken) trains on batches of
random images. After some of the steps the table shows the resident set, the tensors that the
garbage collector finds, the graph nodes that these keep alive, and the hooks on model and loss.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tables import RESULTS, command_line, heading, publish
from torch import Tensor, nn

from einconv_kfac.optim import KFAC

_PAGE = 4096
_FIXED = {"lr": 0.01, "adaptive": False}


class WithLoss(nn.Module):
    """A network that returns its loss."""

    def __init__(self, net: nn.Module, loss_fn: nn.Module) -> None:
        super().__init__()
        self.net, self.loss_fn = net, loss_fn

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss."""
        loss: Tensor = self.loss_fn(self.net(x), y)
        return loss


class Square(torch.autograd.Function):
    """A function without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return squares."""
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient at the input."""
        x: Tensor = ctx.saved_tensors[0]
        return 2 * x * gradient


class Squares(nn.Module):
    """Squares without forward mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Return squares."""
        y: Tensor = Square.apply(x)  # type: ignore[no-untyped-call]
        return y


def network(*between: nn.Module) -> nn.Sequential:
    """Return a network for images of 8x8."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        *between,
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def whole(steps: Sequence[int], **options: Any) -> list[tuple[int, ...]]:
    """Train with the loss outside of the model."""
    return train(network(nn.BatchNorm2d(8), nn.ReLU(inplace=True)), steps, options)


def parts(steps: Sequence[int], **options: Any) -> list[tuple[int, ...]]:
    """Train without batch normalisation."""
    return train(network(nn.ReLU()), steps, options)


def squares(steps: Sequence[int], **options: Any) -> list[tuple[int, ...]]:
    """Train with a function that has no forward mode."""
    return train(network(nn.Tanh(), Squares()), steps, options)


def inside(steps: Sequence[int], **options: Any) -> list[tuple[int, ...]]:
    """Train with the loss inside of the model."""
    net = network(nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    return train(WithLoss(net, nn.CrossEntropyLoss()), steps, options)


WAYS: dict[str, tuple[Callable[..., list[tuple[int, ...]]], dict[str, Any]]] = {
    "automatic": (whole, {}),
    "fixed": (whole, _FIXED),
    "automatic, loss inside": (inside, {}),
    "fixed, loss inside": (inside, _FIXED),
    "automatic, fractions": (parts, {"curvature_fraction": 0.5, "factor_fraction": 0.5}),
    "fixed, fraction": (parts, {**_FIXED, "factor_fraction": 0.5}),
    "automatic, two backward": (squares, {}),
}


def train(model: nn.Module, steps: Sequence[int], options: dict[str, Any]) -> list[tuple[int, ...]]:
    """Train a model, and return the step and the numbers of `alive` after each of ``steps``."""
    torch.manual_seed(0)
    loss_fn = model.loss_fn if isinstance(model, WithLoss) else nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    rows: list[tuple[int, ...]] = []
    for step in range(1, max(steps) + 1):
        x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
        opt.zero_grad()
        loss = model(x, y) if isinstance(model, WithLoss) else loss_fn(model(x), y)
        loss.backward()
        opt.step()
        with torch.no_grad():
            (model.net if isinstance(model, WithLoss) else model)(x)  # an evaluation
        if step in steps:
            del loss
            rows.append((step, *alive(model, loss_fn)))
    return rows


def alive(*modules: nn.Module) -> tuple[int, int, int, int]:
    """Return resident kB, tensors, graph nodes and hooks."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    own = {inner for module in modules for inner in module.modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in own)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE // 1024
    return resident, len(tensors), nodes(tensors), hooks


def nodes(tensors: Sequence[Tensor]) -> int:
    """Return the number of graph nodes that tensors keep."""
    found: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(found)


def table(steps: Sequence[int]) -> list[str]:
    """Return the lines of the table, each way measured in a fresh process."""
    lines = [f"{'':26}{'step':>6}{'resident MB':>13}{'tensors':>9}{'nodes':>7}{'hooks':>7}"]
    for name in WAYS:
        command = [sys.executable, __file__, "--way", name, "--steps", ",".join(map(str, steps))]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lines += found.splitlines()
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it to the results."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--steps", default="100,500,1000", help="steps after which to count")
    add("--quick", action="store_true", help="a smoke test: 2 and 4 steps")
    add("--way", choices=WAYS, help="one way, in this process; nothing is written")
    add("--output", type=Path, default=RESULTS, help="folder of growth.txt")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    steps = [2, 4] if options.quick else [int(step) for step in options.steps.split(",")]
    if options.way:
        run, settings = WAYS[options.way]
        for step, resident, *counts in run(steps, **settings):
            numbers = "".join(f"{n:{w}}" for n, w in zip(counts, (9, 7, 7)))
            print(f"{options.way:26}{step:6}{resident / 1024:13.1f}{numbers}")
        return
    name = "growth-quick.txt" if options.quick else "growth.txt"
    publish([heading(), "", *table(steps)], options.output / name)


if __name__ == "__main__":
    main()
