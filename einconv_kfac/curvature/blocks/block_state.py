"""Blocks from their saved states, which are checked entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.arguments import number, shown
from einconv_kfac.curvature.blocks.block import Block
from einconv_kfac.curvature.blocks.eigen import EigenBlock
from einconv_kfac.curvature.blocks.kronecker import KroneckerBlock
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.blocks.sums import SumBlock

BLOCKS = KroneckerBlock, EigenBlock, SumBlock

_TYPES: dict[frozenset[str], Callable[..., Block]] = {
    frozenset(entry.name for entry in fields(kind)): kind for kind in BLOCKS
}
"""The type of block by the names of its fields, which are the entries of its state."""

_FORMS: dict[str, tuple[str | None, ...]] = {
    "A": ("gdd", "gd"),
    "B": ("gcc", "gc"),
    "basis_a": ("gdd", None),
    "basis_b": ("gcc", None),
    "values": ("gcd",),
}
"""The dimensions that a tensor may have, of the matrices ``[g, c, d]`` of the layout."""


def block_of(path: str, state: Any) -> Block:
    """Return the block that a state describes.

    Args:
        path: Where the state is, for errors.
        state: A `Block.state_dict`.

    Raises:
        ValueError: If it is none.
    """
    names = frozenset(state) if isinstance(state, Mapping) else frozenset[str]()
    if names not in _TYPES:
        kinds = " or ".join(kind.__name__ for kind in BLOCKS)
        raise ValueError(f"`state` must have a {kinds} at {path}, got {shown(state)}.")
    if "terms" in names:
        return SumBlock(tuple(_terms(path, state["terms"])))
    layout = _layout(f"{path}.layout", state["layout"])
    sizes: dict[str, int] = dict(zip("gcd", layout.shape))
    for name in names & _FORMS.keys():
        _check_tensor(f"{path}.{name}", state[name], _FORMS[name], sizes)
    if "scale" in names:
        number(f"state: {path}.scale", state["scale"])
    return _TYPES[names](**{**state, "layout": layout})


def check_block(name: str, block: Block) -> None:
    """Raise a ``ValueError`` if the tensors of a block do not fit its layout.

    Args:
        name: The name of the layer, for errors.
        block: The block.
    """
    if isinstance(block, SumBlock):
        for term in block.terms:
            check_block(name, term)
        return
    if not isinstance(block.layout, Layout):
        raise ValueError(
            f"`blocks` must have a Layout as the `layout` of {name!r}, got {shown(block.layout)}."
        )
    sizes: dict[str, int] = dict(zip("gcd", block.layout.shape))
    for entry in vars(block).keys() & _FORMS.keys():
        value, forms = getattr(block, entry), _FORMS[entry]
        if value is None and None in forms:
            continue
        shapes = [[sizes[dim] for dim in form] for form in forms if form is not None]
        if not isinstance(value, Tensor) or list(value.shape) not in shapes:
            raise ValueError(
                f"`blocks` must have a tensor of shape {' or '.join(map(str, shapes))} as "
                f"`{entry}` of {name!r}, as its layout has, got {shown(value)}."
            )


def _terms(path: str, states: Any) -> Iterator[Block]:
    """Yield the terms of a sum."""
    if not isinstance(states, (list, tuple)) or not states:
        raise ValueError(
            f"`state` must have a list of blocks at {path}.terms, got {shown(states)}."
        )
    for index, state in enumerate(states):
        yield block_of(f"{path}.terms.{index}", state)


def _layout(path: str, state: Any) -> Layout:
    """Return the layout that a state describes."""
    try:
        layout = Layout(**state)
        numbers = {name: torch.empty(own, device="meta") for name, own in _shapes(layout)}
        layout.to_matrix(numbers)
    except Exception as error:
        raise ValueError(f"`state` must have a layout at {path}, got {shown(state)}.") from error
    return layout


def _shapes(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the parameters of a layout."""
    yield layout.weight, layout.weight_shape
    if layout.bias is not None:
        yield layout.bias, layout.bias_shape


def _check_tensor(
    path: str, value: Any, forms: tuple[str | None, ...], sizes: Mapping[str, int]
) -> None:
    """Raise a ``ValueError`` if a tensor has no shape that is allowed, or is not finite."""
    if value is None and None in forms:
        return
    shapes = [tuple(sizes[dim] for dim in form) for form in forms if form is not None]
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not is_dense or not value.is_floating_point() or tuple(value.shape) not in shapes:
        allowed = " or ".join(map(str, map(list, shapes)))
        raise ValueError(
            f"`state` must have a dense floating-point tensor of shape {allowed} at {path}, got "
            f"{shown(value)}."
        )
    if not bool(value.isfinite().all()):
        raise ValueError(f"`state` must have a tensor of finite numbers at {path}.")
