"""Characters of the standard library's sources, each predicted from those before it."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from evidence.data import Sources
from evidence.examples import Examples, Split
from evidence.sequence_models import SYMBOLS
from evidence.task import Family, chunks

_FILES = ("argparse", "ast", "datetime", "pickle", "difflib", "doctest", "inspect", "tarfile")


@dataclass(frozen=True)
class Text(Family):
    """The next character, by cross-entropy; the test is the loss on later text.

    The text differs between versions of Python.

    Args:
        length: Characters of an example.
        files: Number of files that are read, one of them to test on.
    """

    length: int = 32
    files: int = 8
    metric: ClassVar[str] = "test nats"
    rates: ClassVar[Mapping[str, tuple[float, float]]] = {
        "SGD": (2.32e-2, 3.87),
        "AdamW": (4.37e-3, 0.175),
    }
    evaluated: ClassVar[int] = 256

    @property
    def description(self) -> str:
        """See `Family`."""
        return f"{self.length} characters, {self.files} files of Python's library"

    def data(self, sources: Sources) -> Split:
        """See `Family`; sequences are shuffled."""
        parts = [self._sequences(name) for name in _FILES[: self.files]]
        train, test = torch.cat(parts[:-1]), parts[-1][:200]
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
        return Split(*(Examples(part[:, :-1], part[:, 1:]) for part in (train, test)))

    def _sequences(self, name: str) -> Tensor:
        """Return the characters of a file, ``[n, length + 1]``; one stands for all beyond ASCII."""
        path = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
        if not path.is_file():
            raise FileNotFoundError(f"The text needs {path.name} in {path.parent}.")
        raw = torch.tensor(list(path.read_bytes()))
        raw = torch.where(raw < SYMBOLS, raw, 0)
        size = self.length + 1
        return raw[: len(raw) // size * size].view(-1, size)

    def loss_fn(self) -> nn.Module:
        """See `Family`."""
        return nn.CrossEntropyLoss()

    def loss(self, loss_fn: nn.Module, output: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """See `Family`; averaged over characters as well."""
        loss: Tensor = loss_fn(output.flatten(0, 1), y.flatten())
        return loss

    def test(self, model: nn.Module, examples: Examples) -> float:
        """See `Family`."""
        total = sum(
            float(self.loss(self.loss_fn(), model(x), x, y)) * len(x) for x, y in chunks(examples)
        )
        return total / len(examples)
