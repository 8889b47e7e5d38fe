"""Replay of a forward pass, for the same or other values of the parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from einconv_kfac.optim.model_walk import named_modules, named_parameters
from einconv_kfac.optim.replay.bags import native_embeddings
from einconv_kfac.optim.replay.chain import ChainedArgument, Source, replaced
from einconv_kfac.optim.replay.derivatives import Derivatives, without_derivatives
from einconv_kfac.optim.replay.dropout import batch_masks
from einconv_kfac.optim.replay.environment import NOT_KEPT, Environment
from einconv_kfac.optim.replay.layer_jvp import batch_norms, layer_jvps
from einconv_kfac.optim.replay.layer_outputs import LayerOutputs
from einconv_kfac.optim.replay.loss_input import LossInput, found_inputs
from einconv_kfac.optim.replay.recurrence import native_recurrences
from einconv_kfac.optim.replay.subsample import Subset
from einconv_kfac.optim.replay.substitution import Forwards, substituted
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
        chained: The arguments that depend on earlier calls.
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
    """

    model: nn.Module
    modules: Collection[nn.Module]
    parameters: Direction
    values_of: Mapping[Tensor, Tensor]
    buffers: Sequence[tuple[str, Tensor]]
    norms: Forwards
    forwards: Forwards

    @staticmethod
    def of(model: nn.Module, parameters: Direction) -> Substitutes:
        """Return what stands for a model with other values of its parameters."""
        named_parts = named_modules(model)
        modules, norms = named_parts.values(), batch_norms(named_parts)
        named = list(model.named_parameters(remove_duplicate=False))
        return Substitutes(
            model,
            modules,
            parameters,
            {tensor: parameters[name] for name, tensor in named if name in parameters},
            [*model.named_buffers(remove_duplicate=False), *named],
            norms,
            native_recurrences(modules) | native_embeddings(modules) | norms,
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
        passed: The tensors on which arguments of later calls depend.
        subset: The examples that the call is restricted to, if not all.
    """

    call: ModelCall
    inputs: tuple[LossInput, ...]
    number: int = 0
    passed: tuple[LossInput, ...] = ()
    subset: Subset | None = None

    def restricted(self, subset: Subset | None) -> ForwardPass:
        """Return the forward pass of a subset of the examples.

        Raises:
            RuntimeError: If the first dimension of a tensor that the model is called with is
                not that of the examples, or an argument depends on an earlier call.
        """
        if subset is None:
            return self
        if self.call.chained:
            raise RuntimeError(
                "Arguments of the model must not depend on its earlier outputs when "
                "`curvature_fraction` is below 1, got one that does. Pass curvature_fraction=1."
            )
        args, kwargs = subset.arguments(self.call.args, self.call.kwargs)
        outputs = self.call.outputs.restricted(subset)
        call = replace(self.call, args=args, kwargs=kwargs, outputs=outputs)
        return replace(self, call=call, subset=subset)

    def run(
        self, own: Substitutes, earlier: Mapping[Source, Tensor], *, tangents: bool = False
    ) -> tuple[Tensor, ...]:
        """Return the tensors on which the loss depends, then those on which later calls depend.

        They are ``[n, ...]``, or ``[k, ...]`` for a subset. Random layers draw the numbers that
        they drew; buffers such as running statistics are left as they are. Attention, recurrent
        layers and bags of embeddings use the one implementation that has a forward mode and a
        differentiable backward pass.

        Args:
            own: The model, and the parameters that take other values, or the same with tangents.
            earlier: The outputs of earlier calls.
            tangents: Whether all parameters have the values of the recorded pass, and some of
                them tangents, so that outputs of layers need not be computed again.
        """
        call, model = self.call, own.model
        called = model.get_submodule(call.module)
        given = {each.index: each.value(model, own.parameters, earlier) for each in call.chained}
        args, kwargs = replaced(call.args, call.kwargs, given)

        wanted = (*self.inputs, *self.passed)
        base = without_derivatives(wanted)
        derivatives = Derivatives(args, kwargs, wanted, self.subset)

        def run() -> Any:
            return _called(called, values, derivatives.args, derivatives.kwargs)

        values, forwards = own.values(called, call.environment.buffers), own.forwards
        if self.subset is not None:
            forwards = forwards | batch_masks(own.modules, self.subset)
        if tangents:
            forwards = forwards | layer_jvps(own.modules, call.outputs)
        with ExitStack() as stack:
            stack.enter_context(call.environment.restored(model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(substituted(forwards))
            return derivatives.found(wanted, dict(zip(base, found_inputs(base, run))))


def _called(
    module: nn.Module, values: Direction, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return what a module returns for other values of parameters and buffers.

    Raises:
        RuntimeError: If it fails, as it did not when the call was recorded.
    """
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
        tangents: See `ForwardPass.run`.
    """
    own = Substitutes.of(model, parameters)
    earlier: dict[Source, Tensor] = {}
    outputs: list[Tensor] = []
    for each in forwards:
        found = each.run(own, earlier, tangents=tangents)
        count = len(each.inputs)
        outputs += found[:count]
        earlier |= {(each.number, own): t for own, t in zip(each.passed, found[count:])}
    return tuple(outputs)
