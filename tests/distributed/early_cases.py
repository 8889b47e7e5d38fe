"""Trainings whose factors are sent before the backward pass, and what may come in between."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from optim_cases import image_batch
from torch import Tensor, distributed
from worker_cases import FIXED, Case
from worker_training import Training, all_weights

MODES: dict[str, dict[str, Any]] = {
    "fixed": {**FIXED, "factor_update_period": 1},
    "automatic": {"factor_update_period": 1},
    "divided": {**FIXED, "factor_update_period": 1, "divide_factors": True},
}
STEPS, LAST = 3, 2
ALL_REDUCE = distributed.all_reduce
LARGE = 129
"""Numbers of a message above those of a small one."""
Found = dict[str, Any]


@contextmanager
def recorded(events: list[str]) -> Iterator[None]:
    """Record the large collectives that the optimizer begins inside the block."""

    def watch(name: str) -> Any:
        original = getattr(distributed, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.numel() >= LARGE:
                events.append("sums")
            return original(tensor, *args, **kwargs)

        return mock.patch.object(distributed, name, call)

    with watch("all_reduce"), watch("reduce"):
        yield


def averaged(events: list[str], bucket: Any) -> Any:
    """Average a bucket of gradients, and record that."""
    events.append("gradients")
    own = bucket.buffer().div_(distributed.get_world_size())
    return ALL_REDUCE(own, async_op=True).get_future().then(lambda done: done.value()[0])


def order(options: dict[str, Any], rank: int, size: int) -> list[str]:
    """What is begun in the last of some steps: sums, buckets of gradients, and the step itself."""
    training, events = Training(Case(options, sizes=(8,) * 4), rank, size), []

    training.model.register_comm_hook(None, lambda state, bucket: averaged(events, bucket))
    step = training.opt.step
    for number in range(STEPS):
        with recorded(events), mock.patch.object(training.opt, "step") as patched:
            patched.side_effect = lambda: [events.append("step"), step()]
            events.clear()
            training.step(number)
    return events


def backward(training: Training, number: int) -> None:
    """Backpropagate a batch of this worker."""
    x, y = image_batch(6, 100 * number + training.rank)
    training.loss_fn(training.model(x), y).backward()


def plain(training: Training) -> None:
    """One batch, and the step."""
    training.opt.zero_grad()
    backward(training, 7)


def again(training: Training) -> None:
    """A batch whose gradients are dropped before that of the step."""
    plain(training)
    training.opt.zero_grad()
    backward(training, 8)


def twice(training: Training) -> None:
    """Two batches whose gradients are averaged one after the other."""
    plain(training)
    backward(training, 8)


def dropped_by_one(training: Training) -> None:
    """One worker drops its batches in between, so that it begins no message."""
    plain(training)
    if training.rank == 1:
        training.opt.discard()
    training.opt.zero_grad()
    backward(training, 8)


def loaded_by_one(training: Training) -> None:
    """One worker has loaded its own state before, so that it begins no message."""
    if training.rank == 1:
        training.opt.load_state_dict(training.opt.state_dict())
    plain(training)


def skipped(training: Training) -> None:
    """A step that is skipped comes before, since a batch of one worker is not finite."""
    training.opt.zero_grad()
    x, y = image_batch(6, training.rank)
    training.loss_fn(training.model(x * (float("nan") if training.rank else 1.0)), y).backward()
    training.opt.step()
    plain(training)


def fail(training: Training, target: str) -> None:
    """Take a step that fails on one worker."""
    plain(training)
    error = mock.patch(target, side_effect=RuntimeError("out of memory"))
    with (
        error if training.rank == 1 else warnings.catch_warnings(),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        training.opt.step()
    plain(training)


def failed(training: Training) -> None:
    """A step that fails on one worker comes before."""
    fail(training, "einconv_kfac.optim.step.runner.norms")


def failed_between(training: Training) -> None:
    """A step fails on one worker after all have begun a message, before they wait for it."""
    fail(training, "einconv_kfac.optim.factors.collector.Collector.combine_")


INTERRUPTIONS: tuple[Callable[[Training], None], ...] = (
    plain,
    again,
    twice,
    dropped_by_one,
    loaded_by_one,
    skipped,
    failed,
    failed_between,
)


def interrupted(
    options: dict[str, Any], what: Callable[[Training], None], rank: int, size: int, *, early: bool
) -> Found:
    """The parameters and begun messages, with sums before backward passes or without."""
    training = Training(Case(options, sizes=(16,) * size), rank, size)
    training.opt._preconditioner.collector._is_early = early
    workers = training.opt._preconditioner.workers
    unused = mock.patch.object(workers, "begin_")
    with warnings.catch_warnings() if early else unused:
        warnings.simplefilter("ignore")
        training.step(0)
        before = workers._early.count
        training.step(1)
        what(training)
        training.opt.step()
        training.step(2)
    return {"weights": all_weights(training.module), "begun": workers._early.count - before}


def early(rank: int, size: int) -> Found:
    """What a worker finds, by case."""
    warnings.simplefilter("ignore")
    found: Found = {f"order, {mode}": order(own, rank, size) for mode, own in MODES.items()}
    for mode in ("fixed", "divided"):
        for what in INTERRUPTIONS:
            if mode == "divided" and what is loaded_by_one:
                continue  # all workers must ask for a state
            for is_early in (False, True):
                name = f"{mode}, {what.__name__}, {is_early}"
                found[name] = interrupted(MODES[mode], what, rank, size, early=is_early)
    return found
