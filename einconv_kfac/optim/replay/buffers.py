"""Copies of buffers that a forward pass changes and depends on.

An example are the vectors of spectral normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

COPIED_ENTRIES = 1 << 16
"""Number of entries up to which a buffer is copied before every forward pass."""


class ChangingBuffers:
    """Copies buffers before each forward pass, so that a replay begins with the same values.

    Buffers of up to `COPIED_ENTRIES` are copied every time, larger ones from the first forward
    pass on that has changed them. Running statistics of batch normalisation in training mode
    are left out, since the outputs do not depend on them.
    """

    def __init__(self) -> None:
        self._large: set[str] = set()
        self._before: dict[str, tuple[int, int]] = {}

    def copied_(self, model: nn.Module) -> dict[str, Tensor]:
        """Return copies by name; call it before a forward pass."""
        buffers = dict(_buffers(model))
        self._before = {name: (id(buffer), buffer._version) for name, buffer in buffers.items()}
        return {
            name: buffer.detach().clone()
            for name, buffer in buffers.items()
            if buffer.numel() <= COPIED_ENTRIES or name in self._large
        }

    def compare_(self, model: nn.Module) -> None:
        """Find the large buffers that the forward pass has changed; call it afterwards."""
        self._large |= {
            name
            for name, buffer in _buffers(model)
            if self._before.get(name) != (id(buffer), buffer._version)
            and buffer.numel() > COPIED_ENTRIES
        }


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that outputs may depend on, with their names."""
    for prefix, module in model.named_modules():
        if not (isinstance(module, _BatchNorm) and module.training):
            yield from module.named_buffers(prefix, recurse=False)
