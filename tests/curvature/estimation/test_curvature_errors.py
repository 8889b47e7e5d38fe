"""Bad input and what is said about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from einconv_kfac.curvature import kronecker_factors

X, Y = torch.ones(4, 3), torch.zeros(4, dtype=torch.long)
LINEAR, LOSS = nn.Linear(3, 2), nn.CrossEntropyLoss()


class Several(nn.Linear):
    """A layer's scores in a tuple, or in a dictionary."""

    def __init__(self, kind: type) -> None:
        super().__init__(3, 2)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        scores = super().forward(x)
        return (scores, x) if self.kind is tuple else {"logits": scores}


CASES: list[tuple[str, nn.Module, nn.Module, Any, dict[str, Any], type[Exception], str]] = [
    ("fisher", LINEAR, LOSS, [(X, Y)], {"fisher": "type-2"}, ValueError,
     r"`fisher` must be one of \('mc', 'empirical', 'exact', 'forward-only'\), got 'type-2'"),
    ("approximation", LINEAR, LOSS, [(X, Y)], {"approximation": "kfc"}, ValueError,
     r"`approximation` must be one of \('expand', 'reduce'\), got 'kfc'"),
    ("samples", LINEAR, LOSS, [(X, Y)], {"mc_samples": 0}, ValueError,
     r"`mc_samples` must be at least 1, got 0"),
    ("unknown loss, mc", LINEAR, nn.L1Loss(), [(X, X[:, :2])], {}, ValueError,
     r"`loss_fn` must be one of CrossEntropyLoss, .*, got L1Loss\. fisher='empirical' takes any"),
    ("unknown loss, exact", LINEAR, nn.L1Loss(), [(X, X[:, :2])], {"fisher": "exact"}, ValueError,
     r"got L1Loss"),
    ("reduction", LINEAR, nn.MSELoss(reduction="none"), [(X, X)], {"fisher": "empirical"},
     ValueError, r"`loss_fn.reduction` must be 'mean' or 'sum', got 'none'"),
    ("no data", LINEAR, LOSS, [], {}, RuntimeError, r"Factors of '' need data, got none"),
    ("unbatched input", LINEAR, LOSS, [(X[0], Y[0])], {"fisher": "empirical"}, ValueError,
     r"input of '' \(Linear\) must be a non-empty batch \[n, \.\.\.\], got shape \[3\]"),
    ("unbatched image", nn.Sequential(nn.Conv2d(1, 2, 2)), nn.MSELoss(),
     [(torch.ones(1, 3, 3), torch.ones(2, 2, 2))], {}, ValueError,
     r"input of '0' \(Conv2d\) must be a non-empty batch .*got shape \[1, 3, 3\].*unsqueeze"),
    ("empty batch", LINEAR, LOSS, [(X[:0], Y[:0])], {}, ValueError,
     "non-empty batch"),
    ("no pairs", LINEAR, LOSS, [X], {}, ValueError,
     r"`data` must yield pairs \(x, y\), got Tensor\. Pass `forward`"),
    ("tuple", nn.Sequential(LINEAR, nn.Linear(2, 3), Several(tuple)), LOSS, [(X, Y)], {},
     ValueError, r"output must be a tensor for a CrossEntropyLoss, got a tuple. Pass `forward`"),
    ("mapping", nn.Sequential(LINEAR, nn.Linear(2, 3), Several(dict)), LOSS, [(X, Y)],
     {"fisher": "empirical"}, ValueError,
     r"output must be a tensor for a CrossEntropyLoss, got a dict\. .*, or a function of output"),
    ("lazy", nn.LazyLinear(2), LOSS, [(X, Y)], {}, ValueError,
     r"parameters.*must exist|Parameters must exist, but those of '' \(LazyLinear\)"),
    ("largest factor", LINEAR, LOSS, [(X, Y)], {"max_factor_size": 0}, ValueError,
     r"`max_factor_size` must be a positive integer, got 0"),
    ("largest factor, no number", LINEAR, LOSS, [(X, Y)], {"max_factor_size": True}, ValueError,
     r"`max_factor_size` must be a positive integer, got True"),
    ("exclude", LINEAR, LOSS, [(X, Y)], {"exclude": "head"}, ValueError,
     r"`exclude` must name modules of `model`, got 'head'"),
    ("exclude, type", LINEAR, LOSS, [(X, Y)], {"exclude": nn.Conv2d}, ValueError,
     r"`exclude` must name modules of `model`, got Conv2d"),
    ("parameters", LINEAR, LOSS, [(X, Y)], {"parameters": ["0.weight"]}, ValueError,
     r"`parameters` must be names of weights .*got \['0.weight'\]\. The weights are \['weight'\]"),
    ("parameters, bias alone", LINEAR, LOSS, [(X, Y)], {"parameters": ["bias"]}, ValueError,
     r"or of biases beside them, got \['bias'\]"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_bad_input(case: Any) -> None:
    _, model, loss_fn, data, options, error, message = case
    with pytest.raises(error, match=message):
        kronecker_factors(model, loss_fn, data, **options)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical", "forward-only"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_models_without_a_layer_that_is_covered(kind: Any, fisher: Any) -> None:
    if fisher == "forward-only" and kind != "kfac":
        return
    options: dict[str, Any] = {"kind": kind, "fisher": fisher}
    cases: list[tuple[nn.Module, dict[str, Any]]] = [
        (nn.PReLU(3), {}),
        (LINEAR, {"exclude": [""]}),
        (LINEAR, {"exclude": nn.Linear}),
        (LINEAR, {"parameters": []}),
    ]
    for model, more in cases:
        with pytest.raises(ValueError, match=r"must have a layer that a rule covers.*`coverage"):
            kronecker_factors(model, LOSS, [(X, Y)], **options, **more)


def test_layers_that_no_loss_depends_on() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)
            result: torch.Tensor = self.used(x)
            return result

    with pytest.raises(RuntimeError, match=r"'unused' need data, got none.*depends on it"):
        kronecker_factors(Unused(), LOSS, [(X, Y)])


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite(kind: Any, fisher: Any, value: float) -> None:
    """They are refused with the layers' names, also where the loss is sampled."""
    x = X.clone()
    x[1, 2] = value
    data = [(X, Y), (x, Y)]
    with pytest.raises(ValueError, match=r"`data` must give finite .* infinity for \[''\]\. Leave"):
        kronecker_factors(nn.Linear(3, 2), LOSS, data, kind=kind, fisher=fisher)
