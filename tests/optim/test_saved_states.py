"""Saved states: wrong ones change nothing, hooks see all of it, and factors may be left out."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from optim_cases import assert_same, conv_net, image_batch, train_step, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from einconv_kfac import KFAC, KFACPreconditioner

MODES: list[dict[str, Any]] = [
    {"weight_decay": 1e-3},
    {"lr": 0.1, "adaptive": False, "fallback": "adam"},
    {"inverse": "exact", "inverse_in_background": True, "inverse_update_period": 2},
    {"inverse": "ekfac", "inverse_update_period": 2},
]
WRONG = (None, "text", -1, [], torch.zeros(()), torch.full((3,), torch.nan))


def small_net() -> nn.Module:
    """Return a network with two layers, and a parameter that no Kronecker factor covers."""
    layers = [nn.Conv2d(1, 2, 3, stride=2), nn.PReLU(2), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def trained(steps: int, *, small: bool = False, **options: Any) -> tuple[nn.Module, KFAC]:
    """A model that has taken steps."""
    loss_fn, model = nn.CrossEntropyLoss(), conv_net(seed=steps, random_layers=True)
    model = small_net() if small else model
    opt = KFAC(model, loss_fn, **options)
    for seed in range(steps):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    return model, opt


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all entries, containers among them."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, own in entries:
        yield (*path, key)
        if isinstance(own, (dict, list, tuple)):
            yield from paths(own, (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[dict, Any], None]) -> Any:
    """A state with a change of one entry; nothing else is copied."""
    key, *rest = path
    if isinstance(value, dict):
        made: Any = dict(value)
    else:
        made = list(value)
    if rest:
        made[key] = changed(made[key], tuple(rest), change)
    else:
        change(made, key)
    return made


def delete(container: Any, key: Any) -> None:
    """Delete an entry."""
    del container[key]


def rename(container: Any, key: Any) -> None:
    """Give an entry another key."""
    container.update({f"{key}x": container.pop(key)})


def replace_by(wrong: Any) -> Callable[[Any, Any], None]:
    """Return what replaces an entry."""

    def replace(container: Any, key: Any) -> None:
        container[key] = wrong

    return replace


def is_carried(path: tuple[Any, ...]) -> bool:
    """Whether an entry repeats the part "kfac" in the state of a parameter."""
    return path[0] == "state" and "kfac" in path


@pytest.mark.parametrize("turn", range(len(MODES)))
def test_a_corrupted_state_is_loaded_as_a_whole_or_not_at_all(turn: int) -> None:
    """Each change of an entry is made in every second mode."""
    options = MODES[turn]
    _, source = trained(4, small=True, **options)
    _, opt = trained(2, small=True, **options)
    state = source.state_dict()
    before = deepcopy(opt.state_dict())
    refused = 0
    for index, path in enumerate(path for path in paths(state) if not is_carried(path)):
        changes = [delete, *map(replace_by, WRONG)]
        changes += [rename] if isinstance(path[-1], str) else []
        for change in changes[(index + turn) % 2 :: 2]:
            try:
                opt.load_state_dict(changed(state, path, change))
            except ValueError:
                refused += 1
                assert_same(before, opt.state_dict())
            else:
                opt.load_state_dict(before)
    assert refused > 120
    opt.load_state_dict(state)
    assert_same(opt.state_dict()["kfac"], deepcopy(source.state_dict())["kfac"])


@pytest.mark.parametrize("options", MODES[1:3])
def test_a_corrupted_state_of_a_preconditioner(options: dict[str, Any]) -> None:
    own = {"inverse": options.get("inverse", "factored")}

    def made(steps: int) -> KFACPreconditioner:
        model, loss_fn = conv_net(seed=steps), nn.CrossEntropyLoss()
        preconditioner = KFACPreconditioner(model, loss_fn, **own)
        for seed in range(steps):
            x, y = image_batch(seed=seed)
            loss_fn(model(x), y).backward()
            preconditioner.step()
        return preconditioner

    source, target = made(3), made(2)
    state, before = source.state_dict(), deepcopy(target.state_dict())
    for path in paths(state):
        for change in [delete, *map(replace_by, WRONG)]:
            try:
                target.load_state_dict(changed(state, path, change))
            except ValueError:
                assert_same(before, target.state_dict())
            else:
                target.load_state_dict(before)


def test_a_state_of_another_mode_or_kind_changes_nothing() -> None:
    states = [deepcopy(trained(3, **options)[1].state_dict()) for options in MODES]
    for index, options in enumerate(MODES):
        _, opt = trained(2, **options)
        before = deepcopy(opt.state_dict())
        for other, state in enumerate(states):
            if other != index:
                with pytest.raises(ValueError, match="`state_dict` must come from"):
                    opt.load_state_dict(state)
                assert_same(before, opt.state_dict())


class FailingRule:
    """A damping rule whose state cannot be loaded."""

    def damping(self, step: int) -> float:
        return 0.1

    def initial(self, curvature: float) -> None: ...

    def after_ratio(self, ratio: float, predicted: float, noise: float) -> None: ...

    def after_rejection(self, factor: float) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("no")


def test_a_rule_that_fails_to_load_changes_nothing() -> None:
    _, source = trained(3, damping=FailingRule())
    _, opt = trained(2, damping=FailingRule())
    before = deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="state of the damping rule FailingRule"):
        opt.load_state_dict(source.state_dict())
    assert_same(before, opt.state_dict())


@pytest.mark.parametrize("options", MODES)
def test_hooks_see_the_whole_state(options: dict[str, Any]) -> None:
    _, opt = trained(2, **options)
    _, other = trained(1, **options)
    seen: dict[str, Any] = {}
    opt.register_state_dict_pre_hook(lambda o: seen.update(saving=True))
    opt.register_state_dict_post_hook(lambda o, s: seen.update(saved=set(s)), prepend=True)
    state = opt.state_dict()
    assert seen == {"saving": True, "saved": {"state", "param_groups", "kfac"}}

    def migrate(_: Any, found: dict[str, Any]) -> dict[str, Any]:
        own = found["kfac"]
        return {**found, "kfac": {**own, "version": 11}}

    old = changed(state, ("kfac", "version"), replace_by(-1))
    with pytest.raises(ValueError, match="of version 11, got -1"):
        other.load_state_dict(old)
    other.register_load_state_dict_pre_hook(migrate)
    loaded: list[Any] = []
    other.register_load_state_dict_post_hook(lambda o: loaded.append(deepcopy(o.state_dict())))
    other.load_state_dict(old)
    assert_same(loaded[0]["kfac"], deepcopy(state["kfac"]))


def test_a_hook_that_fails_after_loading_takes_it_back() -> None:
    _, source = trained(3)
    _, opt = trained(2)
    before = deepcopy(opt.state_dict())

    def fail(_: Any) -> None:
        raise RuntimeError("no")

    handle = opt.register_load_state_dict_post_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        opt.load_state_dict(source.state_dict())
    handle.remove()
    assert_same(before, opt.state_dict())


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("options", MODES)
def test_states_survive_distributed_checkpoints(options: dict[str, Any], is_full: bool) -> None:
    model, opt = trained(3, **options)
    opt.zero_grad()
    buffer, own = io.BytesIO(), StateDictOptions(full_state_dict=is_full)
    torch.save(get_optimizer_state_dict(model, opt, options=own), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = deepcopy(model)
    fresh = KFAC(other, nn.CrossEntropyLoss(), **options)
    set_optimizer_state_dict(other, fresh, state)
    assert_same(deepcopy(opt.state_dict())["kfac"], deepcopy(fresh.state_dict())["kfac"])


@pytest.mark.parametrize("options", MODES)
def test_a_state_without_factors_starts_them_anew(options: dict[str, Any]) -> None:
    model, opt = trained(4, **options)
    small, large = opt.state_dict(include_factors=False), opt.state_dict()
    assert small["kfac"]["preconditioner"]["layers"] is None
    assert small["kfac"]["preconditioner"]["steps"] == 4
    own = small["kfac"].keys() - {"version", "preconditioner"}
    assert_same(*({name: state["kfac"][name] for name in own} for state in (small, large)))
    loss_fn = nn.CrossEntropyLoss()
    other = KFAC(again := deepcopy(model), loss_fn, **options)
    other.load_state_dict(deepcopy(small))
    layers = other.state_dict()["kfac"]["preconditioner"]["layers"]
    assert all(own["factors"] is None and own["updates"] == 0 for own in layers.values())
    before = weights(again)
    train_step(again, loss_fn, other, image_batch(seed=7))
    assert not torch.equal(before, weights(again))
    layers = other.state_dict()["kfac"]["preconditioner"]["layers"]
    assert all(own["updates"] == 1 for own in layers.values())


@pytest.mark.parametrize(
    "options", [{}, {"inverse": "ekfac", "inverse_in_background": True, "inverse_update_period": 5}]
)
def test_inverses_of_equal_layers_resume_bit_by_bit(options: dict[str, Any]) -> None:
    """Equal small factors are inverted in one batch, whose slices are aligned differently."""
    loss_fn = nn.CrossEntropyLoss()

    def net() -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(11, 11), nn.Tanh()) for _ in range(4)]
        return nn.Sequential(*layers, nn.Linear(11, 5)).double()

    def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(13, 11, generator=generator, dtype=torch.float64)
        return x, torch.randint(5, (13,), generator=generator)

    model = net()
    opt = KFAC(model, loss_fn, fisher="exact", **options)
    for start in range(0, 12, 3):
        buffer = io.BytesIO()
        torch.save((model.state_dict(), opt.state_dict()), buffer)
        buffer.seek(0)
        parts = torch.load(buffer, weights_only=True)
        other = net()
        again = KFAC(other, loss_fn, fisher="exact", **options)
        other.load_state_dict(parts[0])
        again.load_state_dict(parts[1])
        for seed in range(start, start + 3):
            train_step(model, loss_fn, opt, batch(seed))
            train_step(other, loss_fn, again, batch(seed))
        assert torch.equal(weights(model), weights(other))
