"""Parameters as matrices, and back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from einconv_kfac.curvature import Layout

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
