"""Compiled models and parts of models, compiled before or after the optimizer was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (24,), generator=GENERATOR)
MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]
BACKENDS = ["eager", "aot_eager"]
STEPS = 4


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Compiled code of other tests is dropped."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A network of two parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double()
        self.head = nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(x))
        return result


def steps(model: nn.Module, loss_fn: nn.Module, opt: KFAC, count: int = STEPS) -> None:
    for _ in range(count):
        opt.zero_grad()
        loss_fn(model(X), Y).backward()
        opt.step()


@cache
def uncompiled(**options: Any) -> Tensor:
    """The parameters that training without a compiler gives."""
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    steps(model, loss_fn, KFAC(model, loss_fn, **options))
    return weights(model)


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_trains_as_the_plain_one(
    options: dict[str, Any], backend: str, fullgraph: bool
) -> None:
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    steps(compiled, loss_fn, KFAC(compiled, loss_fn, **options))
    torch.testing.assert_close(weights(model), uncompiled(**options), rtol=1e-9, atol=1e-11)


def whole(model: Net) -> nn.Module:
    model.compile(backend="eager")
    return model


def part(model: Net) -> nn.Module:
    model.body = torch.compile(model.body, backend="eager")
    return model


def part_in_place(model: Net) -> nn.Module:
    model.body.compile(backend="eager")
    return model


def layer_in_place(model: Net) -> nn.Module:
    model.head.compile(backend="eager", fullgraph=True)
    return model


WAYS: list[tuple[Callable[[Net], nn.Module], str]] = [
    (whole, "the model"),
    (part, "'body'"),
    (part_in_place, "'body'"),
    (layer_in_place, "'head'"),
]


IN_TURN = [
    (compile_, name, after, MODES[(index + after) % 2])
    for index, (compile_, name) in enumerate(WAYS)
    for after in (False, True)
    if not (after and compile_ is part)  # its parameters have other names then
]
"""Each way before and after the optimizer is made; the modes in turn."""


@pytest.mark.parametrize(("compile_", "name", "after", "options"), IN_TURN)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_what_is_compiled_by_itself_is_named(
    compile_: Callable[[Net], nn.Module], name: str, after: bool, options: dict[str, Any]
) -> None:
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    if not after:
        compile_(model)
    opt = KFAC(model, loss_fn, **options)
    if after:
        compile_(model)
    before = weights(model)
    loss_fn(model(X), Y).backward()
    words = rf"Compiled by itself is {name}: compile the whole model.*torch.compile\(model\)"
    with pytest.raises(RuntimeError, match=words):
        opt.step()
    assert torch.equal(before, weights(model))
    opt.remove_hooks()


@pytest.mark.parametrize("options", MODES)
def test_a_part_that_is_exchanged_for_a_compiled_one_asks_for_a_new_optimizer(
    options: dict[str, Any],
) -> None:
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    part(model)
    loss_fn(model(X), Y).backward()
    with pytest.raises(RuntimeError, match=r"for 'body.0.weight'. Make a new optimizer"):
        opt.step()


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("given", ["model", "compiled"])
def test_the_module_that_is_called_must_be_the_one_that_was_given(
    given: str, options: dict[str, Any]
) -> None:
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    compiled = torch.compile(model, backend="eager")
    opt = KFAC({"model": model, "compiled": compiled}[given], loss_fn, **options)
    called = {"model": compiled, "compiled": model}[given]
    before = weights(model)
    loss_fn(called(X), Y).backward()
    with pytest.raises(RuntimeError, match=r"pass `torch.compile\(model\)` itself here and call"):
        opt.step()
    assert torch.equal(before, weights(model))
    opt.remove_hooks()
    steps(compiled, loss_fn, KFAC(compiled, loss_fn, **options))


@pytest.mark.parametrize("options", MODES)
def test_a_loss_in_a_compiled_function_is_refused_and_outside_of_it_trains(
    options: dict[str, Any],
) -> None:
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    objective = torch.compile(lambda x, y: loss_fn(model(x), y), backend="eager")
    before = weights(model)
    objective(X, Y).backward()
    with pytest.raises(RuntimeError, match="outside of compiled functions"):
        opt.step()
    assert torch.equal(before, weights(model))
    steps(model, loss_fn, opt)
    torch.testing.assert_close(weights(model), uncompiled(**options), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [*MODES, {"fisher": "empirical"}])
@pytest.mark.filterwarnings("error")
def test_a_compiled_step_is_the_plain_one(options: dict[str, Any]) -> None:
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    step = torch.compile(opt.step, backend="aot_eager")
    for _ in range(STEPS):
        opt.zero_grad()
        loss_fn(model(X), Y).backward()
        step()
    assert torch.equal(weights(model), uncompiled(**options))


def test_a_compiled_step_of_a_preconditioner_is_the_plain_one() -> None:
    found = []
    for compiled in (False, True):
        model, loss_fn = Net(), nn.CrossEntropyLoss()
        preconditioner = KFACPreconditioner(model, loss_fn)
        step = torch.compile(preconditioner.step, backend="aot_eager")
        for _ in range(3):
            model.zero_grad()
            loss_fn(model(X), Y).backward()
            (step if compiled else preconditioner.step)()
            torch.optim.SGD(model.parameters(), 0.1).step()
        found.append(weights(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [*MODES, {"fisher": "empirical"}])
def test_a_compiled_loop_body_is_refused_by_name(options: dict[str, Any]) -> None:
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)

    @torch.compile(backend="aot_eager")
    def train() -> None:
        opt.zero_grad()
        loss_fn(model(X), Y).backward()
        opt.step()

    with pytest.raises(RuntimeError, match="outside of compiled functions"):
        train()


def test_a_compiled_frozen_part_is_no_obstacle() -> None:
    found = []
    for compiled in (False, True):
        model, loss_fn = Net(), nn.CrossEntropyLoss()
        model.body.requires_grad_(False)
        if compiled:
            model.body.compile(backend="eager")
        steps(model, loss_fn, KFAC(model, loss_fn, 0.1, adaptive=False))
        found.append(weights(model))
    torch.testing.assert_close(*found)


def compiled_criterion(model: nn.Module, opt: KFAC) -> Callable[[], Tensor]:
    own = torch.compile(nn.functional.cross_entropy, backend="aot_eager")
    return lambda: opt.observe(own(model(X), Y))


def compiled_scaling(model: nn.Module, opt: KFAC) -> Callable[[], Tensor]:
    own = torch.compile(lambda out: 2 * out + 1, backend="aot_eager")
    return lambda: opt.observe(nn.functional.cross_entropy(own(model(X)), Y))


def compiled_penalty(model: nn.Module, opt: KFAC) -> Callable[[], Tensor]:
    own = torch.compile(lambda: model.head.weight.square().sum(), backend="aot_eager")
    return lambda: opt.observe(nn.functional.cross_entropy(model(X), Y) + own())


def compiled_whole(model: nn.Module, opt: KFAC) -> Callable[[], Tensor]:
    own = torch.compile(lambda: nn.functional.cross_entropy(model(X), Y), backend="aot_eager")
    return lambda: opt.observe(own())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(
    ("compile_", "options"),
    [
        (compiled_criterion, MODES[0]),
        (compiled_scaling, MODES[1]),
        (compiled_penalty, MODES[0]),
        (compiled_whole, MODES[1]),
    ],
)
def test_a_compiled_function_that_is_read_is_refused_by_the_backward_pass(
    compile_: Callable[[nn.Module, KFAC], Callable[[], Tensor]], options: dict[str, Any]
) -> None:
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    opt = KFAC(model, **options)
    loss, before = compile_(model, opt)(), weights(model)
    with pytest.raises(RuntimeError, match="Call this function uncompiled"):
        loss.backward()
    assert torch.equal(before, weights(model))
    assert all(p.grad is None for p in model.parameters())
    for _ in range(STEPS):
        opt.zero_grad()
        opt.observe(loss_fn(model(X), Y)).backward()
        opt.step()
    torch.testing.assert_close(weights(model), uncompiled(**options), rtol=1e-9, atol=1e-11)


class Returning(nn.Module):
    """A network that returns its loss beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.net(x)
        return scores, nn.functional.cross_entropy(scores, y)


def test_a_model_that_returns_its_loss_is_compiled_first() -> None:
    model = Returning()
    late = KFAC(model)
    torch.compile(model, backend="eager")(X, Y)[1].backward()
    with pytest.raises(RuntimeError, match=r"`model = torch.compile\(model\)`, then KFAC\(model\)"):
        late.step()
    late.remove_hooks()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    opt, losses = KFAC(compiled), []
    for _ in range(STEPS):
        opt.zero_grad()
        loss = compiled(X, Y)[1]
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.filterwarnings("ignore:The loss has no curvature")
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_of_a_compiled_model_are_its_outputs(backend: str) -> None:
    """Hooks do not see the layers that these are computed from."""

    class Likelihood(Net):
        def forward(self, x: Tensor) -> Tensor:
            return -nn.functional.cross_entropy(super().forward(x), Y, reduction="none")

    model = Likelihood()
    compiled = torch.compile(model, backend=backend)
    opt = KFAC(compiled)
    opt.observe(-compiled(X).mean()).backward()
    opt.step()
    assert opt.coverage().losses == ("linear: the empirical Fisher",)
