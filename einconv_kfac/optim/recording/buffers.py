"""Copies of buffers that a forward pass changes and depends on.

An example are the vectors of spectral normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from einconv_kfac.optim.replay.versions import version_of

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

    def copied_(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Return copies by name; call it before a forward pass.

        Args:
            modules: The modules of the model by name.
        """
        buffers = _buffers(modules)
        self._before = {name: (id(buffer), version_of(buffer)) for name, buffer in buffers.items()}
        return {
            name: buffer.detach().clone()
            for name, buffer in buffers.items()
            if buffer.numel() <= COPIED_ENTRIES or name in self._large
        }

    def compare_(self, modules: Mapping[str, nn.Module]) -> None:
        """Find the large buffers that the forward pass has changed; call it afterwards.

        Args:
            modules: The modules of the model by name.
        """
        self._large |= {
            name
            for name, buffer in _buffers(modules).items()
            if buffer.numel() > COPIED_ENTRIES
            and self._before.get(name) != (id(buffer), version_of(buffer))
        }


def _buffers(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the buffers that outputs may depend on, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in modules.items()
        if module._buffers and not (isinstance(module, _BatchNorm) and module.training)
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
