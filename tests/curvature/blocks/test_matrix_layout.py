"""Parameters as matrices, and back."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest
import torch

from einconv_kfac.curvature import EigenBlock, KroneckerBlock, KroneckerFactors, Layout
from einconv_kfac.curvature.blocks.block import Block

LAYOUTS = {
    "linear": Layout("w", "b", (4, 3), (1, 4, 3), (0, 1, 2), (4,)),
    "grouped": Layout("w", "b", (4, 2, 3, 1), (2, 2, 2, 3, 1), (0, 1, 2, 3, 4), (4,)),
    "transposed": Layout("w", None, (4, 3, 2), (2, 2, 3, 2), (0, 2, 1, 3)),
    "cycle": Layout("w", None, (2, 3, 4), (2, 3, 4), (1, 2, 0)),  # not its own inverse
}


@pytest.mark.parametrize("free", [(), (5,), (2, 3)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_matrices_by_definition(name: str, free: tuple[int, ...]) -> None:
    layout = LAYOUTS[name]
    torch.manual_seed(0)
    tensors = {"w": torch.randn(*free, *layout.weight_shape)}
    if layout.bias is not None:
        tensors["b"] = torch.randn(*free, *layout.bias_shape)
    matrix = layout.to_matrix(tensors)
    assert matrix.shape == (*free, *layout.shape)
    assert tensors.keys() == set(layout.parameters)
    weight = tensors["w"].reshape(-1, *layout.split)
    flat = matrix.reshape(-1, *layout.shape)
    for vector, rows in zip(weight, flat):
        permuted = vector.permute(layout.order)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in permuted.shape[:2])):
            g, co = index.tolist()
            expected = permuted[g, co].flatten()
            torch.testing.assert_close(rows[g, co, : len(expected)], expected, rtol=0, atol=0)
    back = layout.from_matrix(matrix)
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


def test_equality_and_copies() -> None:
    layout = LAYOUTS["transposed"]
    again = Layout(**layout.state_dict())
    assert layout == again == copy.deepcopy(layout) == pickle.loads(pickle.dumps(layout))
    assert hash(layout) == hash(again)
    assert layout != LAYOUTS["cycle"]
    assert again.shape == (2, 3, 4)
    assert "shape" not in layout.state_dict()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": 3}, "`weight` must be a parameter's name, got 3"),
        ({"bias": 3}, "`bias` must be a parameter's name, got 3"),
        ({"weight_shape": 3}, "`weight_shape` must be a tuple of integers"),
        ({"weight_shape": (4.0, 3)}, "`weight_shape` must be a tuple of integers"),
        ({"split": (1, 4, -3)}, "`split` must be a tuple of integers"),
        ({"split": (1, 4, 2**70)}, "`split` must be a tuple of integers"),
        ({"split": (1, 4, 4)}, "`split` must have the 12 entries"),
        ({"order": (0, 1)}, "`order` must be a permutation of the 3 dimensions"),
        ({"order": (0, 1, 1)}, "`order` must be a permutation"),
        ({"split": (12,), "order": (0,)}, "at least two, got"),
        ({"bias_shape": (3,)}, "`bias_shape` must have 4 entries"),
    ],
)
def test_wrong_layouts_are_refused(changed: dict[str, Any], message: str) -> None:
    given = {**LAYOUTS["linear"].state_dict(), **changed}
    with pytest.raises(ValueError, match=message):
        Layout(**given)


def test_lists_are_tuples() -> None:
    given = LAYOUTS["transposed"].state_dict()
    lists = {name: list(own) if isinstance(own, tuple) else own for name, own in given.items()}
    assert Layout(**lists) == LAYOUTS["transposed"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (KroneckerBlock(torch.eye(3)[None], torch.eye(4)[None], LAYOUTS["linear"]), "`A` of 'fc'"),
        (KroneckerBlock(torch.eye(4)[None], torch.eye(4), LAYOUTS["linear"]), "`B` of 'fc'"),
        (EigenBlock(None, None, torch.ones(1, 4, 3), LAYOUTS["linear"]), "`values` of 'fc'"),
        (KroneckerBlock(torch.eye(4), torch.eye(4), cast("Layout", 3)), "a Layout as the `layout`"),
    ],
)
def test_blocks_that_do_not_fit_their_layout_are_refused(block: Block, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KroneckerFactors({"fc": block})
