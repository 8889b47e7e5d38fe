"""Recorded forward passes, run again in the order of their calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from einconv_kfac.optim.replay.chain import Source, TensorOf, replaced
from einconv_kfac.optim.replay.derivatives import Derivatives, Gate
from einconv_kfac.optim.replay.dropout import batch_masks
from einconv_kfac.optim.replay.forward import ForwardPass, Substitutes
from einconv_kfac.optim.replay.function_jvps import FunctionJvps
from einconv_kfac.optim.replay.held_parameters import held_values
from einconv_kfac.optim.replay.layer_jvp import layer_jvps
from einconv_kfac.optim.replay.loss_input import (
    LossInput,
    Vector,
    found_inputs,
    without_derivatives,
)
from einconv_kfac.optim.replay.substitution import substituted
from einconv_kfac.optim.vectors import Direction


class Run:
    """A forward pass that is run again.

    Its tensors are ``[n, ...]``, or ``[k, ...]`` for a subset. Random layers draw the numbers that
    they drew; buffers such as running statistics are left as they are. Attention, recurrent
    layers and bags of embeddings use the one implementation that has a forward mode and a
    differentiable backward pass.

    Args:
        forward: The forward pass.
        own: The model, and the parameters that take other values, or the same with tangents.
        tensor: Returns tensors of calls, those of this one after it was run.
        gate: The gate of all runs.
        tangents: Whether all parameters have the values of the recorded pass, and some of
            them tangents, so that outputs of layers need not be computed again.
    """

    def __init__(
        self,
        forward: ForwardPass,
        own: Substitutes,
        tensor: TensorOf,
        gate: Gate,
        *,
        tangents: bool = False,
    ) -> None:
        self._forward, self._own = forward, own
        call, model, parameters = forward.call, own.model, own.parameters
        self._forwards, self._has_tangents = own.forwards, tangents
        if tangents:
            self._forwards = self._forwards | layer_jvps(own.modules, call.outputs)
        if forward.subset is not None:
            self._forwards = self._forwards | batch_masks(own.modules, forward.subset)
        given = {each.index: each.own.value(model, parameters, tensor) for each in call.chained}
        args, kwargs = replaced(call.args, call.kwargs, given)
        dependent = partial(_dependent, forward, own, tensor)
        wanted = forward.derivatives, dependent, gate, forward.subset
        self._derivatives = Derivatives(args, kwargs, *wanted)
        called = model.get_submodule(call.module)
        buffers = {name: value for name, value in given.items() if isinstance(name, str)}
        values = own.values(called, call.environment.buffers | buffers)

        def run() -> Any:
            return _called(called, values, self._derivatives.args, self._derivatives.kwargs)

        base = without_derivatives((*forward.inputs, *forward.passed))
        with self._context():
            self._derivatives.begin_(dict(zip(base, found_inputs(base, run))))

    def value(self, source: LossInput) -> Tensor:
        """Return a tensor of the call."""
        return self._derivatives.value(source, self._context)

    @contextmanager
    def _context(self) -> Iterator[None]:
        """Restore what the call depended on inside the block."""
        with ExitStack() as stack:
            stack.enter_context(self._forward.call.environment.restored(self._own.model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(substituted(self._forwards))
            if self._has_tangents:
                stack.enter_context(FunctionJvps())
            stack.enter_context(held_values(self._own.held))
            yield


def _dependent(
    forward: ForwardPass, own: Substitutes, tensor: TensorOf, vector: Vector
) -> Tensor | None:
    """Return the value of a vector that depends on parameters, ``None`` for a constant."""
    known = forward.vectors.get(vector)
    return None if known is None else known.value(own.model, own.parameters, tensor)


def _called(
    module: nn.Module, values: Direction, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return what a module returns for other values of parameters and buffers.

    Raises:
        RuntimeError: If it fails, as it did not when the call was recorded.
    """
    args, kwargs = tree_map(lambda own: own, (args, kwargs))  # which the call may change
    try:
        return functional_call(module, values, args, kwargs, tie_weights=False)
    except RuntimeError:
        raise
    except Exception as error:
        raise RuntimeError(
            "The model must run again when a recorded batch is replayed for adaptive=True, got "
            f"{error!r}. Its parameters are plain tensors then: `forward` cannot move a copy of a "
            "layer, and must not ask for nn.Parameter. Do this in `__init__`, or pass "
            "adaptive=False."
        ) from error


def run_all(
    forwards: Sequence[ForwardPass],
    model: nn.Module,
    parameters: Direction,
    *,
    tangents: bool = False,
) -> tuple[Tensor, ...]:
    """Return the tensors of several passes on which the loss depends, in order.

    Args:
        forwards: The passes in the order of their calls, with all that they depend on.
        model: The model.
        parameters: The parameters that take other values, or the same with tangents.
        tangents: See `Run`.
    """
    own, gate, runs = Substitutes.of(model, parameters), Gate(), dict[int, Run]()

    def tensor(source: Source) -> Tensor:
        number, own = source
        return runs[number].value(own)

    try:
        for each in forwards:
            runs[each.number] = Run(each, own, tensor, gate, tangents=tangents)
        return tuple(tensor((each.number, source)) for each in forwards for source in each.inputs)
    finally:
        runs.clear()  # which refer to themselves
