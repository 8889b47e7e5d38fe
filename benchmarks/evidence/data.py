"""Fashion-MNIST, and synthetic images of the same shape."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
REMEDY = (
    "Install the Debian package dataset-fashion-mnist, or download the four .gz files that "
    "https://github.com/zalandoresearch/fashion-mnist links and name their folder with --data-dir."
)
_MAGIC = {1: 2049, 3: 2051}  # by number of dimensions


@dataclass(frozen=True)
class Images:
    """Images ``[n, 1, h, w]`` between 0 and 1 with their classes ``[n]``."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.x)

    def first(self, count: int) -> Images:
        """Return the first images."""
        return Images(self.x[:count], self.y[:count])

    def at_size(self, size: int) -> Images:
        """Return images of ``size`` x ``size``, averaged over squares; ``size`` divides theirs."""
        factor = self.x.shape[-1] // size
        return Images(avg_pool2d(self.x, factor), self.y) if factor > 1 else self


@dataclass(frozen=True)
class Split:
    """Images to train on and images to test on."""

    train: Images
    test: Images

    def at_size(self, size: int) -> Split:
        """Return the split with averaged-down images."""
        return Split(self.train.at_size(size), self.test.at_size(size))


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
    return Split(Images(x[:train], y[:train]), Images(x[train:], y[train:]))


def _images(directory: Path, part: str) -> Images:
    """Return images and classes of one part."""
    pixels = _read(directory / f"{part}-images-idx3-ubyte.gz", 3)
    return Images(
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
