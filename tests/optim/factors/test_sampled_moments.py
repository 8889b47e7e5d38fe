"""Factors from some of the examples."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights, with_kl_clip
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.curvature.estimation.capture import LayerCapture
from einconv_kfac.curvature.estimation.evaluation import RuleEvaluation
from einconv_kfac.curvature.estimation.fisher import FisherEstimator
from einconv_kfac.curvature.estimation.moments import LayerMoments
from einconv_kfac.curvature.layers.discovery import find_layers
from einconv_kfac.optim.factors.sampled_moments import SampledMoments

EXACT = {"rtol": 1e-10, "atol": 1e-12}
MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]


class Twice(nn.Module):
    """A layer that is called twice, of groups and strides beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 2, 3, padding=1, groups=2)
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(x.expand(-1, 2, -1, -1)).tanh())
        return self.head(x[..., ::2, ::2].flatten(1))


def factors(
    fisher: Any, approximation: Any, reduction: str, rows: list[Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors of two batches, of which only these rows are taken."""
    model, loss_fn = Twice().double(), nn.CrossEntropyLoss(reduction=reduction)
    layers = find_layers(model)
    moments = {layer.name: LayerMoments(layer, approximation) for layer in layers}
    estimator = FisherEstimator(loss_fn, fisher, 1, approximation)
    for seed, (size, chosen) in enumerate(zip((4, 2), rows)):
        x, y = image_batch(size, seed)
        with LayerCapture(layers) as capture:
            output = model(x)
            calls = capture.take()
        own: Any = moments
        if chosen is not None:
            index = torch.tensor(chosen)
            own = {n: SampledMoments(m, lambda _, i=index: i) for n, m in moments.items()}
        generator = torch.Generator().manual_seed(seed)
        estimator.add_(own, calls, RuleEvaluation(loss_fn, output, y), generator)
    assert all(m.examples == 6 for m in moments.values())
    return {name: estimator.factors(m) for name, m in moments.items()}


IN_TURN = [
    (fisher, approximation, ("mean", "sum")[(i + j) % 2])
    for i, fisher in enumerate(("mc", "exact", "empirical", "forward-only"))
    for j, approximation in enumerate(("expand", "reduce"))
]
"""Any two of Fisher, approximation and reduction meet."""


@pytest.mark.parametrize(("fisher", "approximation", "reduction"), IN_TURN)
def test_the_average_over_all_choices_is_the_factor(
    fisher: Any, approximation: Any, reduction: str
) -> None:
    """Batches of unlike sizes keep their weights, whatever is drawn from each."""
    options = fisher, approximation, reduction
    wanted = factors(*options, [None, None])
    found = [factors(*options, [list(c), [i]]) for c in combinations(range(4), 3) for i in range(2)]
    for name, pair in wanted.items():
        for index, factor in enumerate(pair):
            mean = torch.stack([own[name][index] for own in found]).mean(0)
            torch.testing.assert_close(mean, factor, **EXACT)
    every = factors(*options, [list(range(4)), [0, 1]])
    for name, pair in wanted.items():
        for a, b in zip(every[name], pair):
            torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("random_layers", [False, True])
def test_training_on_some_examples(random_layers: bool, options: dict[str, Any]) -> None:
    """What is drawn is part of the state, and of nobody else's."""
    found = []
    for resume in (False, True):
        model, loss_fn = conv_net(random_layers=random_layers), nn.CrossEntropyLoss()
        own = {"factor_fraction": 0.3, **with_kl_clip(options, 0.1)}
        opt = KFAC(model, loss_fn, **own)
        losses = []
        for step in range(8):
            torch.manual_seed(step)
            state = torch.get_rng_state()
            x, y = image_batch(24)
            opt.zero_grad()
            output = model(x)
            state = torch.get_rng_state()
            loss = loss_fn(output, y)
            loss.backward()
            opt.step()
            assert torch.equal(state, torch.get_rng_state())
            losses.append(loss.item())
            if resume and step == 4:
                saved = opt.state_dict()
                opt = KFAC(model, loss_fn, **own)
                opt.load_state_dict(saved)
        assert losses[-1] < 0.7 * losses[0]
        found.append(weights(model))
    assert torch.equal(*found)


def test_all_examples_are_the_default() -> None:
    found = []
    for options in ({}, {"factor_fraction": 1.0, "curvature_fraction": 1}):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, **options)
        for seed in range(3):
            train_step(model, loss_fn, opt, image_batch(seed=seed))
        found.append(weights(model))
    assert torch.equal(*found)


def test_the_preconditioner_takes_some_examples() -> None:
    grads = []
    for part in (1.0, 0.5):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        preconditioner = KFACPreconditioner(model, loss_fn, factor_fraction=part, fisher="exact")
        x, y = image_batch()
        loss_fn(model(x), y).backward()
        preconditioner.step()
        grads.append(model[-1].weight.grad)
    assert not torch.equal(*grads)
