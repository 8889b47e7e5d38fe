"""Layers against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from einconv_kfac.modules import ConvNd, ConvTransposeNd, FoldNd, UnfoldNd, convert

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


TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
TRANSPOSED_OPTIONS = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    {"dilation": 2, "bias": False},
]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("options", TRANSPOSED_OPTIONS, ids=str)
def test_transposed_layer_equals_torch(ndim: int, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    torchs = TRANSPOSED[ndim](4, 6, 3, **options, dtype=torch.float64)
    torch.manual_seed(0)
    ours = ConvTransposeNd(ndim, 4, 6, 3, **options, dtype=torch.float64)
    x = torch.randn(2, 4, *[6, 4, 5][:ndim], dtype=torch.float64)
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(ours(x[0]), torchs(x[0]))
    shown = repr(torchs).replace(f"ConvTranspose{ndim}d(", f"ConvTransposeNd({ndim}, ")
    assert repr(ours) == shown
    torch.testing.assert_close(ConvTransposeNd.from_nn_ConvTranspose(torchs)(x), torchs(x))
    if "output_padding" in options:
        size = [s - 1 for s in torchs(x).shape[2:]]
        torch.testing.assert_close(ours(x, size), torchs(x, size))
        with pytest.raises(ValueError, match="`output_size` must be between"):
            ours(x, [1] * ndim)


def test_fold_equals_torch() -> None:
    x = torch.randn(2, 27, 12)
    torch.testing.assert_close(FoldNd((6, 7), 3, 1, 1, 2)(x), nn.Fold((6, 7), 3, 1, 1, 2)(x))
    shown = repr(nn.Fold((6, 7), 3)).replace("Fold(", "FoldNd(")
    assert repr(FoldNd((6, 7), 3)) == shown


def test_conversion_leaves_subclasses_with_behaviour_of_their_own() -> None:
    class Renamed(nn.Conv2d):
        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            state[prefix + "weight"] = state.pop(prefix + "kernel")
            super()._load_from_state_dict(state, prefix, *rest)

    class Named(nn.Conv1d):
        role = "stem"

    class Doubled(nn.ConvTranspose2d):
        def __call__(self, *arguments: Any) -> Any:
            return 2 * super().__call__(*arguments)

    class Shown(nn.Conv2d):
        """A documented one."""

        def __init__(self) -> None:
            super().__init__(2, 2, 1)

        def extra_repr(self) -> str:
            return "shown"

    model = nn.Sequential(Renamed(2, 2, 1), Named(2, 2, 1), Doubled(2, 2, 1), Shown())
    x = torch.randn(1, 2, 3, 3)
    doubled = model[2](x)
    convert(model)
    assert [type(layer) for layer in model] == [Renamed, Named, Doubled, ConvNd]
    torch.testing.assert_close(model[2](x), doubled)


def test_conversion_keeps_what_it_must() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    class Tagged(nn.Conv1d):
        pass

    shared = nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular")
    shared.register_forward_hook(lambda module, arguments, output: output + 1)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1))
    model = nn.Sequential(shared, nn.Sequential(shared, Own(2, 2, 1)), normed, nn.LazyConv2d(3, 1))
    x = torch.randn(2, 2, 5, 5)
    expected = model[:3](x)
    parameters = [id(p) for p in model[:3].parameters()]
    converted = convert(model)
    assert converted is model
    assert type(model[0]) is ConvNd
    assert model[0] is model[1][0]
    assert type(model[1][1]) is Own
    assert type(model[2]) is type(normed)
    assert type(model[3]) is nn.LazyConv2d
    assert [id(p) for p in model[:3].parameters()] == parameters
    torch.testing.assert_close(model[:3](x), expected)
    assert type(convert(Tagged(2, 2, 1))) is ConvNd
    assert type(convert(nn.ConvTranspose3d(2, 2, 1))) is ConvTransposeNd
