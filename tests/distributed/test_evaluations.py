"""Evaluations between the steps of a wrapped model change nothing, and leave no graph behind."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, weights
from torch import Tensor, distributed, nn
from torch.distributed import HashStore
from torch.nn.parallel import DistributedDataParallel
from worker_cases import FIXED, Branches

from einconv_kfac import KFAC

STEPS = 3
MODES: dict[str, dict[str, Any]] = {
    "automatic": {"fisher": "exact"},
    "fixed": {**FIXED, "fisher": "exact"},
    "sampled": {},
}
WRAPPERS: list[dict[str, Any]] = [
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
]
Evaluation = Callable[[DistributedDataParallel, Tensor], object]


def without_gradients(wrapper: DistributedDataParallel, x: Tensor) -> None:
    wrapper.eval()
    with torch.no_grad():
        wrapper(x)
    wrapper.train()


def in_inference_mode(wrapper: DistributedDataParallel, x: Tensor) -> None:
    with torch.inference_mode():
        wrapper(x)


def of_the_model(wrapper: DistributedDataParallel, x: Tensor) -> None:
    wrapper.module(x).sum()


def of_the_model_before_the_wrapper(wrapper: DistributedDataParallel, x: Tensor) -> None:
    wrapper.module(x).sum()
    without_gradients(wrapper, x)


def of_frozen_parameters(wrapper: DistributedDataParallel, x: Tensor) -> None:
    wrapper.requires_grad_(False)
    assert not wrapper.module(x).requires_grad
    with torch.no_grad():
        wrapper(x)
    wrapper.requires_grad_(True)


def failing(wrapper: DistributedDataParallel, x: Tensor) -> None:
    with pytest.raises(RuntimeError), torch.no_grad():
        wrapper(x[:, :1, :1])


EVALUATIONS: list[Evaluation] = [
    without_gradients,
    in_inference_mode,
    of_the_model,
    of_the_model_before_the_wrapper,
    of_frozen_parameters,
    failing,
]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def trained(
    options: dict[str, Any],
    wrapper: dict[str, Any] | None,
    evaluate: Evaluation | None = None,
    backend: str | None = None,
    *,
    uses_all: bool = True,
) -> Tensor:
    """The parameters after some steps, with an evaluation after each."""
    module, loss_fn = conv_net() if uses_all else Branches(), nn.CrossEntropyLoss()
    model = module if wrapper is None else DistributedDataParallel(module, **wrapper)
    called = model if backend is None else torch.compile(model, backend=backend)
    opt = KFAC(called, loss_fn, **options)
    for number in range(STEPS):
        x, y = image_batch(6, number)
        opt.zero_grad()
        loss_fn(called(x), y).backward()
        opt.step()
        if evaluate is not None:
            assert isinstance(model, DistributedDataParallel)
            evaluate(model, x)
    return weights(module)


@cache
def bare(mode: str, *, uses_all: bool) -> Tensor:
    """The same without a wrapper and evaluations."""
    return trained(MODES[mode], None, uses_all=uses_all)


HALF = [
    (mode, wrapper, evaluate)
    for i, evaluate in enumerate(EVALUATIONS)
    for j, wrapper in enumerate(WRAPPERS)
    for k, mode in enumerate(("automatic", "fixed"))
    if (i + j + k) % 2 == 0
]
"""Each evaluation of every wrapper, in one of the two modes in turn."""


@pytest.mark.parametrize(("mode", "wrapper", "evaluate"), HALF)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_evaluation_changes_nothing(
    mode: str, wrapper: dict[str, Any], evaluate: Evaluation
) -> None:
    uses_all = "find_unused_parameters" not in wrapper
    found = trained(MODES[mode], wrapper, evaluate, uses_all=uses_all)
    torch.testing.assert_close(found, bare(mode, uses_all=uses_all), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("evaluate", EVALUATIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_evaluation_of_a_compiled_wrapper_changes_nothing(evaluate: Evaluation) -> None:
    wrapper = {"find_unused_parameters": True}
    found = trained(MODES["sampled"], wrapper, evaluate, "eager", uses_all=False)
    torch.testing.assert_close(found, bare("sampled", uses_all=False), rtol=1e-9, atol=1e-11)


def by_pickle(model: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(model))
    return found


@pytest.mark.parametrize("copied", [deepcopy, by_pickle])
@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda own: next(iter(own), "plain"))
def test_a_copy_of_a_wrapper_has_hooks_that_do_nothing(
    wrapper: dict[str, Any], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model, loss_fn = DistributedDataParallel(conv_net(), **wrapper), nn.CrossEntropyLoss()
    opt, (x, y) = KFAC(model, loss_fn, fisher="exact"), image_batch()
    loss_fn(model(x), y).backward()
    opt.step()
    copy, found = copied(model), []
    with torch.no_grad():
        assert torch.equal(copy(x), model(x))
    for each in (copy, copied(model.module)):
        again = KFAC(each, loss_fn, fisher="exact")
        for _ in range(2):
            again.zero_grad()
            loss_fn(each(x), y).backward()
            again.step()
        found.append(weights(each))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


class Traced(torch.autograd.Function):
    """Returns its input; the graph owns an object."""

    owned: list[weakref.ref[nn.Module]] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.owner = nn.Identity()
        Traced.owned.append(weakref.ref(ctx.owner))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Owned(nn.Module):
    """A network whose graph can be watched."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Traced.apply(self.layer(x))
        return found


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda own: next(iter(own), "plain"))
def test_no_graph_outlives_a_step_or_a_call_that_fails(wrapper: dict[str, Any]) -> None:
    model, loss_fn = DistributedDataParallel(Owned(), **wrapper), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, fisher="exact")
    x, y = torch.ones(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])

    def fail(*_: Any) -> None:
        raise ValueError("no")

    for is_failing in (False, True, False):
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()
        if is_failing:
            handle = model.module.register_forward_hook(fail)
            with pytest.raises(ValueError, match="no"):
                model(x)
            handle.remove()
            opt.discard()
        gc.collect()
        assert Traced.owned
        assert not [own for own in Traced.owned if own() is not None]
        Traced.owned.clear()
