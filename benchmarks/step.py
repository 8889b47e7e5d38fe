"""The cost of a training step on ResNet-18 at 32x32, beside SGD in the same run.

The optimizers take turns at each step, all on one batch, another one in the next step, late in
training (no burn-in). With periods 10 and 100, ten of 100 steps update the factors, and one of
these ten also the inverses. Twenty steps represent them: the first, where everything is due, the
eleventh for the other updates of the factors, and the rest for ordinary steps. KFAC has taken a
step before, where all is done for the first time, which costs more than later. The result is the
median over repetitions. On one thread processor time is measured, which other processes disturb
least. SINGD has no inverses; its preconditioner is updated at the period of the factors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch
from evidence.families.images import Classification
from evidence.models import resnet20
from evidence.optimizers import Trainer, asdl_trainer, library, torch_trainer, with_rest
from evidence.task import Task
from evidence.vision import resnet18
from tables import RESULTS, command_line, heading, publish
from torch import nn

from einconv_kfac.optim import KFAC

_LATE = 100  # periods after which nothing is updated more often than its period says
_LR = 1e-3
_DAMPING = 0.1
REFUSALS = (ImportError, NotImplementedError, RuntimeError, ValueError)
"""Exceptions of an optimizer that cannot train the network."""

Build = Callable[[nn.Module, Task, tuple[int, int]], Trainer]


def sgd(model: nn.Module, task: Task, periods: tuple[int, int]) -> Trainer:
    """SGD with Nesterov momentum."""
    opt = torch.optim.SGD(model.parameters(), lr=_LR, momentum=0.9, nesterov=True)
    return torch_trainer([opt], model, task.family.loss_fn(), task)


def _kfac(model: nn.Module, task: Task, periods: tuple[int, int], adaptive: bool) -> Trainer:
    """KFAC, with its step count set late in training."""
    loss_fn = task.family.loss_fn()
    opt = KFAC(
        model,
        loss_fn,
        lr=1.0 if adaptive else _LR,
        adaptive=adaptive,
        factor_update_period=periods[0],
        inverse_update_period=periods[1],
    )
    _advance_(opt, _LATE * max(periods))
    return torch_trainer([opt], model, loss_fn, task)


def _advance_(optimizer: KFAC, steps: int) -> None:
    """Add to the number of steps that an optimizer has taken."""
    state = optimizer.state_dict()
    state["kfac"]["preconditioner"]["steps"] += steps
    optimizer.load_state_dict(state)


def fixed(model: nn.Module, task: Task, periods: tuple[int, int]) -> Trainer:
    """KFAC with fixed rates."""
    return _kfac(model, task, periods, adaptive=False)


def automatic(model: nn.Module, task: Task, periods: tuple[int, int]) -> Trainer:
    """KFAC with the automatic step."""
    return _kfac(model, task, periods, adaptive=True)


def asdl(model: nn.Module, task: Task, periods: tuple[int, int]) -> Trainer:
    """K-FAC of asdl; its burn-in is off."""
    return asdl_trainer(model, task, (_LR, _DAMPING), periods, warm_up=0)


def singd(model: nn.Module, task: Task, periods: tuple[int, int]) -> Trainer:
    """SINGD, and AdamW for the layers that it does not train."""
    opt = library("singd.optim.optimizer").SINGD(
        model, lr=_LR, damping=_DAMPING, T=periods[0], warn_unsupported=False
    )
    return torch_trainer(with_rest(model, opt), model, task.family.loss_fn(), task)


BUILDS: dict[str, Build] = {
    "SGD": sgd,
    "KFAC, fixed": fixed,
    "KFAC, automatic": automatic,
    "asdl K-FAC": asdl,
    "SINGD": singd,
}


def _built(task: Task, periods: tuple[int, int]) -> tuple[dict[str, Trainer], dict[str, str]]:
    """Return the optimizers, and for others the reason why they are missing."""
    trainers: dict[str, Trainer] = {}
    refused: dict[str, str] = {}
    for name, build in BUILDS.items():
        torch.manual_seed(0)
        try:
            trainers[name] = build(task.model(), task, periods)
        except REFUSALS as error:
            refused[name] = str(error).splitlines()[0][:90]
    return trainers, refused


def _window(
    task: Task, periods: tuple[int, int], shape: tuple[int, int, int]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the seconds of an average step by optimizer, in one run of all steps, and refusals."""
    factors, inverses = periods
    clock = process_time if torch.get_num_threads() == 1 else perf_counter
    shares = _shares(factors, inverses)
    trainers, refused = _built(task, periods)
    totals = dict.fromkeys(trainers, 0.0)
    size = task.batch_size
    for trainer in trainers.values():
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, KFAC):
                trainer.step(torch.randn(size, *shape), torch.randint(10, (size,)), 1.0)
                _advance_(optimizer, max(periods))
    for share in shares:
        batch = torch.randn(size, *shape), torch.randint(10, (size,))
        for name in list(trainers):  # interleaved, so that other load hits all alike
            start = clock()
            try:
                trainers[name].step(*batch, 1.0)
            except REFUSALS as error:
                refused[name] = str(error).splitlines()[0][:90]
                del trainers[name], totals[name]
                continue
            totals[name] += share * (clock() - start)
    return totals, refused


def _shares(factors: int, inverses: int) -> list[float]:
    """Return the share of all steps that each measured step represents."""
    updates = inverses // factors
    ordinary = (inverses - updates) / (2 * factors - 2)
    shares = [ordinary] * (2 * factors)
    shares[0], shares[factors] = 1, updates - 1
    return [share / inverses for share in shares]


def measure(
    task: Task, periods: tuple[int, int], repeats: int, shape: tuple[int, int, int]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the median seconds of an average step by optimizer, and refusals."""
    windows = [_window(task, periods, shape) for _ in range(repeats)]
    names = windows[0][0]
    return {name: median(w[name] for w, _ in windows) for name in names}, windows[0][1]


def table(seconds: dict[str, float], refused: dict[str, str]) -> list[str]:
    """Return the lines of the table."""
    base = seconds["SGD"]
    lines = [f"{'':18}{'ms/step':>10}{'by SGD':>9}{'overhead':>10}"]
    for name, value in seconds.items():
        lines.append(f"{name:18}{1e3 * value:10.1f}{value / base:9.2f}{value / base - 1:10.2f}")
    return lines + [f"{name:18}refused: {why}" for name, why in refused.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it to the results."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--batch", type=int, default=128, help="images per step")
    add("--periods", default="10,100", help="of factors and inverses")
    add("--repeats", type=int, default=1, help="repetitions")
    add("--quick", action="store_true", help="a smoke test: tiny, periods 2 and 4")
    add("--output", type=Path, default=RESULTS, help="folder of step.txt")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    factors, inverses = (2, 4) if options.quick else map(int, options.periods.split(","))
    task = Task("step", "ResNet-18", resnet18, options.batch, inverses, Classification())
    shape = (3, 32, 32)
    if options.quick:
        task = Task("step", "a tiny ResNet", partial(resnet20, 2, 1), 4, inverses, Classification())
        shape = (1, 8, 8)
    details = (
        f"{task.title}, {shape[1]}x{shape[2]}, batch {task.batch_size}",
        f"periods {factors} and {inverses}, median of {options.repeats} repetition(s)",
    )
    measured = measure(task, (factors, inverses), options.repeats, shape)
    name = "step-quick.txt" if options.quick else "step.txt"
    publish([heading(*details), "", *table(*measured)], options.output / name)


if __name__ == "__main__":
    main()
