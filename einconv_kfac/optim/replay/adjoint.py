"""The adjoint of a Jacobian, against which its products are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from einconv_kfac.curvature.objective.graph import has_functions
from einconv_kfac.optim.replay.held_parameters import check_replaced
from einconv_kfac.optim.replay.host_pooling import HostPooling
from einconv_kfac.optim.replay.jvp import Function, Tangents, inner, normal
from einconv_kfac.optim.vectors import Direction, sum_of

ROUNDING_ERRORS = 100
"""Relative difference, in machine epsilons, up to which products agree."""
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
"""What reads whether a tensor requires gradients."""


class GradientSwitch(TorchFunctionMode):
    """A context that notes whether a model asks for gradients inside, or switches them off.

    A model may route gradients past an operation only where its input requires them.

    Attributes:
        was_used: Whether gradients were switched off, as by ``torch.no_grad``, or a tensor was
            asked whether it requires them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.was_used = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch."""
        is_off = func is torch._C._set_grad_enabled and args and not args[0]
        if is_off or func == _REQUIRES_GRAD:
            self.was_used = True
        return func(*args, **(kwargs or {}))


def observed(run: Callable[[], Tangents], names: Mapping[Tensor, str]) -> tuple[bool, bool]:
    """Run a model with a graph, and say whether forward mode may differ from backward passes there.

    So it may with functions of users, and where gradients are switched off or asked for.

    Args:
        run: Returns the model's outputs for other values of parameters.
        names: The parameters that took other values, with their names.

    Returns:
        Whether it may, and whether the model calls max pooling.

    Raises:
        RuntimeError: If the outputs depend on these parameters.
    """
    with torch.enable_grad(), GradientSwitch() as switch, HostPooling() as pooling:
        outputs = run()
    check_replaced(outputs, names)
    return has_functions(outputs) or switch.was_used, pooling.is_used


@dataclass(frozen=True)
class Adjoint:
    """``<d, J^T w>`` for a direction ``d`` and random ``w``, by one backward pass.

    Args:
        ws: The vectors ``w``, one for each output.
        value: ``<d, J^T w>``, in float64.
        bound: ``|d| |J^T w|``, to which the value is relative.
    """

    ws: tuple[Tensor, ...]
    value: Tensor
    bound: Tensor

    @staticmethod
    def of(
        function: Function, model: nn.Module, parameters: Direction, direction: Direction
    ) -> Adjoint:
        """Evaluate a function at parameters, and run its backward pass.

        The parameters are those of the model itself where possible, since the backward pass of a
        function that is written in Python may call parts of the model again.

        Args:
            function: Returns outputs for parameters.
            model: The model.
            parameters: The parameters by name.
            direction: The direction ``d``.
        """
        originals = {name: model.get_parameter(name) for name in direction}
        if all(map(_is_plain, originals.values())):
            try:
                return Adjoint._by(function, {}, dict(originals.items()), direction)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # the graph between two calls is gone, which copies do not need
                pass
        leaves = {name: parameters[name].detach().requires_grad_() for name in direction}
        return Adjoint._by(function, leaves, leaves, direction)

    @staticmethod
    def _by(
        function: Function, given: Direction, leaves: Direction, direction: Direction
    ) -> Adjoint:
        """Return it for derivatives by leaves, with the parameters that a function is given."""
        with torch.enable_grad():
            outputs = function(given)
            ws = tuple(normal(output) for output in outputs)
            pairs = [(o, w) for o, w in zip(outputs, ws) if o.requires_grad]
            known, vectors = [o for o, _ in pairs], [w for _, w in pairs]
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if pairs:
                found = torch.autograd.grad(known, [*leaves.values()], vectors, allow_unused=True)
        own = [(direction[n], g) for n, g in zip(leaves, found) if g is not None]
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(leaves.values())).device)
        value = sum((inner(d, g) for d, g in own), zero)
        sizes = [sum((inner(v, v) for v in each), zero) for each in zip(*own)] or [zero, zero]
        return Adjoint(ws, value, (sizes[0] * sizes[1]).sqrt())

    def check(self, tangents: Tangents, eps: float) -> None:
        """Raise a ``RuntimeError`` if products are far from it; see `agrees`."""
        if not self._is_near(tangents, 10 * eps**0.5, eps):
            raise RuntimeError(
                "The backward pass must be the derivative of what the model computes when "
                "adaptive=True, got another one, by an `autograd.Function` that calls parts of the "
                "model again in `backward`. Use a function that autograd differentiates "
                "(`odeint` in place of `odeint_adjoint`), or pass adaptive=False."
            )

    def agrees(self, tangents: Tangents, eps: float) -> bool:
        """Return whether ``<J d, w> = <d, J^T w>``, up to rounding; so if it is not finite.

        Args:
            tangents: ``J d``.
            eps: The machine epsilon of the computation.
        """
        return self._is_near(tangents, min(ROUNDING_ERRORS * eps, 10 * eps**0.5), eps)

    def _is_near(self, tangents: Tangents, tolerance: float, eps: float) -> bool:
        """Return whether ``<J d, w> = <d, J^T w>`` up to a relative tolerance."""
        if not tangents:
            return True
        left = sum_of([inner(t, w) for t, w in zip(tangents, self.ws)])
        size = sum_of([inner(t, t).sqrt() for t in tangents])
        allowed = tolerance * (size + self.value.abs()) + 10 * eps * self.bound
        difference = (left - self.value).abs()
        return not bool(difference.isfinite()) or bool(difference <= allowed)


def _is_plain(parameter: nn.Parameter) -> bool:
    """Return whether a derivative by a parameter is one of its whole, and no hook changes it."""
    return (
        type(parameter) is nn.Parameter
        and parameter.requires_grad
        and not parameter._backward_hooks
    )
