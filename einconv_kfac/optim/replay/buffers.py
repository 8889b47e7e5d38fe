"""Buffers that a forward pass changes and depends on, as spectral normalisation's vectors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SMALL = 1 << 16
"""Entries up to which a buffer is copied before every forward pass."""


class ChangingBuffers:
    """Copies buffers before a forward pass, so that it can run again from where it began.

    Small ones are copied every time, larger ones once a forward pass changed them. Running
    statistics are left out: they follow the outputs of a forward pass and do not enter these.
    """

    def __init__(self) -> None:
        self._large: set[str] = set()
        self._before: dict[str, tuple[int, int]] = {}

    def copied(self, model: nn.Module) -> dict[str, Tensor]:
        """Return copies by name, before a forward pass."""
        buffers = dict(_buffers(model))
        self._before = {name: (id(buffer), buffer._version) for name, buffer in buffers.items()}
        return {
            name: buffer.detach().clone()
            for name, buffer in buffers.items()
            if buffer.numel() <= SMALL or name in self._large
        }

    def notice_(self, model: nn.Module) -> None:
        """Notice which buffers the forward pass changed."""
        self._large |= {
            name
            for name, buffer in _buffers(model)
            if self._before.get(name) != (id(buffer), buffer._version) and buffer.numel() > SMALL
        }


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that may enter outputs and change."""
    for prefix, module in model.named_modules():
        if not (isinstance(module, _BatchNorm) and module.training):
            yield from module.named_buffers(prefix, recurse=False)
