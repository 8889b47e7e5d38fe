"""The search for the damping of the inverses."""

from __future__ import annotations

import math
from typing import Any

import pytest
from optim_cases import conv_net, image_batch, train_step
from torch import nn

from einconv_kfac import KFAC
from einconv_kfac.optim.step.agreement import LARGEST_NOISE, Agreement
from einconv_kfac.optim.step.damping.search import (
    SCALE_BOUNDS,
    SEARCH_PERIOD,
    DampingSearch,
    Trial,
)


class Ranked:
    """Stands for a step of which only the promise is known."""

    def __init__(self, rank: float) -> None:
        self.rank = rank


def searched(promised: Any, step: int = 0) -> tuple[list[float], float]:
    """Return the scales that are tried, and the best, for a promised change by scale."""
    search: Any = DampingSearch(Agreement())
    tried: list[float] = []

    class Trials:
        def ask_(self, scales: list[float]) -> None:
            asked.update(scales)

        def ahead_(self, best: Trial, scale: float) -> Trial:
            return best

        def trial_(self, scale: float) -> Any:
            assert scale in asked
            tried.append(scale)
            return Trial(scale, {}, Ranked(promised(scale)))  # type: ignore[arg-type]

    asked: set[float] = set()
    best = search.best_(step, Trials())
    assert best.scale == search.scale
    assert len(asked - set(tried)) <= 2  # a smaller scale than the first, and one after the last
    return tried, best.scale


@pytest.mark.parametrize(
    ("promised", "tried", "best"),
    [
        ({1: -1.0}, [1, 3, 1 / 3], 1),  # neither helps
        ({1: -1.0, 3: -2.0, 27: -1.5}, [1, 3, 27], 3),  # larger helps, smaller is not tried
        ({1: -1.0, 1 / 3: -2.0, 1 / 27: -3.0}, [1, 3, 1 / 3, 1 / 27, 1 / 729], 1 / 27),
        ({1: math.inf, 3: math.inf, 1 / 3: -1.0}, [1, 3, 1 / 3, 1 / 27], 1 / 3),
    ],
)
def test_trials_go_on_as_long_as_they_help(
    promised: dict[float, float], tried: list[float], best: float
) -> None:
    def rank(scale: float) -> float:
        return next((r for known, r in promised.items() if math.isclose(known, scale)), 0.0)

    scales, found = searched(rank)
    assert scales == pytest.approx(tried)
    assert found == pytest.approx(best)


def test_trials_stay_within_their_bounds() -> None:
    scales, best = searched(lambda scale: -scale)
    assert all(SCALE_BOUNDS[0] <= scale <= SCALE_BOUNDS[1] for scale in scales)
    assert 3 * best > SCALE_BOUNDS[1]


@pytest.mark.parametrize("step", [SEARCH_PERIOD, 1000])
def test_a_late_search_goes_no_further_than_one_factor(step: int) -> None:
    """However much the batch of that step promises: its scale holds for a hundred steps."""
    for sign, best in ((1, 3.0), (-1, 1 / 3)):
        scales, found = searched(lambda scale, sign=sign: -(scale**sign), step)
        assert scales == pytest.approx([1, 3] if sign == 1 else [1, 3, 1 / 3])
        assert found == pytest.approx(best)


@pytest.mark.parametrize("noise", [0.0, LARGEST_NOISE, 1.0])
def test_there_is_no_late_search_where_batches_differ(noise: float) -> None:
    """Beside the first search, where a damping was given before."""
    agreement = Agreement()
    search = DampingSearch(agreement)
    agreement.noise = noise
    assert search.is_due(0)
    assert search.is_due(5000)
    search.load_state_dict({"scale": 1.0, "searched": 5})
    assert search.is_due(SEARCH_PERIOD - 1)
    assert not search.is_due(6)
    assert search.is_due(SEARCH_PERIOD + 5) == search.is_due(5000) == (noise == 0)


def test_searches_are_frequent_early_and_rare_later(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, kept = [], DampingSearch.best_

    def noted(self: Any, step: int, *rest: Any) -> Any:
        steps.append(step)
        return kept(self, step, *rest)

    monkeypatch.setattr(DampingSearch, "best_", noted)
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    for seed in range(20):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    assert steps == [0, 1, 2, 3, 5, 9, 17]
