"""Linear and logistic regression on measurements as they are: badly scaled, all in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor, nn

from evidence.data import Sources
from evidence.examples import Examples, Split
from evidence.families.images import accuracy
from evidence.task import Family

DIABETES, CANCER = 354, 427
"""Patients to train on, out of 442 and 569."""
_SPREAD = 77.0  # standard deviation of the diabetes targets


@dataclass(frozen=True)
class LinearRegression(Family):
    """Progression of diabetes from ten measurements and their squares; the test is the loss."""

    metric: ClassVar[str] = "test loss"
    rates: ClassVar[Mapping[str, tuple[float, float]]] = {
        "SGD": (1e-12, 1e-8),
        "AdamW": (3e-2, 30.0),
        "SOAP": (1.0, 100.0),
        "Muon": (3e-2, 30.0),
    }

    @property
    def description(self) -> str:
        """See `Family`."""
        return f"20 features, {DIABETES} patients"

    def data(self, sources: Sources) -> Split:
        """See `Family`."""
        load = import_module("sklearn.datasets").load_diabetes
        x, y = (torch.tensor(array).float() for array in load(return_X_y=True, scaled=False))
        return _shuffled(torch.cat([x, x.square()], 1), y[:, None] / _SPREAD, DIABETES)

    def loss_fn(self) -> nn.Module:
        """See `Family`."""
        return nn.MSELoss()

    def test(self, model: nn.Module, examples: Examples) -> float:
        """See `Family`."""
        return float(self.loss(self.loss_fn(), model(examples.x), examples.x, examples.y))


@dataclass(frozen=True)
class LogisticRegression(Family):
    """Malignant or benign tumours from 30 measurements; the test is accuracy."""

    metric: ClassVar[str] = "test %"
    scale: ClassVar[float] = 100.0
    rates: ClassVar[Mapping[str, tuple[float, float]]] = {
        "SGD": (1e-8, 1e-4),
        "AdamW": (1e-3, 1.0),
        "SOAP": (1e-3, 1.0),
        "Muon": (1e-3, 1.0),
    }

    @property
    def description(self) -> str:
        """See `Family`."""
        return f"30 features, {CANCER} patients"

    def data(self, sources: Sources) -> Split:
        """See `Family`."""
        x, y = import_module("sklearn.datasets").load_breast_cancer(return_X_y=True)
        return _shuffled(torch.tensor(x).float(), torch.tensor(y), CANCER)

    def loss_fn(self) -> nn.Module:
        """See `Family`."""
        return nn.CrossEntropyLoss()

    def test(self, model: nn.Module, examples: Examples) -> float:
        """See `Family`."""
        return accuracy(model, examples)


def _shuffled(x: Tensor, y: Tensor, train: int) -> Split:
    """Return a split of shuffled examples."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return Split(Examples(x[:train], y[:train]), Examples(x[train:], y[train:]))
