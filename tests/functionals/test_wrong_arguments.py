"""Every argument of every public function of convolutions, given values of other types.

Each is refused by an error that names an argument, the rule and the value, or is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch

from einconv_kfac import functionals, geometry, index_pattern, modules, simplify
from einconv_kfac.geometry import Axis, Geometry, conv_geometry

X, W, Y = torch.rand(2, 4, 6, 7), torch.rand(6, 2, 3, 3), torch.rand(2, 6, 4, 5)
Z, T = torch.rand(2, 8, 30), torch.rand(4, 3, 3, 3)
BASE: dict[str, Any] = {
    **{"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "simplify": True},
    **{"kernel_size": 2, "output_padding": 0, "N": 2, "in_channels": 4, "out_channels": 6},
    **{"padding_mode": "zeros", "device": None, "dtype": None, "output_size": None, "ndim": 2},
    **{"x": X, "bias": True, "name": "n", "minimum": 1, "input_size": (6, 7), "value": 2},
}
"""Right values by name."""

OWN: dict[str, dict[str, Any]] = {
    "convNd": {"weight": W, "bias": torch.rand(6), "groups": 2},
    "conv_transposeNd": {"weight": T, "bias": torch.rand(3)},
    "foldNd": {"x": Z, "output_size": (6, 7)},
    "FoldNd": {"output_size": (6, 7)},
    "Axis": {"input_size": 6, "padding": (0, 0)},
    "Geometry": {"axes": (Axis(6, 2),)},
    "output_padding_of": {"output_size": (7, 8)},
    "index_pattern": {"input_size": 6, "device": "cpu", "dtype": torch.bool},
    "simplify": {"equation": "ni,koi->nko", "operands": [torch.rand(3, 8), torch.rand(2, 7, 8)]},
    "convert": {"model": torch.nn.ReLU()},
    "convNd_forward": {"weight": W, "groups": 2},
    "convNd_weight_jvp": {"v": W, "groups": 2},
    "convNd_input_jvp": {"weight": W, "v": X, "groups": 2},
    "convNd_input_vjp": {"weight": W, "v": Y, "groups": 2},
    "convNd_toeplitz": {"weight": W, "groups": 2},
    "convNd_fold": {"z": Z},
    "conv_transposeNd_forward": {"weight": T},
    "conv_transposeNd_input_vjp": {"weight": W, "v": X, "groups": 2},
    "conv_transposeNd_weight_vjp": {"x": Y, "v": X, "kernel_size": 3, "groups": 2},
    "ggn": {"s": Y[None], "kernel_size": 3, "groups": 2},
    "vjp": {"v": Y, "kernel_size": 3, "groups": 2},
}
"""Right values by function and name."""

OPERATIONS = [
    *("convNd_forward", "convNd_weight_jvp", "convNd_input_jvp", "convNd_input_vjp"),
    *("convNd_unfold", "convNd_fold", "convNd_toeplitz", "convNd_kfc", "convNd_kfac_reduce"),
    *("conv_transposeNd_forward", "conv_transposeNd_input_vjp", "conv_transposeNd_weight_vjp"),
    *("conv_transposeNd_unfold", "conv_transposeNd_kfc", "conv_transposeNd_kfac_reduce"),
]
PER_EXAMPLE = ("convNd_weight_vjp", "convNd_per_example_weight_vjp", "convNd_gradient_norm")
SQUARES = ("convNd_ggn_diagonal", "convNd_gram")
GEOMETRY = ("conv_geometry", "conv_transpose_geometry", "parse_geometry", "output_padding_of")
SPELLINGS = ("per_dimension", "same_padding", "parse_padding", "Axis", "Geometry")


class Thing:
    """An object of no use."""


WRONG: list[Any] = [
    *(None, "3", "full", b"3", 1.5, float("nan"), -1, True, 1j, np.float32(1), np.bool_(True)),
    *(np.array([1, 1]), [], (), [[]], ((), ()), [1, "a"], (None, 1), (1.0, 1), (True, 1), (1,) * 4),
    *({}, {1: 2}, {1, 2}, Thing(), int, slice(1), torch.float32, torch.tensor(1), torch.rand(5)),
    *(torch.tensor([1, 1]), torch.rand(2, 4, 6, 7).double(), torch.rand(0)),
]


def functions() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Yield the functions, with right values for their arguments."""
    named: dict[str, tuple[Callable[..., Any], str]] = {}
    for room, names in ((functionals, functionals.__all__), (geometry, [*GEOMETRY, *SPELLINGS])):
        named |= {name: (getattr(room, name), name) for name in names}
    named |= {name: (getattr(modules, name), name) for name in modules.__all__}
    named |= {"index_pattern": (index_pattern, "index_pattern"), "simplify": (simplify, "simplify")}
    for names, own in ((OPERATIONS, None), (PER_EXAMPLE, "vjp"), (SQUARES, "ggn")):
        for name in names:
            module = import_module(f"einconv_kfac.expressions.{name}")
            named[name] = (module.einsum_expression, own or name)
            for part in ("network", "bias_network"):
                if hasattr(module, part):
                    named[f"{name}.{part}"] = (getattr(module, part), "network")
    for name, (function, own) in named.items():
        right = {"geometry": conv_geometry((6, 7), 3)} | BASE | OWN.get(own, {})
        yield name, function, {p: right.get(p, 2) for p in signature(function).parameters}


HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": (None, True, -1),  # `None` is no bias; a layer's may be a number
    "device": (None,),
    "dtype": (None, torch.float32),
    "output_size": (None,),
    "minimum": (-1,),
}
"""Values that are right for some argument of the name."""


def accepts(function: str, name: str, value: Any) -> bool:
    """Whether a value is right, or makes no difference."""
    if any(value is right for right in HARMLESS.get(name, ())) or name == "name":
        return True
    if isinstance(value, bool):
        return name == "simplify"
    if isinstance(value, torch.Tensor):
        return name in ("x", "z", "weight") and value.ndim > 1  # of other numbers
    four = isinstance(value, tuple) and value == (1,) * 4
    any_dimensions = function in ("UnfoldNd", "FoldNd", "UnfoldTransposeNd")
    return four and (any_dimensions or name in ("input_size", "output_size"))


@pytest.mark.parametrize(
    ("label", "function", "right"), [pytest.param(*row, id=row[0]) for row in functions()]
)
def test_wrong_values_are_refused_by_name(
    label: str, function: Callable[..., Any], right: dict[str, Any]
) -> None:
    function(**right)
    for name in right:
        for value in WRONG:
            try:
                function(**{**right, name: value})
            except (TypeError, ValueError) as error:
                message = str(error)
            else:
                message = None
            refused = message is not None and "must" in message and "`" in message
            assert refused or (message is None and accepts(label, name, value)), (name, value)


LAYERS = [
    (modules.ConvNd(2, 4, 6, 3), "forward", {"x": X}),
    (modules.ConvNd(2, 4, 6, 3, padding=1, padding_mode="reflect"), "forward", {"x": X}),
    (modules.ConvTransposeNd(2, 4, 6, 3), "forward", {"x": X, "output_size": (8, 9)}),
    (modules.UnfoldNd(2), "forward", {"x": X}),
    (modules.FoldNd((6, 7), 2), "forward", {"x": Z}),
    (modules.UnfoldTransposeNd(2), "forward", {"x": X, "output_size": (7, 8)}),
    (Axis(6, 2), "outputs", {"kernel": 1}),
    (Axis(6, 2), "input_position", {"kernel": 1, "output": 1}),
    (Geometry((Axis(6, 2),)), "split_channels", {"channels": 2}),
    (modules.ConvNd, "from_nn_Conv", {"conv_module": torch.nn.Conv2d(1, 1, 1)}),
    (modules.ConvTransposeNd, "from_nn_ConvTranspose",
     {"conv_module": torch.nn.ConvTranspose2d(1, 1, 1)}),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "method", "right"), LAYERS)
def test_wrong_values_of_methods(owner: Any, method: str, right: dict[str, Any]) -> None:
    function = getattr(owner, method)
    positions = method in ("outputs", "input_position")
    function(**right)
    for name in right:
        for value in WRONG:
            if accepts(method, name, value) or (positions and value is WRONG[6]):
                continue
            with pytest.raises((TypeError, ValueError), match="must"):
                function(**{**right, name: value})


@pytest.mark.parametrize("number", [np.int64(2), np.int32(2), np.uint8(2)])
def test_numpy_integers_are_integers(number: Any) -> None:
    for stride in (number, (number, 2), [2, number]):
        ours = functionals.convNd(X, W, stride=stride, groups=number)
        torch.testing.assert_close(ours, functionals.convNd(X, W, stride=2, groups=2))
    assert conv_geometry((6, 7), number, number) == conv_geometry((6, 7), 2, 2)
    layer = modules.ConvNd(number, 4, 6, number, stride=number, padding=number)
    assert repr(layer) == repr(modules.ConvNd(2, 4, 6, 2, stride=2, padding=2))


@pytest.mark.parametrize("value", [True, 1.0, np.float64(1)])
def test_equal_values_of_other_types_are_refused_after_a_call(value: Any) -> None:
    """A cache takes ``1 == True == 1.0`` for one key."""
    for wrong in (value, (1, value)):
        for name in ("stride", "dilation", "padding"):
            functionals.convNd(X, W, groups=2, **{name: 1})
            functionals.convNd(X, W, groups=2, **{name: (1, 1)})
            conv_geometry((6, 7), 2, **{name: (1, 1)})
            with pytest.raises(TypeError, match=f"`{name}` must be"):
                functionals.convNd(X, W, groups=2, **{name: wrong})
            with pytest.raises(TypeError, match=f"`{name}` must be"):
                conv_geometry((6, 7), 2, **{name: wrong})
    functionals.convNd(X, T.transpose(0, 1), groups=1)
    with pytest.raises(TypeError, match="`groups` must be an integer"):
        functionals.convNd(X, T.transpose(0, 1), groups=value)
