"""What becomes of the gradients of a backward pass between the pass and the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.distributed.stored import all_stored, graph_leaves, is_divided, local_of
from einconv_kfac.distributed.workers import ALONE, Workers
from einconv_kfac.optim.model_walk import ModelTree
from einconv_kfac.torch_versions import gradient_edge

PROBES = 3
"""Number of parameters whose gradients are compared."""
PROPORTIONAL_ERROR = 1e-3
"""Relative difference up to which a gradient counts as a multiple of another."""


@dataclass(frozen=True)
class _Probe:
    """The gradient of one parameter after a backward pass.

    Args:
        parameter: The parameter.
        gradient: The tensor that ``.grad`` was.
        version: Its version.
        value: A copy of some of its entries.
        is_divided: Whether it is a DTensor, whose version does not tell of changes.
    """

    parameter: nn.Parameter
    gradient: Tensor
    version: int
    value: Tensor
    is_divided: bool

    @staticmethod
    def of(parameter: nn.Parameter, gradient: Tensor) -> _Probe:
        """Return the present gradient of a parameter."""
        value = _entries(gradient).clone()
        return _Probe(parameter, gradient, gradient._version, value, is_divided(gradient))

    @property
    def is_intact(self) -> bool:
        """Whether ``.grad`` is the same tensor with the same values."""
        if self.parameter.grad is not self.gradient:
            return False
        if self.is_divided:
            return torch.equal(_entries(self.gradient), self.value)
        return self.gradient._version == self.version

    @property
    def is_cleared(self) -> bool:
        """Whether the gradient was dropped, or overwritten with zeros."""
        if self.is_intact:
            return False
        gradient = self.parameter.grad
        return gradient is None or (bool(self.value.any()) and not bool(local_of(gradient).any()))


class GradientWatch:
    """Compares gradients at the end of a backward pass with those at the next pass or step.

    Args:
        tree: The modules and parameters of the model.
    """

    def __init__(self, tree: ModelTree) -> None:
        self._tree = tree
        self._probes: list[_Probe] = []
        self._running: int | None = None  # the pass whose end was not seen

    def lands(self) -> bool:
        """Return whether the backward pass that is running adds to the gradient of a parameter."""
        if _are_accumulated(self._tree.parameters.values()):
            return True
        return self._tree.find_() and _are_accumulated(self._tree.parameters.values())

    def look_after_pass_(self) -> None:
        """Look at the gradients at the end of the backward pass that is running.

        The look is queued when the pass has ended, behind what averages gradients over workers.
        """
        self._running = torch._C._current_graph_task_id()
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._look_))

    def _look_(self) -> None:
        """Look at gradients of up to `PROBES` parameters."""
        self._running = None
        found = [
            (parameter, gradient)
            for parameter in all_stored(self._tree.parameters.values())
            if (gradient := parameter.grad) is not None and not gradient.is_sparse
        ]
        chosen = found if len(found) <= PROBES else [found[0], found[len(found) // 2], found[-1]]
        self._probes = [_Probe.of(*own) for own in chosen]

    def are_cleared(self) -> bool:
        """Return whether all gradients of the last pass were dropped or zeroed since.

        Of a pass that an error ended, also whether it left none.
        """
        if self._probes:
            return all(probe.is_cleared for probe in self._probes)
        if self._running in (None, torch._C._current_graph_task_id()):
            return False
        found = [parameter.grad for parameter in all_stored(self._tree.parameters.values())]
        return not any(bool(local_of(g).any()) for g in found if g is not None)

    def factor(self, workers: Workers = ALONE) -> Tensor | None:
        """Return by how much the gradients were scaled since the last pass, as by clipping.

        ``None`` if they were not changed, or in another way.

        Args:
            workers: The workers, who look at their rows together if gradients are divided.
        """
        probes = [probe for probe in self._probes if probe.parameter.grad is not None]
        are_divided = any(probe.is_divided for probe in probes)
        is_intact = all(probe.is_intact for probe in probes)
        if not probes or (is_intact and not are_divided):
            return None
        before = _joined([probe.value for probe in probes])
        now = _joined([_entries(p.parameter.grad) for p in probes])  # type: ignore[arg-type]
        square = before @ before
        if are_divided:
            parts = [square, now @ before, now @ now, float(not is_intact)]
            return _common_factor(*workers.means(parts, "factor of clipping"))
        factor = (now @ before) / square
        error = (now - factor * before).norm()
        if bool(error <= PROPORTIONAL_ERROR * now.norm()) and bool(factor > 0):
            return factor
        return None

    def products(self) -> Tensor | None:
        """Return ``b.b, b.n, n.n`` of gradients ``b`` after the last pass and present ones ``n``.

        The device is asked, also where the version of a gradient does not tell of a change, as
        after `torch.amp.GradScaler.unscale_`. ``None`` without a pass.
        """
        probes = [probe for probe in self._probes if probe.parameter.grad is not None]
        if not probes:
            return None
        before = _joined([probe.value for probe in probes])
        now = _joined([_entries(p.parameter.grad) for p in probes])  # type: ignore[arg-type]
        return torch.stack([before @ before, before @ now, now @ now])

    def forget_(self) -> None:
        """Forget the last backward pass."""
        self._probes, self._running = [], None


def _common_factor(square: Tensor, product: Tensor, present: Tensor, changed: Any) -> Tensor | None:
    """Return the factor of gradients of which each worker has some rows, or ``None``.

    Args:
        square: ``b.b``, of the gradients before.
        product: ``b.n``, of them and the present ones.
        present: ``n.n``.
        changed: Zero if all of them are what they were.
    """
    if not float(changed):
        return None
    factor = product / square
    error = (present - 2 * factor * product + factor.square() * square).clamp_min(0).sqrt()
    is_multiple = bool(error <= PROPORTIONAL_ERROR * present.sqrt()) and bool(factor > 0)
    return factor if is_multiple else None


ENTRIES = 4096
"""Number of entries of a gradient that are compared."""


def _entries(gradient: Tensor) -> Tensor:
    """Return entries of a gradient, as real numbers."""
    own = local_of(gradient).detach()
    own = own if own.numel() <= ENTRIES else own.flatten()[:ENTRIES]
    return torch.view_as_real(own) if own.is_complex() else own


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of tensors as one vector in float64."""
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def _are_accumulated(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether the backward pass that is running adds to ``.grad`` of a parameter."""
    return any(own.requires_grad and _is_accumulated(own) for own in graph_leaves(parameters))


def _is_accumulated(leaf: Tensor) -> bool:
    """Return whether the backward pass that is running adds to ``.grad`` of a tensor."""
    try:
        return bool(torch._C._will_engine_execute_node(gradient_edge(leaf).node))
    except RuntimeError:  # `torch.autograd.grad` by this parameter
        return False
