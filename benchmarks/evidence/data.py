"""Fashion-MNIST, and synthetic images of the same shape."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from evidence.examples import Examples, Split

DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
REMEDY = (
    "Install the Debian package dataset-fashion-mnist, or download the four .gz files that "
    "https://github.com/zalandoresearch/fashion-mnist links and name their folder with --data-dir."
)
_MAGIC = {1: 2049, 3: 2051}  # by number of dimensions


@dataclass(frozen=True)
class Sources:
    """Where the images of the tasks come from; they are read when a task first needs them.

    Args:
        directory: The folder of the four files, or ``None`` for synthetic images.
    """

    directory: Path | None = None

    @cached_property
    def images(self) -> Split:
        """Images ``[n, 1, 28, 28]`` between 0 and 1 with their classes ``[n]``."""
        return synthetic() if self.directory is None else fashion_mnist(self.directory)


def at_size(images: Examples, size: int) -> Examples:
    """Return images of ``size`` x ``size``, averaged over squares; ``size`` divides theirs."""
    factor = images.x.shape[-1] // size
    return Examples(avg_pool2d(images.x, factor), images.y) if factor > 1 else images


def fashion_mnist(directory: Path = DIRECTORY) -> Split:
    """Read the 60,000 training and 10,000 test images.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file does not have the IDX format.
    """
    return Split(_images(directory, "train"), _images(directory, "t10k"))


def synthetic(train: int = 1024, test: int = 256, seed: int = 0) -> Split:
    """Return noisy images of ten random smooth prototypes, ``[n, 1, 28, 28]``."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(10, 1, 4, 4, generator=generator)
    prototypes = interpolate(coarse, size=28, mode="bilinear")
    y = torch.randint(10, (train + test,), generator=generator)
    noise = torch.randn(train + test, 1, 28, 28, generator=generator)
    x = (prototypes[y] + 0.3 * noise).clamp(0, 1)
    return Split(Examples(x[:train], y[:train]), Examples(x[train:], y[train:]))


def _images(directory: Path, part: str) -> Examples:
    """Return images and classes of one part."""
    pixels = _read(directory / f"{part}-images-idx3-ubyte.gz", 3)
    return Examples(
        pixels.unsqueeze(1).float() / 255, _read(directory / f"{part}-labels-idx1-ubyte.gz", 1)
    )


def _read(path: Path, dimensions: int) -> Tensor:
    """Return the bytes of a file in the IDX format as integers."""
    if not path.is_file():
        raise FileNotFoundError(f"Fashion-MNIST needs {path.name} in {path.parent}. {REMEDY}")
    raw = gzip.decompress(path.read_bytes())
    magic, *shape = struct.unpack_from(f">{1 + dimensions}i", raw)
    start = 4 * (1 + dimensions)
    if magic != _MAGIC[dimensions] or len(raw) - start != prod(shape):
        raise ValueError(f"{path.name} must be a complete IDX file of {dimensions} dimension(s).")
    return torch.tensor(memoryview(raw)[start:], dtype=torch.uint8).long().reshape(shape)
