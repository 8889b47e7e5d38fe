"""Models whose forward passes change buffers that they depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import image_batch, train_step, weights
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import normalize
from torch.nn.utils.parametrizations import spectral_norm

from einconv_kfac import KFAC
from einconv_kfac.optim.recording import buffers
from einconv_kfac.optim.recording.recorder import Recorder
from einconv_kfac.optim.replay.replay import Replay


class Moving(nn.Module):
    """Subtracts a running mean, which it updates or replaces."""

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("mean", torch.zeros(36).double())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = self.mean.lerp(x.mean(0), 0.5)
            if self.replaces:
                self.mean = mean
            else:
                self.mean.copy_(mean)
        return x - self.mean


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    if kind == "spectral":
        first: list[Any] = [spectral_norm(nn.Linear(36, 5))]
    else:
        first = [Moving(kind == "replaced"), nn.Linear(36, 5)]
    return nn.Sequential(nn.Flatten(), *first, nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("kind", ["updated", "replaced", "spectral"])
@pytest.mark.parametrize("small", [True, False])
def test_a_replay_begins_with_the_buffers_of_the_forward_pass(
    kind: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large buffers are copied from the first change on."""
    if not small:
        monkeypatch.setattr(buffers, "COPIED_ENTRIES", 1)
    model, loss_fn, (x, y) = net(kind), nn.CrossEntropyLoss(), image_batch()
    recorder = Recorder(model, loss_fn, lambda *_: None)
    recorder.keeps_outputs = True
    for _ in range(2):
        output = model(x)
        loss_fn(output, y).backward()
    after = [b.clone() for b in model.buffers()]
    replay = Replay(model, recorder.paused)
    (repeated,) = replay.outputs(recorder.take()[-1])
    torch.testing.assert_close(repeated, output, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(after, model.buffers()))


@pytest.mark.parametrize("kind", ["updated", "replaced", "spectral"])
def test_they_train(kind: str) -> None:
    model, loss_fn = net(kind), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    before = weights(model)
    losses = [train_step(model, loss_fn, opt, image_batch(24)) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(before, weights(model))


class MovingParameter(nn.Module):
    """Subtracts a running mean in a parameter, in whose place each forward pass puts another."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(36).double())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean = nn.Parameter(self.mean.lerp(x.mean(0), 0.5))
        return x - self.mean.detach()


@pytest.mark.parametrize("options", [{"fisher": "exact"}, {"lr": 0.1, "adaptive": False}])
def test_parameters_that_a_forward_pass_replaces_are_as_buffers(options: dict[str, Any]) -> None:
    """As the codes of an autoencoder that follow averages of its latents."""

    def trained(first: nn.Module) -> Tensor:
        model, loss_fn = net("replaced"), nn.CrossEntropyLoss()
        model[1] = first
        opt = KFAC(model, loss_fn, **options)
        for number in range(3):
            train_step(model, loss_fn, opt, image_batch(24, number))
        return weights(model[2:])

    found = trained(MovingParameter())
    torch.testing.assert_close(found, trained(Moving(replaces=True)), rtol=1e-10, atol=1e-12)


class Growing(nn.Module):
    """Subtracts the mean of what it has seen, in a buffer that grows or is registered late."""

    def __init__(self, is_late: bool) -> None:
        super().__init__()
        if not is_late:
            self.register_buffer("seen", torch.zeros(1, 36).double())

    def forward(self, x: Tensor) -> Tensor:
        known = [self.seen] if hasattr(self, "seen") else []
        self.register_buffer("seen", torch.cat([*known, x.detach().mean(0, keepdim=True)]))
        return x - self.seen.mean(0)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_buffer_that_has_become_large_is_copied(
    is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "COPIED_ENTRIES", 35 if is_late else 36)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Growing(is_late), nn.Linear(36, 3)).double()
    x, _ = image_batch()
    changing = buffers.ChangingBuffers()
    changing.copied_(dict(model.named_modules()), {})
    model(x)
    changing.compare_(model, dict(model.named_modules()), {})
    copies = changing.copied_(dict(model.named_modules()), {})
    assert torch.equal(copies["1.seen"], model[1].seen)


class Normalised(nn.Module):
    """A layer divided by its norm along a vector that each forward pass improves.

    Args:
        way: How the vector is kept: as a buffer, or as a frozen parameter changed in some way.
    """

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.way = nn.Linear(36, 5), way
        start = torch.linspace(-1, 2, 5)
        if way == "buffer":
            self.register_buffer("u", start)
        else:
            self.u = nn.Parameter(start, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        with torch.no_grad():
            u = normalize(weight @ (weight.T @ self.u), dim=0)
            if self.way == "assigned":
                self.u.data = u
            else:
                (self.u.data if self.way == "data" else self.u).copy_(u)
        norm = (weight.T @ self.u.clone()).norm()
        return functional.linear(x, weight / norm, self.layer.bias)


@pytest.mark.parametrize("way", ["copied", "data", "assigned"])
def test_frozen_parameters_that_a_forward_pass_changes_are_as_buffers(way: str) -> None:
    """Their vectors are those of one pass, and steps those of a model that has buffers."""
    models = []
    for each in ("buffer", way):
        torch.manual_seed(0)
        own = [nn.Flatten(), Normalised(each), nn.Tanh(), nn.Linear(5, 3)]
        model, loss_fn = nn.Sequential(*own).double(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, fisher="exact")
        for seed in range(4):
            train_step(model, loss_fn, opt, image_batch(seed=seed))
        models.append(model)
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    for name, expected in first.items():
        torch.testing.assert_close(second[name], expected, rtol=1e-10, atol=1e-12)


def test_frozen_parameters_that_stay_are_copied_until_the_first_step() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    given = dict(model.named_modules()), dict(model.named_parameters())
    changing = buffers.ChangingBuffers()
    copies = changing.copied_(*given)
    assert copies.keys() == {"0.weight", "0.bias"}
    changing.compare_(model, *given)
    assert not copies
    changing.is_first = False
    assert not changing.copied_(*given)


class Renormalised(nn.BatchNorm1d):
    """Batch normalisation whose outputs depend on its running statistics in training, too."""

    def forward(self, x: Tensor) -> Tensor:
        mean, running = x.mean(0), self.running_mean
        assert running is not None
        output = (x - mean) / x.std(0) + (mean - running).detach()
        with torch.no_grad():
            running.lerp_(mean, 0.5)
        return output


class Folded(nn.Linear):
    """A layer that reads the statistics of a part of it, as for training with quantisation."""

    def __init__(self) -> None:
        super().__init__(36, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        assert self.norm.running_mean is not None
        mean = self.norm.running_mean.clone()
        output: Tensor = self.norm(super().forward(x))
        return output + mean - 2 * self.norm.running_mean


@pytest.mark.parametrize("first", [lambda: [nn.Linear(36, 5), Renormalised(5)], lambda: [Folded()]])
def test_running_statistics_that_are_read_in_training(first: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *first(), nn.Tanh(), nn.Linear(5, 3)).double()
    loss_fn, batch = nn.CrossEntropyLoss(), image_batch(24)
    opt = KFAC(model, loss_fn)
    losses = [train_step(model, loss_fn, opt, batch) for _ in range(8)]
    assert losses[-1] < losses[0]
