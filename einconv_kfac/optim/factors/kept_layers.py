"""Layers of a divided model that stay whole from a forward pass to its backward pass.

A backward pass of a loss that is not recorded, on one worker alone, gathers layers one by one as
torch does, while those of other workers need all of them for factors. Nothing is gathered in either
if no layer is divided after the forward pass.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from einconv_kfac.curvature.estimation.capture import LayerCapture
from einconv_kfac.optim.recording.call_hooks import Hook
from einconv_kfac.torch_versions import is_fully_sharded, parameter_groups


class KeptLayers:
    """Has `fully_shard` not divide layers after forward passes whose layer calls are recorded.

    Args:
        model: The model; one that is not divided is left alone.
        capture: Records the calls of layers, where factors are due.
    """

    def __init__(self, model: nn.Module, capture: LayerCapture) -> None:
        self._capture, self._held = weakref.ref(capture), dict[Any, Any]()
        hold, release = Hook(self._hold_), Hook(self._release_)
        divided = [module for module in model.modules() if is_fully_sharded(module)]
        self._handles = [own.register_forward_hook(hold, prepend=True) for own in divided]
        self._handles += [own.register_forward_hook(release) for own in divided]

    def remove(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _hold_(self, module: nn.Module, *_: Any) -> None:
        """Before the hook that divides a layer: have it not do so."""
        capture = self._capture()
        if capture is None or not (capture.enabled and torch.is_grad_enabled()):
            return
        for group in parameter_groups(module):
            self._held.setdefault(group, group.post_forward_mesh_info)
            group.post_forward_mesh_info = None

    def _release_(self, module: nn.Module, *_: Any) -> None:
        """After the hook that divides a layer: have it do so again."""
        for group in parameter_groups(module):
            if group in self._held:
                group.post_forward_mesh_info = self._held.pop(group)
