"""The tasks (a) to (m), each in three sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch.nn import Linear

from evidence.families.images import Classification, Reconstruction
from evidence.families.linear_models import CANCER, DIABETES, LinearRegression, LogisticRegression
from evidence.families.photograph import NeuralField, Photograph
from evidence.families.physics import Poisson, PoissonResidual
from evidence.families.text import Text
from evidence.models import conv_autoencoder, deep_autoencoder, plain_cnn, resnet20, small_cnn
from evidence.sequence_models import CharacterTransformer, RowsLSTM, VisionTransformer
from evidence.task import Task

SIZES = (784, 1000, 500, 250, 30)
_CNN = partial(small_cnn, 14, (16, 32), 64)
_AUTOENCODER = partial(conv_autoencoder, 28, 8, 30)
_FEW = Classification(28, 20_000)
_TINY = Classification(14, 256)

TASKS = {
    task.name: task
    for task in (
        Task("a", "CNN, batch 128", _CNN, 128, 1500, Classification(14)),
        Task("b", "CNN, batch 2048", _CNN, 2048, 150, Classification(14)),
        Task("c", "20 plain layers", partial(plain_cnn, 8), 128, 450, Classification()),
        Task("d", "ResNet-20", partial(resnet20, 8), 128, 480, Classification(14, 20_000)),
        Task("e", "convolutional autoencoder", _AUTOENCODER, 500, 240, Reconstruction()),
        Task("f", "deep autoencoder", partial(deep_autoencoder, SIZES), 500, 160, Reconstruction()),
        Task("g", "linear regression", partial(Linear, 20, 1), DIABETES, 300, LinearRegression()),
        Task("h", "logistic regression", partial(Linear, 30, 2), CANCER, 300, LogisticRegression()),
        Task("i", "LSTM over rows", partial(RowsLSTM, 28, 48), 128, 250, _FEW),
        Task("j", "Poisson problem", partial(PoissonResidual, 32), 600, 250, Poisson()),
        Task("k", "character transformer", partial(CharacterTransformer, 32, 48), 32, 300, Text()),
        Task("l", "photograph as a neural field", NeuralField, 1024, 300, Photograph()),
        Task("m", "vision transformer", partial(VisionTransformer, 28, 7, 48), 128, 250, _FEW),
    )
}
"""The standard tasks."""

_FULL: dict[str, dict[str, Any]] = {
    "a": {"model": partial(small_cnn, 28, (32, 64), 128), "steps": 2350},
    "b": {"model": partial(small_cnn, 28, (32, 64), 128), "steps": 300},
    "c": {"model": partial(plain_cnn, 32), "steps": 2350},
    "d": {"model": partial(resnet20, 16), "steps": 2350, "family": _FEW},
    "e": {"model": partial(conv_autoencoder, 28, 32, 30), "steps": 1200},
    "f": {"steps": 1200},
    "i": {"model": partial(RowsLSTM, 28, 128), "steps": 2350},
    "j": {"model": partial(PoissonResidual, 64), "steps": 1000},
    "k": {"model": partial(CharacterTransformer, 64, 128, 4), "steps": 2000, "family": Text(64)},
    "l": {"steps": 2000, "family": Photograph(2)},
    "m": {"model": partial(VisionTransformer, 28, 4, 96, 6), "steps": 2350},
}
_FULL |= {name: {**_FULL[name], "family": Classification()} for name in "abim"}
_QUICK: dict[str, dict[str, Any]] = {
    "a": {"model": partial(small_cnn, 14, (2, 4), 8), "batch_size": 32},
    "b": {"model": partial(small_cnn, 14, (2, 4), 8), "batch_size": 64},
    "c": {"model": partial(plain_cnn, 2, 6), "batch_size": 16, "family": Classification(14)},
    "d": {"model": partial(resnet20, 2, 1), "batch_size": 16, "family": _TINY},
    "e": {"model": partial(conv_autoencoder, 28, 2, 4), "batch_size": 32},
    "f": {"model": partial(deep_autoencoder, (784, 16, 8, 4)), "batch_size": 32},
    "i": {"model": partial(RowsLSTM, 14, 4), "batch_size": 16, "family": _TINY},
    "j": {"model": partial(PoissonResidual, 4), "batch_size": 32, "family": Poisson(32)},
    "k": {"model": partial(CharacterTransformer, 16, 8, 1), "batch_size": 8, "family": Text(16, 2)},
    "l": {"model": partial(NeuralField, 4, 8), "batch_size": 32, "family": Photograph(32)},
    "m": {"model": partial(VisionTransformer, 14, 7, 8, 1), "batch_size": 16, "family": _TINY},
}


def tasks(size: str = "standard") -> dict[str, Task]:
    """Return the tasks by letter; ``size`` is ``"standard"``, ``"full"`` or ``"quick"``."""
    if size == "full":
        return {name: replace(task, **_FULL.get(name, {})) for name, task in TASKS.items()}
    if size == "quick":
        return {
            name: replace(task, steps=6, evaluations=3, **_QUICK.get(name, {}))
            for name, task in TASKS.items()
        }
    return dict(TASKS)
