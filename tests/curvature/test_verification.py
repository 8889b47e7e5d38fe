"""Coverage and self-check, on small models and on real ones that were not built for this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from evidence.vision import torchvision_module
from ggn import dense_ggn
from torch import Tensor, nn

from einconv_kfac.curvature import LayerRule, coverage, kronecker_factors, register_layer, verify
from einconv_kfac.curvature.rules import ChannelNormRule


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_numbers_are_those_of_dense_matrices(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3), nn.PReLU()
    ).double()
    x, y, loss_fn = random(4, 2, 3, 3), torch.tensor([0, 1, 2, 1]), nn.CrossEntropyLoss()
    found = verify(model, loss_fn, (x, y), kind=kind)
    factors = kronecker_factors(model, loss_fn, [(x, y)], fisher="exact", kind=kind)
    for row in found.layers:
        exact = dense_ggn(model, loss_fn, x, y, row.layer)
        ours = factors[row.layer].to_dense()
        assert row.relative_error == pytest.approx(float((ours - exact).norm() / exact.norm()))
        assert row.cosine == pytest.approx(float((ours * exact).sum() / ours.norm() / exact.norm()))
        trace = exact.diagonal(dim1=-2, dim2=-1).sum() / ours.diagonal(dim1=-2, dim2=-1).sum()
        assert row.trace_ratio == pytest.approx(float(1 / trace))
    assert found.loss_scale == pytest.approx(1)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "relative", "error", "cosine", "trace", "ratio"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "3"]
    assert "4.weight   PReLU  -      no rule covers PReLU" in lines[-1]


def test_a_wrong_loss_rule_shows() -> None:
    class Doubled(nn.MSELoss):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(output, target) + output.square().mean() * target.mean()

    model, x = nn.Linear(3, 2).double(), random(4, 3)
    y = random(4, 2)
    assert verify(model, Doubled(), (x, y)).loss_scale == pytest.approx(1)  # autograd knows it
    weights = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0], dtype=torch.float64))

    class Halved(nn.CrossEntropyLoss):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return super().forward(output, target) / 2

    labels = torch.tensor([0, 1, 1, 0])
    assert verify(model, weights, (x, labels)).loss_scale == pytest.approx(1)
    assert verify(model, Halved(), (x, labels)).loss_scale == pytest.approx(2)


def test_coverage_of_odd_models() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Renamed(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "own": Own(2, 2),
            "renamed": Renamed(2, 2),
            "norm": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "frozen": nn.Linear(2, 2),
            "embedding": nn.Embedding(9000, 2),
            "gru": nn.GRU(2, 2),
        }
    )
    model["frozen"].weight.requires_grad_(False)
    reasons = {row.parameter: row.reason for row in coverage(model)}
    assert reasons["renamed.weight"] == ""
    assert "Own has a forward pass of its own" in reasons["own.weight"]
    assert "parametrized" in reasons["norm.parametrizations.weight.original0"]
    assert reasons["frozen.weight"] == "it is frozen"
    assert reasons["frozen.bias"] == "its weight is frozen"
    assert "more than 8192 embeddings" in reasons["embedding.weight"]
    assert "no rule covers GRU" in reasons["gru.weight_ih_l0"]
    assert len(coverage(model).gaps()) == len(reasons) - 2


def residual() -> tuple[nn.Module, Tensor, set[str]]:
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.ResNet(
        "basic", [1, 1, 1, 1], [4, 4, 8, 8], spatial_dims=2, n_input_channels=2, num_classes=3
    )
    return model, random(3, 2, 12, 12), set()


def video() -> tuple[nn.Module, Tensor, set[str]]:
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.ResNet(
        "basic", [1, 1, 1, 1], [4, 4, 4, 4], spatial_dims=3, n_input_channels=1, num_classes=3
    )
    return model, random(3, 1, 8, 8, 8), set()


def separable() -> tuple[nn.Module, Tensor, set[str]]:
    mobilenet = torchvision_module("mobilenetv2")
    settings = [[1, 16, 1, 1], [6, 24, 1, 2]]
    model = mobilenet.MobileNetV2(3, 0.25, inverted_residual_setting=settings, dropout=0.0)
    model.classifier[1], model.features[-1] = nn.Linear(8, 3), nn.Identity()
    return model, random(3, 3, 12, 12), set()


def inception() -> tuple[nn.Module, Tensor, set[str]]:
    blocks = torchvision_module("inception")
    layers = [blocks.InceptionC(3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, 3)]
    return nn.Sequential(*layers), random(3, 3, 7, 7), set()


def channels_last() -> tuple[nn.Module, Tensor, set[str]]:
    convnext = torchvision_module("convnext")

    class LastNormRule(ChannelNormRule):
        """A layer norm over the channels of ``[n, c, *s]``: a registered rule of few lines."""

        def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
            normed = nn.functional.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=module.eps)
            return self.outputs(module, normed.movedim(-1, 1))

        def accepts(self, module: Any, x: Tensor) -> bool:
            return x.ndim == 4

        input_factor = LayerRule.input_factor

    register_layer(convnext.LayerNorm2d, LastNormRule())
    setting = [convnext.CNBlockConfig(4, 8, 1), convnext.CNBlockConfig(8, None, 1)]
    model = convnext.ConvNeXt(setting, num_classes=3)
    return model, random(3, 3, 16, 16), {"features.1.0.layer_scale", "features.3.0.layer_scale"}


def transformer() -> tuple[nn.Module, Tensor, set[str]]:
    vision = torchvision_module("vision_transformer")
    model = vision.VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    return model, random(3, 3, 8, 8), {"class_token", "encoder.pos_embedding"}


def unet(dimensions: int) -> tuple[nn.Module, Tensor, set[str]]:
    nets = pytest.importorskip("monai.networks.nets")
    options: dict[str, Any] = {"num_res_units": 1, "act": "RELU", "norm": "BATCH"}
    model = nets.UNet(dimensions, 1, 3, (2, 4, 4), (2, 2), **options)
    return model, random(3, 1, *[4] * dimensions if dimensions > 1 else [8]), set()


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, set[str]]]] = {
    "residual": residual,
    "video": video,
    "separable": separable,
    "inception": inception,
    "channels-last": channels_last,
    "transformer": transformer,
    "unet-1d": lambda: unet(1),
    "unet-3d": lambda: unet(3),
}


@pytest.mark.filterwarnings("ignore")  # the models' own
@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str) -> None:
    torch.manual_seed(0)
    model, x, gaps = MODELS[name]()
    model = model.double().eval()
    y = torch.zeros_like(model(x)).argmax(1)
    found = verify(model, nn.CrossEntropyLoss(), (x, y), kind="ekfac")
    assert {row.parameter for row in found.gaps} == gaps
    assert found.loss_scale == pytest.approx(1)
    for row in found.layers:  # corrected eigenvalues keep the trace where nothing is left out
        if "norm" not in row.layer and "bn" not in row.layer:
            assert row.trace_ratio == pytest.approx(1, rel=1e-6), row
    assert len(coverage(model)) == len(list(model.parameters()))
