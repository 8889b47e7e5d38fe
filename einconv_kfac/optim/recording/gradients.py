"""What becomes of the gradients of a backward pass between the pass and the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.distributed.stored import (
    all_stored,
    graph_leaves,
    is_divided,
    local_of,
    stored_of,
)
from einconv_kfac.distributed.workers import ALONE, Workers
from einconv_kfac.optim.model_walk import ModelTree
from einconv_kfac.optim.recording.gradient_probe import (
    Probe,
    are_cleared,
    are_intact,
    entries_of,
    joined,
)
from einconv_kfac.optim.recording.lost_gradients import LostGradients
from einconv_kfac.torch_versions import gradient_edge

PROBES = 3
"""Number of parameters whose gradients are compared."""
PROPORTIONAL_ERROR = 1e-3
"""Relative difference up to which a gradient counts as a multiple of another."""


class GradientWatch:
    """Compares gradients at the end of a backward pass with those at the next pass or step.

    Args:
        tree: The modules and parameters of the model.
    """

    def __init__(self, tree: ModelTree) -> None:
        self._tree = tree
        self._probes: list[Probe] = []
        self._running: int | None = None  # the pass whose end was not seen
        self._lost = LostGradients()

    def lands_(self, owner: object) -> bool:
        """Return whether the backward pass that is running adds to the gradient of a parameter.

        Gradients that it returns instead are kept, and those of earlier passes are looked at.

        Args:
            owner: The loss of the pass.
        """
        if not self._are_accumulated():
            self._look_at_returned_(owner)
            return False
        if self._lost.is_any and self._running != torch._C._current_graph_task_id():
            # not another loss of one pass
            self._compare_()
        return True

    def _are_accumulated(self) -> bool:
        """Return whether the backward pass that is running adds to ``.grad`` of a parameter."""
        if _are_accumulated(self._tree.parameters.values()):
            return True
        return self._tree.find_() and _are_accumulated(self._tree.parameters.values())

    def _look_at_returned_(self, owner: object) -> None:
        """Look at gradients by parameters that the pass that is running returns, if it does."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return
        leaves = graph_leaves(self._tree.parameters.values())
        self._lost.watch_(owner, [p for p in leaves if p.requires_grad and _is_returned(p)])
        if self._probes and self._lost.is_any:  # a pass has ended before
            known = {probe.parameter for probe in self._probes}
            self._probes += [Probe.of(*own) for own in self._gradients() if own[0] not in known]

    def look_after_pass_(self, owner: object) -> None:
        """Look at the gradients at the end of the backward pass that is running.

        The look is queued when the pass has ended, behind what averages gradients over workers.

        Args:
            owner: The loss of the pass.
        """
        self._lost.land_(owner)
        self._running = torch._C._current_graph_task_id()
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._look_))

    def _look_(self) -> None:
        """Look at gradients of up to `PROBES` parameters."""
        self._running = None
        found = self._gradients()
        if len(found) > PROBES and not self._lost.is_any:
            found = [found[0], found[len(found) // 2], found[-1]]
        self._probes = [Probe.of(*own) for own in found]

    def _gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the parameters that have a gradient, and these."""
        return [
            (parameter, gradient)
            for parameter in all_stored(self._tree.parameters.values())
            if (gradient := parameter.grad) is not None and not gradient.is_sparse
        ]

    def _compare_(self) -> None:
        """Find out whether gradients that were cleared, or returned, have been put back."""
        self._lost.compare_(self._probes, self._gradients())

    def check(self) -> None:
        """Raise a ``RuntimeError`` if gradients that were cleared, or returned, were put back."""
        if self._lost.is_any:
            self._compare_()
            self._lost.check()

    def are_cleared(self, *, before_pass: bool) -> bool:
        """Return whether all gradients of the last pass were dropped or zeroed since.

        Of a pass that an error ended, also whether it left none.

        Args:
            before_pass: Whether another pass begins. Gradients are read then: to zero those of a
                step would be to no purpose.
        """
        if self._probes:
            return are_cleared(self._probes, are_read=before_pass)
        if self._running in (None, torch._C._current_graph_task_id()):
            return False
        found = [parameter.grad for parameter in all_stored(self._tree.parameters.values())]
        return not any(bool(local_of(g).any()) for g in found if g is not None)

    def factor(self, workers: Workers = ALONE) -> Tensor | None:
        """Check, and return by how much the gradients were scaled since the last pass.

        ``None`` if they were not changed, or in another way than by clipping.

        Args:
            workers: The workers, who look at their rows together if gradients are divided.

        Raises:
            RuntimeError: See `check`.
        """
        self.check()
        probes = [probe for probe in self._probes if probe.parameter.grad is not None]
        is_intact, are_divided = are_intact(probes), any(own.is_divided for own in probes)
        if workers.size > 1 and not are_divided:  # also where this worker has seen no pass
            are_divided = any(map(is_divided, all_stored(self._tree.parameters.values())))
        if not are_divided and (is_intact or not probes):
            return None
        before = joined([probe.value for probe in probes])
        now = joined([entries_of(p.parameter.grad) for p in probes])  # type: ignore[arg-type]
        square = before @ before
        if are_divided:
            known = [float(bool(probes)), float(not is_intact)]
            parts = [square, now @ before, now @ now, *known]
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
        before = joined([probe.value for probe in probes])
        now = joined([entries_of(p.parameter.grad) for p in probes])  # type: ignore[arg-type]
        return torch.stack([before @ before, before @ now, now @ now])

    def clear_(self) -> None:
        """Forget the last backward pass, whose gradients were cleared."""
        if self._probes:
            self._lost.clear_(self._probes)
        self._probes, self._running = [], None

    def forget_(self) -> None:
        """Forget all backward passes."""
        self._probes, self._running = [], None
        if not self._lost.is_new:
            self._lost = LostGradients()


def _common_factor(
    square: Tensor, product: Tensor, present: Tensor, known: Any, changed: Any
) -> Tensor | None:
    """Return the factor of gradients of which each worker has some rows, or ``None``.

    Args:
        square: ``b.b``, of the gradients before.
        product: ``b.n``, of them and the present ones.
        present: ``n.n``.
        known: One if all workers have seen a backward pass.
        changed: Zero if all of them are what they were.
    """
    if float(known) < 1 or not float(changed):
        return None
    factor = product / square
    error = (present - 2 * factor * product + factor.square() * square).clamp_min(0).sqrt()
    is_multiple = bool(error <= PROPORTIONAL_ERROR * present.sqrt()) and bool(factor > 0)
    return factor if is_multiple else None


def _are_accumulated(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether the backward pass that is running adds to ``.grad`` of a parameter."""
    return any(own.requires_grad and _is_accumulated(own) for own in graph_leaves(parameters))


def _is_accumulated(leaf: Tensor) -> bool:
    """Return whether the backward pass that is running adds to ``.grad`` of a tensor."""
    try:
        return bool(torch._C._will_engine_execute_node(gradient_edge(leaf).node))
    except RuntimeError:  # `torch.autograd.grad` by this parameter
        return False


def _is_returned(leaf: nn.Parameter) -> bool:
    """Return whether the backward pass that is running is `torch.autograd.grad` by a parameter."""
    try:
        torch._C._will_engine_execute_node(gradient_edge(leaf).node)
    except RuntimeError:
        return stored_of(leaf) is leaf
    return False
