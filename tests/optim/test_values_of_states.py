"""Values that no entry of a saved state has: refused by the entry's name, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from optim_cases import assert_same, conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.optim.definiteness import is_semidefinite

NAN, INF = float("nan"), float("inf")
LOSS_FN = nn.CrossEntropyLoss()
MODES: dict[str, dict[str, Any]] = {
    "automatic": {},
    "fixed": {"lr": 0.05, "adaptive": False, "fallback": "adam"},
    "exact": {"inverse": "exact"},
}
STEP = ("kfac", "automatic")
LAYER = ("kfac", "preconditioner", "layers", "0")
NUMBERS: list[tuple[tuple[Any, ...], str]] = [
    ((*STEP, "rule", "damping"), r"'rule'\.damping"),
    ((*STEP, "rule", "floor"), r"'rule'\.floor"),
    ((*STEP, "raised"), r"'step'\.raised"),
    ((*STEP, "search", "scale"), r"'step'\.search\.scale"),
    ((*STEP, "trust", "average"), r"'step'\.trust\.average"),
    ((*STEP, "trust", "slope"), r"'step'\.trust\.slope"),
    ((*STEP, "agreement", "noise"), r"'step'\.agreement\.noise"),
    ((*LAYER, "inverse", "damping"), r"'0'\.inverse\.damping"),
    (("param_groups", 0, "lr"), "`lr`"),
]
TENSORS: list[tuple[str, tuple[Any, ...], str]] = [
    ("automatic", (*LAYER, "factors", 0), r"'0'"),
    ("automatic", (*LAYER, "inverse", "a"), r"'0'\.inverse\.a"),
    ("exact", (*LAYER, "inverse", "values"), r"'0'\.inverse\.values"),
    ("exact", (*LAYER, "inverse", "basis_b"), r"'0'\.inverse\.basis_b"),
    ("automatic", ("state", 0, "momentum_buffer"), r"state of '0\.weight'\.momentum_buffer"),
    (
        "automatic",
        (*STEP, "trust", "direction", "0.weight"),
        r"'step'\.trust\.direction\.0\.weight",
    ),
    ("fixed", ("state", 6, "exp_avg"), r"exp_avg"),
    ("fixed", ("state", 6, "exp_avg_sq"), r"exp_avg_sq"),
]


def entry_of(value: float) -> Callable[[Tensor], Tensor]:
    """Return what sets the first entry of a tensor."""

    def changed(tensor: Tensor) -> Tensor:
        made = tensor.clone(memory_format=torch.contiguous_format)
        made.view(-1)[0] = value
        return made

    return changed


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": entry_of(NAN),
    "infinity": entry_of(INF),
    "minus infinity": entry_of(-INF),
    "complex": lambda tensor: tensor.to(torch.complex128),
    "integers": lambda tensor: tensor.long(),
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "another shape": lambda tensor: tensor[..., None],
}


def trained(steps: int, **options: Any) -> tuple[nn.Module, KFAC]:
    """A model that has taken steps."""
    model = conv_net(random_layers=True)
    opt = KFAC(model, LOSS_FN, **options)
    for seed in range(steps):
        train_step(model, LOSS_FN, opt, image_batch(seed=seed))
    return model, opt


@cache
def known(mode: str, steps: int) -> tuple[nn.Module, KFAC]:
    """A model that is only looked at."""
    return trained(steps, **MODES[mode])


def changed(state: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """A state with a change of one entry; nothing else is copied."""
    key, *rest = path
    made: Any = dict(state) if isinstance(state, dict) else list(state)
    made[key] = changed(made[key], tuple(rest), change) if rest else change(made[key])
    return made


def check_refused(opt: KFAC, model: nn.Module, state: Any, words: str) -> None:
    """The state is refused, and parameters and optimizer stay as they were."""
    before, own = weights(model), deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(state)
    assert torch.equal(before, weights(model))
    assert_same(own, opt.state_dict())


@pytest.mark.parametrize(("path", "words"), NUMBERS, ids=[path[-1] for path, _ in NUMBERS])
@pytest.mark.parametrize("value", [NAN, INF, -INF, -1.0, None, "1", True])
def test_numbers(path: tuple[Any, ...], words: str, value: Any) -> None:
    if path[-1] in ("average", "slope") and value == -1.0:
        return
    if path[-1] in ("lr", "damping") and value is None:
        return  # a group may have none, and a rule before the first step
    _, source = known("automatic", 3)
    model, opt = known("automatic", 1)
    check_refused(opt, model, changed(source.state_dict(), path, lambda _: value), words)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(("mode", "path", "words"), TENSORS)
def test_tensors(mode: str, path: tuple[Any, ...], words: str, name: str) -> None:
    _, source = known(mode, 3)
    model, opt = known(mode, 1)
    check_refused(opt, model, changed(source.state_dict(), path, CHANGES[name]), words)


def test_negative_squares() -> None:
    _, source = known("fixed", 3)
    model, opt = known("fixed", 1)
    path = ("state", 6, "exp_avg_sq")
    state = changed(source.state_dict(), path, entry_of(-1.0))
    check_refused(opt, model, state, "none of them negative, at .*exp_avg_sq")


def unit(f: Tensor) -> Tensor:
    """The unit matrix, like a factor."""
    return torch.eye(f.shape[-1]).to(f)


INDEFINITE: dict[str, Callable[[Tensor], Tensor]] = {
    "asymmetric": lambda f: f + f.abs().amax() * torch.ones_like(f).triu(1),
    "indefinite": lambda f: f + f.abs().amax() * (1 - unit(f)),
    "negative diagonal": lambda f: f - 2 * f.diagonal(dim1=1, dim2=2).amin() * unit(f),
    "negative": lambda f: -f,
}


@pytest.mark.parametrize("name", INDEFINITE)
@pytest.mark.parametrize(
    "path", [("factors", 0), ("factors", 1), ("inverse", "a"), ("inverse", "b")]
)
def test_matrices_that_are_not_semidefinite(path: tuple[Any, ...], name: str) -> None:
    _, source = known("automatic", 3)
    model, opt = known("automatic", 1)
    state = changed(source.state_dict(), (*LAYER, *path), INDEFINITE[name])
    check_refused(opt, model, state, "symmetric and positive semidefinite, at '0'")


def test_eigenvectors_and_eigenvalues() -> None:
    _, source = known("exact", 3)
    model, opt = known("exact", 1)
    inverse = (*LAYER, "inverse")
    state = changed(source.state_dict(), (*inverse, "basis_a"), lambda own: 1.01 * own)
    check_refused(opt, model, state, r"orthonormal columns at '0'\.inverse\.basis_a")
    state = changed(source.state_dict(), (*inverse, "values"), lambda own: own - own.amax())
    check_refused(opt, model, state, r"none of them negative, at '0'\.inverse\.values")


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e12])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_sums_of_squares_are_semidefinite(rank: int, scale: float) -> None:
    torch.manual_seed(0)
    x = scale * torch.randn(2, 30, rank) * torch.logspace(-15, 0, 30)[:, None]
    assert is_semidefinite(x @ x.mT)
    assert is_semidefinite(x.square().sum(-1))
    assert is_semidefinite(torch.zeros(1, 3, 3))


def test_bases_of_different_types() -> None:
    _, source = known("exact", 3)
    model, opt = known("exact", 1)
    state = changed(source.state_dict(), (*LAYER, "inverse", "basis_a"), lambda own: own.float())
    check_refused(opt, model, state, r"tensors of one data type at '0'\.inverse")


@pytest.mark.parametrize("mode", MODES)
def test_parameters_among_the_tensors_are_values(mode: str) -> None:
    """A state that an application keeps in a module has parameters in place of tensors."""
    _, source = known(mode, 3)
    state = source.state_dict()
    for path in ((*LAYER, "factors", 0), ("state", 0, "momentum_buffer")):
        state = changed(state, path, nn.Parameter)
    ours, theirs = trained(0, **MODES[mode]), trained(0, **MODES[mode])
    for (model, opt), own in ((ours, state), (theirs, source.state_dict())):
        torch.manual_seed(0)
        opt.load_state_dict(own)
        train_step(model, LOSS_FN, opt, image_batch(seed=3))
    for name, own in ours[1].state.items():
        assert not any(isinstance(v, Tensor) and v.requires_grad for v in own.values()), name
    assert_same(ours[1].state_dict()["kfac"], theirs[1].state_dict()["kfac"])


def test_an_infinite_square_leaves_the_average_finite() -> None:
    """In float32 the square of a gradient may overflow; the average of squares goes on after it."""
    model = nn.Linear(2, 1).float()
    opt = KFAC(model, lr=0.1, adaptive=False, fallback="adam", exclude=[""], kl_clip=None)
    for scale in (1.0, 1e25, 1.0, 1.0):
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(torch.ones(3, 2)), torch.ones(3, 1))
        opt.observe(scale * loss).backward()
        opt.step()
        assert weights(model).isfinite().all()
    assert all(own["exp_avg_sq"].isfinite().all() for own in opt.state.values())
