"""Hooks that record the batches of a step.

They record, for each loss that is backpropagated, the forward passes, the outputs, the loss as a
function of them, and the weight with which the loss enters the objective (``1 / k`` if a training
loop divides by ``k`` micro-batches).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from einconv_kfac.curvature.estimation.capture import LayerCall, LayerCapture, sees_own_output
from einconv_kfac.curvature.estimation.evaluation import Evaluation
from einconv_kfac.curvature.losses.loss_registry import is_built_in
from einconv_kfac.curvature.losses.snapshot import copied_arguments
from einconv_kfac.distributed.stored import check_still_whole, is_divided, leaf_names
from einconv_kfac.optim.model_walk import ModelTree
from einconv_kfac.optim.recording.buffers import ChangingBuffers
from einconv_kfac.optim.recording.call_hooks import CallHooks, Hook, detach
from einconv_kfac.optim.recording.gradients import GradientWatch
from einconv_kfac.optim.recording.input_derivatives import Arguments
from einconv_kfac.optim.recording.observation import GivenObservation, Observation
from einconv_kfac.optim.recording.observed_losses import INDEPENDENT, ObservedLoss, check_number
from einconv_kfac.optim.recording.pending import PendingCalls
from einconv_kfac.optim.recording.read_observation import ReadObservation
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.environment import Environment
from einconv_kfac.optim.replay.forward import NOT_REPLAYED, ModelCall
from einconv_kfac.optim.replay.layer_outputs import LayerOutputs, is_known, parts_with_outputs
from einconv_kfac.optim.replay.loss_input import loss_arguments, with_kept_reduction
from einconv_kfac.optim.replay.unknown_operations import explained_checkpoints
from einconv_kfac.optim.replay.versions import Versions, state_of

OnBackward = Callable[[Evaluation, list[LayerCall], Batch], frozenset[str]]
"""Called when a backward pass begins; returns the names of layers whose factors it adds to."""


class Recorder:
    """Records the batches since the last step.

    The hooks do not keep the recorder alive, and copies of the model are not recorded.

    Args:
        model: The model.
        loss_fn: The loss module, or ``None`` for losses that the model returns.
        on_backward: Called when the backward pass of a loss begins.
        on_cleared: Called when the gradients of all earlier losses turn out to have been dropped.
        capture: Records the calls of layers; none by default.
        entry: The module that is called: the model, or the result of ``torch.compile(model)``.

    Attributes:
        enabled: Whether calls are recorded.
        keeps_outputs: Whether what a replay needs is kept: buffers, outputs of layers, losses as
            functions of outputs.
        keeps_layers: Whether outputs of layers are kept as well, which makes products cheaper.
        tree: The modules and parameters of the model.
        gradients: Watches the gradients between backward passes and steps.
        account: Keeps what the losses were taken as.
        pending: The calls of the model since the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | None,
        on_backward: OnBackward,
        on_cleared: Callable[[], None] = lambda: None,
        capture: LayerCapture | None = None,
        entry: nn.Module | None = None,
    ) -> None:
        self.enabled, self.keeps_outputs, self.keeps_layers = True, False, True
        self._batches: list[Batch] = []
        self._model, self._loss_fn = model, loss_fn
        self._on_backward, self._on_cleared = on_backward, on_cleared
        self._entry = model if entry is None else entry
        self._capture = LayerCapture([]) if capture is None else capture
        names, is_compiled = partial(leaf_names, model), self._entry is not model
        self._pending = PendingCalls(self._capture, names, is_compiled=is_compiled)
        self.account, self.pending = self._pending.account, self._pending
        self._outputs: LayerOutputs | None = None  # of the call that is running
        self._running: nn.Module | None = None  # the module of that call
        self._is_whole = not any(map(is_divided, model.parameters()))
        self._buffers, self.tree = ChangingBuffers(), ModelTree(model)
        self.gradients = GradientWatch(self.tree)
        self._handles = self._attached()
        weakref.finalize(self, detach, self._handles)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is recorded."""
        return not self._batches and self._pending.is_empty

    def take(self) -> list[Batch]:
        """Return the batches whose gradients are in ``.grad``, and drop everything recorded."""
        self._drop_cleared_(before_pass=False)
        batches, self._batches, self._outputs = self._batches, [], None
        if batches:
            self._calls.end_step_()
            self._buffers.is_first = False
        self.gradients.forget_()
        self._pending.clear_()
        return batches

    def remove(self) -> None:
        """Remove every hook, and drop everything recorded."""
        detach(self._handles)
        self.take()

    @contextmanager
    def paused(self, repeats: bool = False) -> Iterator[None]:
        """Record neither batches nor calls inside the block; see `LayerCapture.paused`."""
        before, self.enabled = self.enabled, False
        try:
            with self._capture.paused(repeats):
                yield
        finally:
            self.enabled = before

    def observed(self, loss: Tensor) -> Tensor:
        """Return a loss that is recorded when it is backpropagated, in place of its parts.

        Raises:
            ValueError: If it is not one number, or does not depend on the model.
        """
        check_number(loss)
        self._pending.losses.returned.is_needed &= self._loss_fn is None
        if self.enabled and torch.is_grad_enabled() and not self.observe_(loss):
            raise ValueError(INDEPENDENT)
        return loss

    def observe_(self, loss: Tensor) -> bool:
        """Record a loss when it is backpropagated, from its graph; return whether it is one.

        Args:
            loss: The loss, one number.
        """
        if not (self.enabled and torch.is_grad_enabled() and loss.requires_grad):
            return False
        observation = ReadObservation(self._model, self._pending, loss)
        if observation.is_empty:
            return False
        for part in observation.parts:
            part.is_replaced = True
        self._record_(loss, observation)
        return True

    def _assume_(self, output: Any) -> None:
        """Record numbers that the model returned, if the backward pass comes through them."""
        for loss in self._pending.losses.new_numbers(output):
            observation = ReadObservation(self._model, self._pending, loss, is_assumed=True)
            if not observation.is_penalty:
                self._pending.losses.returned.add_(self._record_(loss, observation))

    def _attached(self) -> list[RemovableHandle]:
        """Attach the hooks, and return their handles."""
        after_layer = Hook(self._after_layer)
        layers = parts_with_outputs(self._entry, self._model)
        handles = [m.register_forward_hook(after_layer, prepend=True) for m in layers]
        self._calls = CallHooks(self._entry, Hook(self._before_model), Hook(self._after_model))
        if self._entry is self._model:
            self._calls.watch_parts_([] if self._loss_fn is None else self._loss_fn.modules())
        handles += self._calls.handles
        if self._loss_fn is not None:
            hook = Hook(self._after_loss)
            handles.append(self._loss_fn.register_forward_hook(hook, with_kwargs=True))
        return handles

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """Record the arguments and the environment of a call of the model, or of a part of it."""
        if self._running is None and self._is_recording() and self._calls.may_begin(model):
            self._running = model
            self._calls.begin_(model)
            call = self._kept(model, args, kwargs) if self.keeps_outputs else NOT_REPLAYED
            self._outputs = call.outputs if self.keeps_outputs and self.keeps_layers else None
            self._pending.begin_(call)
            return self._pending.watched_(args, kwargs)
        return None

    def _kept(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
        """Return what a replay of a call needs."""
        self.tree.find_()
        modules, parameters = self.tree.modules, self.tree.parameters
        buffers = self._buffers.copied_(modules, parameters)
        kept: Arguments = copied_arguments((args, kwargs))
        return ModelCall(
            *kept,
            Environment.now(modules.values(), parameters.values(), buffers),
            Versions.of_call(args, kwargs, *kept),
            state_of(parameters.values()),
            chained=self._pending.chained(args, kwargs, self._buffers.curved),
            module=self._calls.name_of(model),
            replaced=self.tree.replaced(),
        )

    def _after_layer(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        """Keep the output of a layer, from which a loss may be computed inside of the model."""
        if self._outputs is not None and self.enabled and is_known(module):
            if sees_own_output(module):
                self._outputs.keep_(module, output)
            else:
                self._outputs.drop_(module)
        if (self._loss_fn is None or self.keeps_outputs) and self._is_recording():
            self._pending.mark_layer_(module, output)

    def _after_model(self, model: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        """Record the output of a call of the model or of a part of it, and return it."""
        if self._running is not model:
            return None
        self._running = self._outputs = None
        own = model, self.tree.modules, self.tree.parameters
        states = self._buffers.compare_(*own) if self.keeps_outputs else ()
        given = self._pending.end_(output, states)
        if self._is_recording():
            self._assume_(output)
        return given

    def _after_loss(
        self, loss_fn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor
    ) -> None:
        """Record a batch when its loss is backpropagated."""
        if not self.enabled or loss_fn is not self._loss_fn:
            return
        inside = self._pending.inside_(loss_fn)
        if not self._is_recording() or not loss.requires_grad:
            return
        self._pending.losses.returned.is_needed = False
        arguments = loss_arguments(loss_fn, args, kwargs)
        observation = GivenObservation.of(loss_fn, arguments, loss, self._pending, inside)
        if not is_built_in(loss_fn):
            self._pending.losses.mark_call_(loss_fn, arguments, loss)
        if observation is None:
            self.observe_(with_kept_reduction(loss_fn, loss))
        else:
            self._record_(loss, observation)

    def _record_(self, loss: Tensor, observation: Observation) -> ObservedLoss:
        """Record a loss when it is backpropagated, and return its mark."""
        this, part = weakref.ref(self), self._pending.losses.mark_(loss)

        def begin_backward(weight: Tensor) -> None:
            recorder = this()
            if recorder is None or not recorder.enabled or part.is_replaced:
                return
            if observation.is_assumed and not recorder._pending.losses.returned.is_needed:
                return
            if recorder.gradients.lands_(observation):
                recorder._begin_backward_(observation, weight.detach(), part)

        loss.register_hook(begin_backward)  # type: ignore[no-untyped-call]
        return part

    def _begin_backward_(
        self, observation: Observation, weight: Tensor, part: ObservedLoss
    ) -> None:
        """Record a batch, whose backward pass begins, as far as no other has it as a part."""
        self._pending.losses.pass_on_(observation.root, weight)
        if (rest := part.rest_(weight)) is None:
            return
        self._drop_cleared_(before_pass=True)
        if self._is_whole:
            check_still_whole(self._model)
        try:
            with self.paused(repeats=True), torch.enable_grad(), explained_checkpoints():
                evaluation, calls = observation.evaluation(rest)
                batch = observation.batch(evaluation, rest, replayed=self.keeps_outputs)
                layers = self._on_backward(evaluation, calls, batch)
                self._batches.append(replace(batch, layers=layers))
        except BaseException:
            self.take()  # and what was collected from earlier losses
            raise
        if any(each.call.replaced for each in batch.forwards):
            self.tree.find_()  # by now the model has its own parameters again
        self.gradients.look_after_pass_(observation)

    def _drop_cleared_(self, *, before_pass: bool) -> None:
        """Drop the batches whose gradients were dropped since."""
        if self._batches and self.gradients.are_cleared(before_pass=before_pass):
            self._batches = []
            self.gradients.clear_()
            self._on_cleared()

    def _is_recording(self) -> bool:
        """Return whether calls are recorded."""
        if torch._C._functorch.peek_interpreter_stack() is None:
            return self.enabled and torch.is_grad_enabled()
        self._pending.in_transform_()
        return False
