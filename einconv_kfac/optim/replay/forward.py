"""Replay of a forward pass, for the same or other values of the parameters."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from einconv_kfac.optim.replay.dropout import batch_masks
from einconv_kfac.optim.replay.environment import Environment
from einconv_kfac.optim.replay.layer_jvp import layer_jvps
from einconv_kfac.optim.replay.layer_outputs import LayerOutputs
from einconv_kfac.optim.replay.loss_input import LossInput, found_inputs
from einconv_kfac.optim.replay.recurrence import native_recurrences
from einconv_kfac.optim.replay.subsample import Subset
from einconv_kfac.optim.replay.substitution import substituted
from einconv_kfac.optim.replay.versions import State, Versions, state_of
from einconv_kfac.optim.vectors import Direction


@dataclass(frozen=True)
class ModelCall:
    """One call of a model.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        environment: The state outside of them that it depended on.
        versions: The versions of the arguments.
        parameters: The state of the model's parameters.
        outputs: The outputs of layers, as far as they were kept.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    environment: Environment
    versions: Versions
    parameters: State
    outputs: LayerOutputs = field(default_factory=LayerOutputs)

    def ended(self) -> ModelCall:
        """Return the call after it has ended."""
        return replace(self, environment=self.environment.after_call())

    def has_moved(self, model: nn.Module) -> bool:
        """Return whether parameters of the model were changed after the call."""
        return state_of(model.parameters()) != self.parameters


@dataclass(frozen=True)
class ForwardPass:
    """The call of a model on which a loss depends.

    Args:
        call: The call.
        inputs: The tensors of the call on which the loss depends.
        subset: The examples that the call is restricted to, if not all.
    """

    call: ModelCall
    inputs: tuple[LossInput, ...]
    subset: Subset | None = None

    def restricted(self, subset: Subset | None) -> ForwardPass:
        """Return the forward pass of a subset of the examples.

        Raises:
            RuntimeError: If the first dimension of a tensor that the model is called with is
                not that of the examples.
        """
        if subset is None:
            return self
        args, kwargs = subset.arguments(self.call.args, self.call.kwargs)
        outputs = self.call.outputs.restricted(subset)
        call = replace(self.call, args=args, kwargs=kwargs, outputs=outputs)
        return replace(self, call=call, subset=subset)

    def run(
        self, model: nn.Module, parameters: Direction, *, tangents: bool = False
    ) -> tuple[Tensor, ...]:
        """Return the tensors on which the loss depends, ``[n, ...]``, or ``[k, ...]`` each.

        Random layers draw the numbers that they drew; buffers such as running statistics are
        left as they are. Attention and recurrent layers use the one implementation that has a
        forward mode and a differentiable backward pass.

        Args:
            model: The model.
            parameters: The parameters that take other values, or the same with tangents.
            tangents: Whether all parameters have the values of the recorded pass, and some of
                them tangents, so that outputs of layers need not be computed again.
        """
        call = self.call
        values = _values(model, parameters, call.environment.buffers)

        def run() -> Any:
            return functional_call(model, values, call.args, call.kwargs, tie_weights=False)

        forwards = native_recurrences(model)
        if self.subset is not None:
            forwards |= batch_masks(model, self.subset)
        if tangents:
            forwards |= layer_jvps(model, call.outputs)
        with ExitStack() as stack:
            stack.enter_context(call.environment.restored(model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(substituted(forwards))
            return found_inputs(self.inputs, run)


def _values(model: nn.Module, parameters: Direction, buffers: dict[str, Tensor]) -> Direction:
    """Return other parameters and copies of the buffers, by name in each module that has them.

    Each module comes once: `functional_call` does not restore a module that it finds under
    several names.

    Args:
        model: The model.
        parameters: The parameters that take other values.
        buffers: The values of buffers; the others keep theirs.
    """
    copies: dict[Tensor, Tensor] = {}
    values: Direction = {}
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and (start + name in parameters or parameter in copies):
                own = parameters.get(start + name, parameter)
                values[start + name] = copies.setdefault(parameter, own)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if buffer not in copies:
                    copies[buffer] = buffers.get(start + name, buffer).clone()
                values[start + name] = copies[buffer]
    return values
