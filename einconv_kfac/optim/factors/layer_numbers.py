"""Hyper-parameters by layer, looked up again only where groups or layers have changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.hyperparameters import GroupSettings, Hyperparameters


class LayerNumbers:
    """The hyper-parameters of the layers of a model.

    Args:
        layers: The layers, by name; others may come.
        own: The optimizer's hyper-parameters.

    Attributes:
        settings: The hyper-parameters of the coming step.
    """

    def __init__(self, layers: Mapping[str, RunningFactors], own: Hyperparameters) -> None:
        self._layers = layers
        self._weights: dict[str, str] = {}
        self._found: dict[str, dict[str, Any]] = {}
        self.settings = GroupSettings(own)

    def set_(self, own: Hyperparameters, groups: Mapping[str, Hyperparameters]) -> None:
        """Set the optimizer's hyper-parameters, and those of parameters in groups by name."""
        known = self.settings
        if own is not known.own or groups is not known.by_parameter:
            self.restore_(GroupSettings(own, groups))

    def restore_(self, settings: GroupSettings) -> None:
        """Set all hyper-parameters."""
        self.settings, self._found = settings, {}

    def weights(self) -> Mapping[str, str]:
        """Return the names of the layers' weights."""
        weights = {name: own.layer.weight for name, own in self._layers.items()}
        if weights != self._weights:
            self._weights, self._found = weights, {}
        return weights

    def of(self, name: str) -> Mapping[str, Any]:
        """Return a hyper-parameter by layer."""
        weights = self.weights()
        if name not in self._found:
            self._found[name] = self.settings.numbers(name, weights)
        return self._found[name]

    def dampings(self, default: float, decay: Mapping[str, float]) -> dict[str, float]:
        """Return the dampings by layer, see `GroupSettings.dampings`, in units of their weights."""
        found = self.settings.dampings(self.weights(), default, decay)
        return {name: value / self._layers[name].stretch for name, value in found.items()}
