"""Copies of buffers and parameters that a forward pass changes and depends on.

Examples are the vectors of spectral normalisation, a second encoder that follows the trained one
(momentum contrast), and codes that follow averages of latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from einconv_kfac.optim.replay.layer_jvp import batch_norms
from einconv_kfac.optim.replay.loss_input import CarriedBuffer
from einconv_kfac.optim.replay.versions import version_of

COPIED_ENTRIES = 1 << 16
"""Number of entries up to which a buffer is copied before every forward pass."""
FROZEN_ENTRIES = 1 << 25
"""Number of entries of all frozen parameters that are copied before the first step."""


class ChangingBuffers:
    """Copies buffers before each forward pass, so that a replay begins with the same values.

    Buffers of up to `COPIED_ENTRIES` are copied every time, larger ones from the first forward
    pass on that has changed them. Running statistics of batch normalisation in training mode
    are left out, since the outputs do not depend on them. Frozen parameters are copied before
    the first step, and then those that a forward pass has changed.

    Attributes:
        is_first: Whether the first step is still to come.
        curved: The buffers with a graph when they were copied last, by name.
    """

    def __init__(self) -> None:
        self._changing: set[str] = set()
        self._before: dict[str, tuple[int, ...]] = {}
        self._copies: dict[str, Tensor] = {}  # of the call that is running
        self.is_first = True
        self.curved: dict[str, Tensor] = {}

    def copied_(
        self, modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """Return copies by name, which `compare_` may reduce; call it before a forward pass.

        Args:
            modules: The modules of the model by name.
            parameters: Its parameters by name.
        """
        buffers, frozen = _buffers(modules), _frozen(parameters)
        self.curved = _with_graph(buffers)
        self._before = _states({**buffers, **frozen})
        changing, size = self._changing, 0
        copied = {n for n, b in buffers.items() if b.numel() <= COPIED_ENTRIES or n in changing}
        for name, parameter in frozen.items():
            size += parameter.numel() if self.is_first else 0
            if name in changing or (self.is_first and size <= FROZEN_ENTRIES):
                copied.add(name)
        self._copies = {
            name: tensor.detach().clone()
            for name, tensor in {**buffers, **frozen}.items()
            if name in copied
        }
        return self._copies

    def compare_(
        self,
        called: nn.Module,
        modules: Mapping[str, nn.Module],
        parameters: Mapping[str, nn.Parameter],
    ) -> list[tuple[CarriedBuffer, Tensor]]:
        """Find what the forward pass has changed; call it afterwards.

        Parameters in whose place it put others have the values that it began with.

        Frozen parameters on a processor are read, as their versions do not tell of a change of
        ``.data``. Copies of those that have not changed are dropped.

        Args:
            called: The module that was called.
            modules: The modules of the model by name.
            parameters: Its parameters by name, as they were before.

        Returns:
            The buffers that it left with a graph, on which later calls may depend.
        """
        buffers, frozen = _buffers(modules), _frozen(parameters)
        large = {name: b for name, b in buffers.items() if b.numel() > COPIED_ENTRIES}
        states = _states({**large, **frozen})
        self._changing |= {name for name, own in states.items() if self._before.get(name) != own}
        self._copies |= {n: p.detach().clone() for n, p in _replaced(modules, parameters)}
        for name in [name for name in self._copies if name in frozen]:
            copy, present = self._copies[name], frozen[name].detach()
            if name not in self._changing and present.is_cpu and not torch.equal(copy, present):
                self._changing.add(name)
            if name not in self._changing:
                del self._copies[name]
        self.curved = {}
        places = ((name.rpartition("."), own) for name, own in _with_graph(buffers).items())
        return [(CarriedBuffer(called, modules[n[0]], n[2]), buffer) for n, buffer in places]


def _with_graph(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the buffers that were computed with a graph, by name."""
    return {name: own for name, own in buffers.items() if own.grad_fn is not None}


def _replaced(
    modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters, with names, that modules no longer have.

    Those of other libraries and of scripted modules, which make them anew, are left out.
    """
    for name, parameter in parameters.items():
        prefix, _, own = name.rpartition(".")
        present = modules[prefix]._parameters if prefix in modules else None
        if type(parameter) is not nn.Parameter or not isinstance(present, dict):
            continue
        if present.get(own) is not parameter:
            yield name, parameter


def _states(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return what changes with a tensor, or where another takes its place, by name."""
    return {n: (id(t), version_of(t), _memory_of(t)) for n, t in tensors.items()}


def _memory_of(tensor: Tensor) -> int:
    """Return where a parameter is stored, which an assignment to its ``.data`` changes."""
    return tensor.data_ptr() if type(tensor) is nn.Parameter else 0


def _frozen(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the parameters that are not trained, by name, without those of other libraries."""
    pairs: Iterable[tuple[str, nn.Parameter]] = parameters.items()
    return {n: p for n, p in pairs if type(p) is nn.Parameter and not p.requires_grad}


def _buffers(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the buffers that outputs may depend on, by name."""
    norms = batch_norms(modules)
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in modules.items()
        if module._buffers and not (module in norms and module.training)
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
