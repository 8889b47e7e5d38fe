"""KFAC: saving, resuming, and what must not change its state."""

from __future__ import annotations

import io
from copy import deepcopy
from typing import Any

import pytest
import torch
from optim_cases import assert_same, conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner

MODES: list[dict[str, Any]] = [
    {"weight_decay": 1e-3},
    {"lr": 0.1, "adaptive": False},
    {"fisher": "empirical", "factor_update_period": 3, "inverse_update_period": 4},
    {"inverse": "exact"},
    {"inverse": "ekfac", "inverse_update_period": 3},
    {"lr": 0.1, "adaptive": False, "inverse": "ekfac", "inverse_in_background": True},
    {"inverse_in_background": True},
]


def saved(**parts: Any) -> dict[str, Any]:
    """Pass through ``torch.save`` and a safe ``torch.load``."""
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((torch.float32, options) for options in MODES),
        *((torch.float64, MODES[index]) for index in (0, 1, 4)),
    ],
)
def test_resumed_training_is_bit_identical(options: dict[str, Any], dtype: torch.dtype) -> None:
    batches = [(x.to(dtype), y) for x, y in (image_batch(seed=s) for s in range(8))]
    loss_fn = nn.CrossEntropyLoss()
    model = conv_net(random_layers=True).to(dtype)
    opt = KFAC(model, loss_fn, **options)
    torch.manual_seed(1)
    for batch in batches[:5]:
        train_step(model, loss_fn, opt, batch)
    parts = saved(model=model.state_dict(), opt=opt.state_dict(), rng=torch.get_rng_state())
    for batch in batches[5:]:
        train_step(model, loss_fn, opt, batch)

    resumed = conv_net(seed=9, random_layers=True).to(dtype)
    again = KFAC(resumed, loss_fn, **options)
    resumed.load_state_dict(parts["model"])
    again.load_state_dict(parts["opt"])
    torch.set_rng_state(parts["rng"])
    for batch in batches[5:]:
        train_step(resumed, loss_fn, again, batch)
    assert torch.equal(weights(model), weights(resumed))


class ActorCritic(nn.Module):
    """A network that returns a policy and values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.policy, self.values = nn.Linear(16, 4), nn.Linear(16, 1)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.policy(hidden).log_softmax(1), self.values(hidden).squeeze(1)


def explore(model: nn.Module, opt: KFAC, seed: int) -> list[Tensor]:
    """Act once, take six clipped steps on what came of it, and return the parameters of each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    best = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(1)
    torch.manual_seed(seed)
    old, value = (each.detach() for each in model(x))
    action = torch.distributions.Categorical(logits=old).sample()[:, None]
    reward = (action[:, 0] == best).double()
    gain, found = reward - value, []
    for rows in (rows for _ in range(3) for rows in torch.randperm(64).split(32)):
        scores, value = model(x[rows])
        ratio = (scores - old[rows]).gather(1, action[rows])[:, 0].exp()
        surrogate = torch.min(ratio * gain[rows], ratio.clamp(0.8, 1.2) * gain[rows]).mean()
        entropy = -(scores * scores.exp()).sum(1).mean()
        opt.zero_grad()
        error = (reward[rows] - value).square().mean()
        opt.observe(0.5 * error - surrogate - 0.01 * entropy).backward()
        opt.step()
        found.append(weights(model))
    return found


def test_a_fit_that_comes_unforeseen_after_resuming_is_bit_identical() -> None:
    model, states = ActorCritic(), []
    opt = KFAC(model)
    for seed in range(14):
        states.append(saved(model=model.state_dict(), opt=opt.state_dict()))
        states[-1]["steps"] = explore(model, opt, seed)
    for seed, state in enumerate(states[1:], start=1):
        other = ActorCritic()
        own = KFAC(other)
        other.load_state_dict(state["model"])
        own.load_state_dict(state["opt"])
        assert_same(explore(other, own, seed), state["steps"])


POISONED = [
    (options, (float("nan"), float("inf"))[(index + later) % 2], 3 * later)
    for index, options in enumerate(MODES)
    for later in (0, 1)
]
"""Each mode at its first step and at a later one; both values in each mode."""


@pytest.mark.parametrize(("options", "poison", "steps"), POISONED)
def test_a_batch_that_is_not_finite_changes_nothing(
    options: dict[str, Any], poison: float, steps: int
) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    for seed in range(steps):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    before, state = weights(model), deepcopy(opt.state_dict())
    x, y = image_batch()
    x[0, 0, 0, 0] = poison
    with pytest.warns(RuntimeWarning, match=r"^The loss was not finite; the step was skipped\.$"):
        train_step(model, loss_fn, opt, (x, y))
    assert torch.equal(before, weights(model))
    assert_same(state, opt.state_dict())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    x, y = image_batch()
    loss_fn(model(x), y).backward()
    before, state = weights(model), deepcopy(opt.state_dict())
    model[0].weight.grad[0] = float("inf")
    with pytest.warns(RuntimeWarning, match=r"^The gradient of '0\.weight' was not finite;"):
        opt.step()
    assert torch.equal(before, weights(model))
    assert_same(state, opt.state_dict())


def test_a_step_after_a_skipped_one_draws_the_numbers_of_the_skipped_one() -> None:
    found = []
    for skipped in (False, True):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, seed=5)
        if skipped:
            x, y = image_batch()
            with pytest.warns(RuntimeWarning, match="not finite"):
                train_step(model, loss_fn, opt, (x * float("inf"), y))
        train_step(model, loss_fn, opt, image_batch())
        found.append(weights(model))
    assert torch.equal(*found)


def test_micro_batches_draw_numbers_of_their_own() -> None:
    found = []
    for seed in (0, 0, 1):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, seed=seed, lr=0.1, adaptive=False)
        x, y = image_batch()
        for _ in range(2):
            (loss_fn(model(x), y) / 2).backward()
        opt.step()
        found.append(weights(model))
    single = conv_net()
    train_step(single, loss_fn, KFAC(single, loss_fn, lr=0.1, adaptive=False), (x, y))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[0], weights(single))


def test_loading_a_state_of_other_shapes_names_the_layer_and_changes_nothing() -> None:
    loss_fn = nn.CrossEntropyLoss()
    small, large = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(4, 3))
    source, target = KFAC(small, loss_fn), KFAC(large, loss_fn)
    train_step(small, loss_fn, source, (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])))
    before = deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=r"factors of shape .* for '0', got"):
        target.load_state_dict(source.state_dict())
    assert_same(before, target.state_dict())


def test_loading_a_state_of_other_layers_or_modes_is_refused() -> None:
    loss_fn = nn.CrossEntropyLoss()
    one, two = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Tanh(), nn.Linear(2, 3))
    with pytest.raises(ValueError, match="must have the model's layers, differs in"):
        KFAC(one, loss_fn).load_state_dict(KFAC(two, loss_fn).state_dict())
    with pytest.raises(ValueError, match="same `adaptive`"):
        KFAC(one, loss_fn).load_state_dict(KFAC(one, loss_fn, 0.1, adaptive=False).state_dict())
    previous = {**KFAC(one, loss_fn).state_dict(), "kfac": {"version": 5, "automatic": {}}}
    with pytest.raises(ValueError, match="must be a KFAC state of version 11, got 5"):
        KFAC(one, loss_fn).load_state_dict(previous)
    with pytest.raises(ValueError, match="must be a KFAC state of version 11, got a state without"):
        KFACPreconditioner(one, loss_fn).load_state_dict({"layers": {}, "inverse": "factored"})
    with pytest.raises(ValueError, match="must be a KFAC state of version"):
        KFAC(one, loss_fn).load_state_dict(torch.optim.SGD(one.parameters(), 0.1).state_dict())
