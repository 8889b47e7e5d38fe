"""A torchvision of another build than torch, which libraries import, is made importable."""

from __future__ import annotations

from typing import Any

import torch

KEPT: list[Any] = []


def _declared() -> None:
    """Declare the operators of torchvision that it cannot register itself."""
    try:
        import torchvision  # noqa: F401, PLC0415
    except Exception:  # it does not match this torch
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


_declared()
