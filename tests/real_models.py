"""Real models that were not built for this, at the smallest sizes, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from evidence.vision import torchvision_module
from torch import Tensor, nn

from einconv_kfac.curvature import LayerRule, register_layer
from einconv_kfac.curvature.layers.scale_rule import ChannelNormRule


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


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

        def normalized(self, module: Any, x: Tensor) -> Tensor:
            normed = nn.functional.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=module.eps)
            return normed.movedim(-1, 1)

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
