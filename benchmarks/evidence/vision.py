"""torchvision's models, even if its binary was built for another version of torch."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn


@cache
def declare_vision_operators() -> torch.library.Library:
    """Declare the operators that torchvision's models import but do not call.

    They are missing if torchvision's binary was built for another version of torch.
    """
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    return library


def torchvision_module(name: str) -> Any:
    """Import and return a module of torchvision's models."""
    try:
        return import_module(f"torchvision.models.{name}")
    except RuntimeError:
        declare_vision_operators()
        for loaded in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[loaded]  # half-initialised by the failed import
        return import_module(f"torchvision.models.{name}")


def resnet18() -> nn.Module:
    """Return ResNet-18 for 32x32 images: a 3x3 stem of stride 1, no pooling after it."""
    model: nn.Module = torchvision_module("resnet").resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model
