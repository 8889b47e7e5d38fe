"""Layers against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from einconv_kfac.modules import ConvNd, UnfoldNd

LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
OPTIONS = [
    {},
    {"stride": 2, "padding": 1, "groups": 2},
    {"padding": "same", "dilation": 2, "bias": False},
    {"padding": "valid"},
]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@MODES
def test_layer_equals_torch(ndim: int, options: dict[str, object], mode: str) -> None:
    torch.manual_seed(0)
    torchs = LAYERS[ndim](4, 6, 3, **options, padding_mode=mode, dtype=torch.float64)
    torch.manual_seed(0)
    ours = ConvNd(ndim, 4, 6, 3, **options, padding_mode=mode, dtype=torch.float64)
    for name, parameter in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], parameter)
    x = torch.randn(2, 4, *[6, 7, 5][:ndim], dtype=torch.float64)
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(ours(x[0]), torchs(x[0]))
    assert repr(ours) == repr(torchs).replace(f"Conv{ndim}d(", f"ConvNd({ndim}, ")
    torch.testing.assert_close(ConvNd.from_nn_Conv(torchs)(x), torchs(x))


def test_from_nn_conv_copies() -> None:
    class Special(nn.Conv2d):
        pass

    source = Special(2, 3, 3).requires_grad_(False).eval()
    state = torch.get_rng_state()
    layer = ConvNd.from_nn_Conv(source, simplify=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not layer.weight.requires_grad
    assert not layer.training
    assert layer.weight.data_ptr() != source.weight.data_ptr()
    assert repr(layer).endswith("simplify=False)")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Conv1d.*ConvTranspose2d"):
        ConvNd.from_nn_Conv(nn.ConvTranspose2d(2, 3, 3))


def test_unfold_equals_torch() -> None:
    x = torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(UnfoldNd(3, 1, 1, 2)(x), nn.Unfold(3, 1, 1, 2)(x))
    assert repr(UnfoldNd((3, 2))) == repr(nn.Unfold((3, 2))).replace("Unfold(", "UnfoldNd(")
