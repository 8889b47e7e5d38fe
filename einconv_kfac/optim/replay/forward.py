"""Forward passes as they are recorded, and what takes the place of parameters in a replay."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from einconv_kfac.optim.model_walk import named_modules, named_parameters
from einconv_kfac.optim.replay.bags import native_embeddings
from einconv_kfac.optim.replay.chain import ChainedArgument, Dependence, dependences_of
from einconv_kfac.optim.replay.environment import NOT_KEPT, Environment
from einconv_kfac.optim.replay.held_parameters import HeldParameters, held_parameters
from einconv_kfac.optim.replay.layer_jvp import batch_norms
from einconv_kfac.optim.replay.layer_outputs import LayerOutputs
from einconv_kfac.optim.replay.loss_input import Derivative, LossInput, Vector, derivatives_of
from einconv_kfac.optim.replay.recurrence import native_recurrences
from einconv_kfac.optim.replay.subsample import Subset
from einconv_kfac.optim.replay.substitution import Forwards
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
        chained: The arguments and buffers that depend on earlier calls.
        module: The name of the part of the model that was called, if not all of it.
        replaced: The name of a parameter in whose place the call used another tensor, if any.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    environment: Environment
    versions: Versions
    parameters: State
    outputs: LayerOutputs = field(default_factory=LayerOutputs)
    chained: tuple[ChainedArgument, ...] = ()
    module: str = ""
    replaced: str = ""

    def ended(self) -> ModelCall:
        """Return the call after it has ended."""
        self.versions.end_call_()
        environment = self.environment.after_call()
        return self if environment is self.environment else replace(self, environment=environment)

    def has_moved(self, model: nn.Module) -> bool:
        """Return whether parameters of the model were changed after the call.

        Those that the call itself changed, of which there are copies, do not count.
        """
        found = named_parameters(model)
        own, copied = state_of(found.values()), self.environment.buffers
        if len(own) != len(self.parameters):
            return True
        return any(
            now != then
            for name, now, then in zip(found, own, self.parameters)
            if name not in copied
        )


NOT_REPLAYED = ModelCall((), {}, NOT_KEPT, Versions(()), ())
"""Stands for a call that is not replayed, of which nothing is kept."""


@dataclass(frozen=True)
class Substitutes:
    """A model, and what takes the place of its parameters and of its layers' operations.

    Args:
        model: The model.
        modules: Its modules.
        parameters: The parameters that take other values, by name in the model.
        values_of: These values by parameter.
        buffers: The buffers and parameters of the model with their names; one may have several.
        norms: Forward methods of modules that change no buffers, of which no copies are needed.
        forwards: These, and those of other layers.
        held: Attributes of modules that have parameters in them.
    """

    model: nn.Module
    modules: Collection[nn.Module]
    parameters: Direction
    values_of: Mapping[Tensor, Tensor]
    buffers: Sequence[tuple[str, Tensor]]
    norms: Forwards
    forwards: Forwards
    held: Sequence[HeldParameters]

    @staticmethod
    def of(model: nn.Module, parameters: Direction) -> Substitutes:
        """Return what stands for a model with other values of its parameters."""
        named_parts = named_modules(model)
        modules, norms = named_parts.values(), batch_norms(named_parts)
        named = list(nn.Module.named_parameters(model, remove_duplicate=False))
        values_of: dict[Tensor, Tensor] = {
            tensor: parameters[name] for name, tensor in named if name in parameters
        }
        return Substitutes(
            model,
            modules,
            parameters,
            values_of,
            [*nn.Module.named_buffers(model, remove_duplicate=False), *named],
            norms,
            native_recurrences(modules) | native_embeddings(modules) | norms,
            held_parameters(modules, values_of),
        )

    def values(self, part: nn.Module, buffers: Mapping[str, Tensor]) -> Direction:
        """Return other parameters and copies of buffers, by name in each module that has them.

        Each module comes once: `functional_call` does not restore a module that it finds under
        several names.

        Args:
            part: The part of the model to which the names are relative.
            buffers: The values of buffers, and of parameters that are frozen or that the pass
                replaced, by name in the model; the others keep theirs.
        """
        copies = {tensor: buffers[name] for name, tensor in self.buffers if name in buffers}
        copies = {tensor: value.clone() for tensor, value in copies.items()}
        values: Direction = {}
        for prefix, module in named_modules(part).items():
            start = f"{prefix}." if prefix else ""
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter in copies:
                    values[start + name] = copies[parameter]
                elif parameter is not None and parameter in self.values_of:
                    values[start + name] = self.values_of[parameter]
            for name, buffer in module._buffers.items():
                if buffer is None or (module in self.norms and buffer not in copies):
                    continue
                if buffer not in copies:
                    copies[buffer] = buffer.clone()
                values[start + name] = copies[buffer]
        return values


@dataclass(frozen=True)
class ForwardPass:
    """A call of a model on which a loss depends, by its outputs or through later calls.

    Args:
        call: The call.
        inputs: The tensors of the call on which the loss depends.
        number: The number of the call.
        passed: The tensors on which arguments of later calls and vectors of derivatives depend.
        subset: The examples that the call is restricted to, if not all.
        vectors: How vectors of derivatives depend on calls and parameters; others are constants.
    """

    call: ModelCall
    inputs: tuple[LossInput, ...]
    number: int = 0
    passed: tuple[LossInput, ...] = ()
    subset: Subset | None = None
    vectors: Mapping[Vector, Dependence] = field(default_factory=dict)

    @property
    def derivatives(self) -> tuple[Derivative, ...]:
        """The derivatives among its tensors, with all that they are taken of."""
        return tuple(dict.fromkeys(derivatives_of((*self.inputs, *self.passed))))

    @property
    def dependences(self) -> list[Dependence]:
        """How arguments, and vectors of derivatives, depend on tensors of calls and parameters."""
        chained = [each.own for each in self.call.chained]
        return [*chained, *dependences_of(self.vectors, (*self.inputs, *self.passed))]

    def restricted(self, subset: Subset | None) -> ForwardPass:
        """Return the forward pass of a subset of the examples.

        Raises:
            RuntimeError: If the first dimension of a tensor that the model is called with is
                not that of the examples, or an argument depends on an earlier call.
        """
        if subset is None:
            return self
        if self.dependences:
            raise RuntimeError(
                "Arguments of the model, and vectors of its derivatives, must not depend on its "
                "outputs when `curvature_fraction` is below 1, got one that does. Pass "
                "curvature_fraction=1."
            )
        for own in (v.value for each in self.derivatives for _, v in each.weights):
            if own.ndim == 0 or own.shape[0] != subset.size:
                raise RuntimeError(
                    "Derivatives of the model must be those of outputs with the examples in the "
                    "first dimension when `curvature_fraction` is below 1, got one of an output "
                    f"{list(own.shape)}. Pass curvature_fraction=1."
                )
        args, kwargs = subset.arguments(self.call.args, self.call.kwargs)
        outputs = self.call.outputs.restricted(subset)
        call = replace(self.call, args=args, kwargs=kwargs, outputs=outputs)
        return replace(self, call=call, subset=subset)
