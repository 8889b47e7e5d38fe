"""What goes wrong on one of several workers, and what each of them reports.

A case returns what its worker saw: texts of errors and warnings, and parameters.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
from optim_cases import conv_net, image_batch, weights
from torch import distributed, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel

from einconv_kfac import KFAC, KFACPreconditioner

FIXED = {"lr": 0.05, "adaptive": False}
Found = dict[str, Any]


class Worker:
    """One worker with a model, a loss and an optimizer."""

    def __init__(self, rank: int, model: nn.Module | None = None, **options: Any) -> None:
        self.rank, self.module = rank, conv_net() if model is None else model
        self.model, self.loss_fn = DistributedDataParallel(self.module), nn.CrossEntropyLoss()
        self.opt = KFAC(self.model, self.loss_fn, **options)

    def backward(self, number: int, scale: float = 1.0) -> None:
        """Backpropagate the loss of the worker's batch of a step."""
        self.opt.zero_grad()
        x, y = image_batch(8, 10 * number + self.rank)
        self.loss_fn(self.model(x * scale), y).backward()

    def step(self, number: int, scale: float = 1.0) -> None:
        """Take a step."""
        self.backward(number, scale)
        self.opt.step()


@contextmanager
def errors(found: Found, name: str) -> Iterator[None]:
    """Keep the error that is raised inside the block."""
    try:
        yield
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"


def not_finite(rank: int, size: int) -> Found:
    """A batch of one worker is not finite."""
    worker, found = Worker(rank), Found()
    worker.step(0)
    before = weights(worker.module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        worker.step(1, float("nan") if rank == 1 else 1.0)
    found["warnings"] = [str(each.message) for each in caught]
    found["unchanged"] = torch.equal(before, weights(worker.module))
    worker.step(2)
    found["weights"] = weights(worker.module)
    return found


def not_finite_moments(rank: int, size: int) -> Found:
    """What one worker collected is not finite, while losses and gradients are."""
    worker, found = Worker(rank, **FIXED), Found()
    worker.backward(0)
    if rank == 1:
        moments = worker.opt._preconditioner.collector.moments
        moments["5"].sums()[0].fill_(float("inf"))
    before = weights(worker.module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        worker.opt.step()
    found["warnings"] = [str(each.message) for each in caught]
    found["unchanged"] = torch.equal(before, weights(worker.module))
    return found


def failing(rank: int, size: int, target: str, **options: Any) -> Found:
    """A function of the package fails once on one worker, in the second step."""
    worker, found = Worker(rank, **options), Found()
    worker.step(0)
    worker.backward(1)
    before = weights(worker.module)
    error = mock.patch(target, side_effect=RuntimeError("out of memory"))
    with error if rank == 2 else warnings.catch_warnings(), errors(found, "step"):
        worker.opt.step()
    found["unchanged"] = torch.equal(before, weights(worker.module))
    with errors(found, "next"):
        worker.step(1)
        worker.step(2)
    found["weights"] = weights(worker.module)
    return found


FACTORS = "einconv_kfac.optim.factors.curvature"
STEP = "einconv_kfac.optim.step"


def failing_early(rank: int, size: int) -> Found:
    """One worker fails before the workers agree on anything."""
    return failing(rank, size, f"{STEP}.runner.norms")


def failing_in_update(rank: int, size: int) -> Found:
    """One worker fails between sums of factors and the quadratic model."""
    return failing(rank, size, f"{FACTORS}.RunningCurvature.update_")


def failing_in_replay(rank: int, size: int) -> Found:
    """One worker fails in a Jacobian-vector product."""
    return failing(rank, size, "einconv_kfac.optim.replay.replay.Replay.expansion")


def failing_in_inversion(rank: int, size: int) -> Found:
    """One worker cannot invert."""
    return failing(rank, size, "einconv_kfac.optim.inverses.cholesky.invert_damped", **FIXED)


def failing_in_divided_inversion(rank: int, size: int) -> Found:
    """One worker cannot invert the factors that it alone has."""
    options = {**FIXED, "divide_factors": True}
    return failing(rank, size, "einconv_kfac.optim.inverses.cholesky.invert_damped", **options)


def failing_late(rank: int, size: int) -> Found:
    """One worker fails at the end of a step that the others take."""
    return failing(rank, size, f"{FACTORS}.RunningCurvature.finish_", **FIXED)


def other_settings(rank: int, size: int) -> Found:
    """Workers have other hyper-parameters, models or states."""
    found = Found()
    with errors(found, "settings"):
        Worker(rank, factor_decay=0.9 if rank == 1 else 0.95)
    with errors(found, "seed"):
        Worker(rank, seed=rank)
    with errors(found, "preconditioner"):
        KFACPreconditioner(conv_net(), nn.CrossEntropyLoss(), damping=0.1 * (rank + 1))
    with errors(found, "model"):
        model = nn.Sequential(nn.Linear(2, 3 + rank))
        KFAC(model, nn.CrossEntropyLoss())
    with errors(found, "constructor"):
        KFAC(conv_net(), nn.CrossEntropyLoss(), strict=rank == 1, exclude=["0"])
    worker = Worker(rank, **FIXED)
    worker.step(0)
    worker.opt.param_groups[0]["lr"] = 0.05 * (1 + rank)
    with errors(found, "groups"):
        worker.step(1)
    worker.opt.param_groups[0]["lr"] = 0.05
    worker.step(1)
    found["weights"] = weights(worker.module)
    return found


def not_averaged(rank: int, size: int) -> Found:
    """Gradients are those of each worker's own batch."""
    found = Found()
    for name, options in (("fixed", FIXED), ("automatic", {})):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, **options)
        before, (x, y) = weights(model), image_batch(8, rank)
        loss_fn(model(x), y).backward()
        with errors(found, name):
            opt.step()
        found[f"{name} unchanged"] = torch.equal(before, weights(model))
    return found


def other_parameters(rank: int, size: int) -> Found:
    """Workers begin with other parameters, though their gradients are averaged."""
    found, model, loss_fn = Found(), conv_net(seed=rank), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **FIXED)
    loss_fn(model(image_batch()[0]), image_batch()[1]).backward()
    for parameter in model.parameters():
        distributed.all_reduce(parameter.grad)
    with errors(found, "step"):
        opt.step()
    return found


def other_steps(rank: int, size: int) -> Found:
    """One worker takes another step than the others."""
    found = Found()
    worker, other = Worker(rank), Worker(rank, **FIXED)
    worker.backward(0)
    other.backward(0)
    with errors(found, "order"):
        (other if rank == 1 else worker).opt.step()
    preconditioner = KFACPreconditioner(worker.model, worker.loss_fn)
    worker.backward(1)
    with errors(found, "class"):
        (preconditioner if rank == 1 else worker.opt).step()
    return found


def state_of_one(rank: int, size: int) -> Found:
    """One worker saves a state whose factors are divided, and the others train on."""
    worker, found = Worker(rank, divide_factors=True, **FIXED), Found()
    worker.step(0)
    worker.backward(1)
    before = weights(worker.module)
    with errors(found, "state"):
        worker.opt.state_dict() if rank == 1 else worker.opt.step()
    found["unchanged"] = torch.equal(before, weights(worker.module))
    worker.step(2)
    found["weights"] = weights(worker.module)
    return found


def without_batch(rank: int, size: int) -> Found:
    """One worker has no loss."""
    found = Found()
    worker = Worker(rank)
    worker.backward(0)
    if rank == 1:
        worker.opt.discard()
    with errors(found, "step"):
        worker.opt.step()
    return found


def joined(rank: int, size: int) -> Found:
    """Steps inside of `join`, whose workers have other numbers of batches, and outside of it."""
    worker, found = Worker(rank, **FIXED), Found()
    preconditioner = KFACPreconditioner(worker.model, worker.loss_fn)
    worker.step(0)
    with worker.model.join():
        worker.backward(1)
        with errors(found, "step"):
            worker.opt.step()
        with errors(found, "preconditioner"):
            preconditioner.step()
    with worker.model.join(enable=False):
        worker.step(1)
    found["weights"] = weights(worker.module)
    return found


FAULTS: tuple[Callable[[int, int], Found], ...] = (
    not_finite,
    not_finite_moments,
    failing_early,
    failing_in_update,
    failing_in_replay,
    failing_in_inversion,
    failing_in_divided_inversion,
    failing_late,
    other_settings,
    not_averaged,
    other_parameters,
    other_steps,
    state_of_one,
    without_batch,
    joined,
)


def faults(rank: int, size: int) -> dict[str, Found]:
    """What a worker sees of every fault."""
    warnings.simplefilter("ignore")
    found = {}
    for fault in FAULTS:
        found[fault.__name__] = fault(rank, size)
        distributed.barrier()
    return found


def lost(rank: int, size: int, number: int, **options: Any) -> Found:
    """One worker stops at a signal between two steps."""
    warnings.simplefilter("ignore")
    found, worker = Found(), Worker(rank, **options)
    worker.step(0)
    worker.backward(1)
    distributed.barrier()
    if rank == 1:
        os.kill(os.getpid(), number)
    if number == signal.SIGSTOP:  # nothing that is waited for from here on comes
        _set_pg_timeout(timedelta(seconds=1))
    with errors(found, "step"):
        worker.opt.step()
        worker.step(2)
    return found


def killed(rank: int, size: int) -> Found:
    """One worker is killed between two steps."""
    return lost(rank, size, signal.SIGKILL, **FIXED)


def killed_with_divided_factors(rank: int, size: int) -> Found:
    """One worker is killed, with the factors that it alone has, between two automatic steps."""
    return lost(rank, size, signal.SIGKILL, divide_factors=True)


def stopped(rank: int, size: int) -> Found:
    """One worker hangs, though the others are still connected to it."""
    return lost(rank, size, signal.SIGSTOP)
