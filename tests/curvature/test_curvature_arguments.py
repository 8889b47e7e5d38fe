"""Every argument of the public functions of curvature, given wrong types and values.

Each is refused by an error that names the argument and the rule, or is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from einconv_kfac import conv_input_factor, coverage, curvature, kronecker_factors, verify
from einconv_kfac.curvature import KroneckerFactors

NAN = float("nan")
X = torch.rand(2, 4, 6, 7)


class Thing:
    """An object of no use."""


WRONG: list[Any] = [
    *(None, True, 0, 1, -1, 0.5, -0.5, 1e400, NAN, "a", "", b"a", 1j, Thing(), int, slice(1)),
    *([], [[]], {}, {"a": 1}, {1, 2}, (1, 2), torch.zeros(2), torch.tensor(0.5), torch.tensor(1j)),
    *(torch.tensor(True), torch.tensor(1.0, device="meta"), X[:0], X[:, :0], X > 0.5, X.cfloat()),
    *(X.to_sparse(), X.double(), X.long(), np.float32(0.5), np.int64(1), np.zeros(2), X.numpy()),
    *(np.array(["a", "b"]), Fraction(1, 2), nn.CrossEntropyLoss, torch.int64, torch.Generator()),
]


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


NET, LOSS = small_net(), nn.CrossEntropyLoss()
DATA = [(torch.rand(5, 4), torch.randint(3, (5,)))]
FACTORS = kronecker_factors(NET, LOSS, DATA, fisher="exact")
CORRECTED = kronecker_factors(NET, LOSS, DATA, fisher="exact", kind="ekfac")
VECTOR = {name: torch.rand_like(p) for name, p in NET.named_parameters()}
FACTOR: dict[str, Any] = {"approximation": "expand", "precision": "full", "alpha": 1.0}
INPUT: dict[str, Any] = {**FACTOR, "x": X, "kernel_size": 2, "algorithm": None, "bias": False}
SOLVED: dict[str, Any] = {"damping": 0.1, "exact": True}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "conv_input_factor": (conv_input_factor, {**INPUT, "out": None, "beta": 0.0}),
    "into": (conv_input_factor, {**INPUT, "out": torch.eye(16)[None], "beta": 1.0}),
    "transposed": (curvature.conv_transpose_input_factor, INPUT),
    "linear": (curvature.linear_input_factor, {**FACTOR, "a": X, "bias": False}),
    "output": (curvature.output_factor, {**FACTOR, "g": X, "groups": 1}),
    "conv_output": (curvature.conv_output_factor, {**FACTOR, "g": X, "groups": 1}),
    "kronecker_factors": (
        kronecker_factors,
        {
            **{"model": NET, "loss_fn": LOSS, "data": DATA, "fisher": "mc", "mc_samples": 1},
            **{"approximation": "expand", "max_factor_size": 9, "exclude": (), "seed": 0},
            **{"parameters": None, "forward": None, "kind": "kfac", "progress": False},
        },
    ),
    "verify": (verify, {"model": NET, "loss_fn": LOSS, "batch": DATA[0], "kind": "kfac"}),
    "coverage": (coverage, {"model": NET}),
    "find_layers": (curvature.find_layers, {"model": NET, "every": False, "exclude": ()}),
    "pooled": (curvature.pooled, {"factors": [FACTORS] * 2, "weights": [1.0, 2.0]}),
    "KroneckerFactors": (KroneckerFactors, {"blocks": dict(FACTORS)}),
    "times": (lambda factor: factor * FACTORS, {"factor": 2.0}),
    "corrected times": (lambda factor: CORRECTED * factor, {"factor": 2.0}),
    "inverse": (FACTORS.inverse, SOLVED),
    "corrected inverse": (CORRECTED.inverse, SOLVED),
    "solve": (FACTORS.solve, {**SOLVED, "vector": VECTOR}),
    "product": (lambda vector: FACTORS @ vector, {"vector": VECTOR}),
    "logdet": (FACTORS.logdet, {"damping": 0.1}),
    "sample": (FACTORS.sample, {"count": 2, "damping": 0.1, "generator": None}),
    "dtype": (lambda dtype: FACTORS.__class__.to(FACTORS, dtype), {"dtype": torch.float64}),
    "register_layer": (
        curvature.register_layer, {"kind": Thing, "rule": curvature.LinearRule()}
    ),
    "register_loss": (curvature.register_loss, {"kind": Thing, "rule": curvature.EntrywiseRule()}),
}  # fmt: skip
NUMBERS = {"factor", "damping"}
INTEGERS = {"groups", "mc_samples", "max_factor_size", "seed", "count"}
RIGHT: dict[str, Any] = {
    **dict.fromkeys(("x", "a", "g"), lambda value: isinstance(value, Tensor)),
    **dict.fromkeys(("bias", "progress", "every", "exact"), lambda value: value is True),
    **dict.fromkeys(("out", "algorithm", "parameters", "forward"), lambda value: value is None),
    **dict.fromkeys(("alpha", "beta"), lambda value: isinstance(float(value), float)),
    **dict.fromkeys(NUMBERS, lambda value: abs(float(value)) < float("inf")),
    **dict.fromkeys(INTEGERS, lambda value: int(value) == value),
    "kernel_size": lambda value: value in (1, (1, 2)),
    "exclude": lambda value: value in ([], {}, ""),
    "weights": lambda value: value == (1, 2),
    "blocks": lambda value: value == {},
    "generator": lambda value: value is None or isinstance(value, torch.Generator),
    "dtype": lambda value: (
        value is None or isinstance(value, (float, np.floating, Tensor, Fraction))
    ),
}
"""Whether a value that was accepted is right, by argument; torch decides what `Tensor.to` takes."""
OWN_ERRORS = {
    ("verify", "batch"): "linear()",
    ("kronecker_factors", "data"): "need data",
    ("dtype", "dtype"): "",
}
"""Errors about the contents of an argument, or torch's own for a device or a model's input."""


def is_named(text: str, label: str, name: str) -> bool:
    """Whether an error names an argument and the rule."""
    known = OWN_ERRORS.get((label, name))
    names = ("`", "The vector", "The loss")
    return ("must" in text and any(n in text for n in names)) or (
        known is not None and known in text
    )


def is_function(name: str, value: Any) -> bool:
    """Whether a value is a function or a type that does what it does, or whose use would last."""
    is_type = isinstance(value, type) and issubclass(value, nn.Module)
    return (name == "forward" and callable(value)) or (name == "kind" and is_type)


@pytest.mark.parametrize(("label", "name"), [(c, n) for c, (_, own) in CALLS.items() for n in own])
def test_wrong_arguments_are_refused_by_name(label: str, name: str) -> None:
    call, right = CALLS[label]
    refused = 0
    for value in WRONG:
        if is_function(name, value) or (name == "loss_fn" and value is None):
            continue
        out = {"out": right["out"].clone()} if label == "into" else {}
        try:
            call(**{**right, **out, name: value})
        except (TypeError, ValueError, RuntimeError) as error:
            refused, text = refused + 1, f"{type(error).__name__}: {error}"
        else:
            text = None
        if text is None:
            assert RIGHT[name](value), f"{name}={value!r}"
        else:
            assert is_named(text, label, name), f"{name}={value!r}: {text}"
    assert refused


def test_integers_of_other_libraries_are_integers() -> None:
    options: dict[str, Any] = {"mc_samples": 2, "max_factor_size": 3, "seed": 4}
    others = {name: np.int64(value) for name, value in options.items()}
    ours, theirs = (kronecker_factors(NET, LOSS, DATA, **own) for own in (options, others))
    for name in ours:
        torch.testing.assert_close(ours[name].B, theirs[name].B, rtol=0, atol=0)


def test_numbers_of_numpy_multiply_from_both_sides() -> None:
    for product in (np.float64(2) * FACTORS, FACTORS * np.float64(2), np.int64(2) * FACTORS):
        torch.testing.assert_close(product.trace(), 2 * FACTORS.trace())


def test_a_negative_damping_has_no_determinant() -> None:
    with pytest.raises(ValueError, match="`damping` must be a finite number >= 0, got -1"):
        FACTORS.logdet(-1.0)


@pytest.mark.parametrize("factor", [0, -1.0])
def test_a_block_that_is_not_positive_has_no_factored_inverse(factor: float) -> None:
    with pytest.raises(RuntimeError, match=r"must be positive for exact=False.*Pass exact=True"):
        (FACTORS * factor).inverse(0.1, exact=False)
    if not factor:
        exact = (FACTORS * factor).solve(VECTOR, 0.1, exact=True)
        for name, own in VECTOR.items():
            torch.testing.assert_close(exact[name], 10 * own)


def test_an_operator_of_nothing_has_trace_zero() -> None:
    assert KroneckerFactors({}).trace() == KroneckerFactors({}).logdet(0.1) == 0


def test_a_refused_type_is_not_registered() -> None:
    with pytest.raises(TypeError, match="`kind` must be a type of module, got None"):
        curvature.register_layer(None, curvature.LinearRule())  # type: ignore[arg-type]
    assert len(coverage(NET)) == 4


def corrupted(state: Any) -> Iterator[tuple[str, Any]]:
    """Yield states of which one entry is missing or wrong, with its name."""
    entries = state.items() if isinstance(state, dict) else enumerate(state)
    for key, own in entries:
        wrong: list[Any] = [None, "a", -1, [], {}, torch.zeros(2)]
        if isinstance(own, Tensor):
            wrong += [own * NAN, own.cfloat(), own.to_sparse(), own.to("meta"), own[..., None]]
        made = [{**state, key: each} for each in wrong] if isinstance(state, dict) else []
        if isinstance(state, dict):
            made.append({name: value for name, value in state.items() if name != key})
        if isinstance(own, (dict, list)):
            for name, inner in corrupted(own):
                copy: Any = dict(state) if isinstance(state, dict) else list(state)
                copy[key] = inner
                yield name, copy
        yield from ((str(key), each) for each in made)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "sum"])
def test_corrupted_states_of_factors(kind: str) -> None:
    factors = {"kfac": FACTORS, "ekfac": CORRECTED, "sum": FACTORS + FACTORS}[kind]
    state = factors.state_dict()
    refused = 0
    for name, wrong in corrupted(state):
        try:
            loaded = KroneckerFactors.from_state_dict(wrong)
        except ValueError as error:
            refused, text = refused + 1, str(error)
        else:
            assert torch.isfinite(loaded.trace())
            continue
        assert "`state" in text, (name, text)
    assert refused > 60
    first = state["blocks"]["0"]
    term = first["terms"][0] if kind == "sum" else first
    entry = "basis_a" if kind == "ekfac" else "A"
    other = {"0": {**term, entry: torch.zeros(1, 2, 2)}}
    with pytest.raises(ValueError, match=r"of shape \[1, 5, 5\].*at blocks\.0"):
        KroneckerFactors.from_state_dict({**state, "blocks": other})
