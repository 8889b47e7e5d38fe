"""Hooks that record the batches of a step.

They record, for each loss that is backpropagated, the forward pass, the output, the target, the
loss and the weight with which the loss enters the objective (``1 / k`` if a training loop
divides by ``k`` micro-batches).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from einconv_kfac.curvature.estimation.capture import LayerCall, LayerCapture, inactive_hook
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.buffers import ChangingBuffers
from einconv_kfac.optim.replay.environment import Environment
from einconv_kfac.optim.replay.forward import ModelCall
from einconv_kfac.optim.replay.layer_outputs import LINEAR, NORMALIZING, LayerOutputs
from einconv_kfac.optim.replay.loss_input import Targets, loss_arguments
from einconv_kfac.optim.replay.pending import PendingCalls


class Recorder:
    """Records the batches since the last step.

    The hooks do not keep the recorder alive, and copies of the model are not recorded.

    Args:
        model: The model.
        loss_fn: The loss module.
        on_backward: Called when the backward pass of a loss begins, with the output (with its
            graph), the target, and the calls of layers up to the loss.
        capture: Records the calls of layers; none by default.
        entry: The module that is called: the model, or the result of ``torch.compile(model)``.

    Attributes:
        enabled: Whether calls are recorded.
        keeps_outputs: Whether buffers and outputs of layers are kept for a replay.
        batches: The batches recorded so far.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        on_backward: Callable[[Tensor, Any, list[LayerCall]], None],
        capture: LayerCapture | None = None,
        entry: nn.Module | None = None,
    ) -> None:
        self.enabled = True
        self.keeps_outputs = False
        self.batches: list[Batch] = []
        self._model = model
        self._loss_fn = loss_fn
        self._on_backward = on_backward
        self._entry = model if entry is None else entry
        self._capture = LayerCapture([]) if capture is None else capture
        self._pending = PendingCalls(self._capture)
        self._buffers = ChangingBuffers()
        self._outputs: LayerOutputs | None = None  # of the call that is running
        self._handles = self._attached()
        weakref.finalize(self, _detach, self._handles)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is recorded."""
        return not self.batches and self._pending.is_empty

    def take(self) -> list[Batch]:
        """Return the batches recorded since the last time, and drop everything recorded."""
        batches, self.batches = self.batches, []
        self._outputs = None
        self._pending.clear_()
        return batches

    def remove(self) -> None:
        """Remove every hook, and drop everything recorded."""
        _detach(self._handles)
        self.take()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record neither batches nor calls of layers inside the block."""
        capture = self._capture
        before = self.enabled, capture.enabled
        self.enabled = capture.enabled = False
        try:
            yield
        finally:
            self.enabled, capture.enabled = before

    def _attached(self) -> list[RemovableHandle]:
        """Attach the hooks, and return their handles."""
        model, after_layer = self._entry, _Hook(self._after_layer)
        layers = [m for m in model.modules() if type(m) in (*LINEAR, *NORMALIZING)]
        return [
            *(layer.register_forward_hook(after_layer) for layer in layers),
            model.register_forward_pre_hook(_Hook(self._before_model), with_kwargs=True),
            model.register_forward_hook(_Hook(self._after_model)),
            self._loss_fn.register_forward_hook(_Hook(self._after_loss), with_kwargs=True),
        ]

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Record the arguments and the environment of a call of the model."""
        if self._is_recording(model):
            buffers = self._buffers.copied_(self._model) if self.keeps_outputs else {}
            call = ModelCall(args, kwargs, Environment.now(self._model, buffers))
            self._outputs = call.outputs if self.keeps_outputs else None
            self._pending.begin_(call)

    def _after_layer(self, module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
        """Keep the output of a layer."""
        if self._outputs is not None and self.enabled:
            self._outputs.keep_(module, output)

    def _after_model(self, model: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        """Record the output of a call of the model."""
        if self._is_recording(model):
            self._outputs = None
            self._pending.end_(output)
            if self.keeps_outputs:
                self._buffers.compare_(self._model)

    def _after_loss(
        self, loss_fn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor
    ) -> None:
        """Record a batch when its loss is backpropagated."""
        if not self.enabled or loss_fn is not self._loss_fn:
            return
        inside = self._pending.count_loss_(loss_fn)
        if not torch.is_grad_enabled() or not loss.requires_grad:
            return
        output, *targets = loss_arguments(loss_fn, args, kwargs)
        target = targets[0] if len(targets) == 1 else Targets(targets)
        forward, calls = self._pending.use_(output, inside)
        if forward is None and not _depends(loss, self._model):
            return  # it is the loss of another model
        this, value = weakref.ref(self), loss.detach()  # a hook with the loss would keep it alive

        def begin_backward(weight: Tensor) -> None:
            recorder = this()
            if recorder is not None and recorder.enabled:
                with recorder.paused(), torch.enable_grad():
                    recorder._on_backward(output, target, calls)
                batch = Batch(forward, output.detach(), target, value, weight.detach())
                recorder.batches.append(batch)

        loss.register_hook(begin_backward)  # type: ignore[no-untyped-call]

    def _is_recording(self, model: nn.Module) -> bool:
        """Return whether a call is one of the model that is to be recorded."""
        return self.enabled and torch.is_grad_enabled() and model is self._entry


class _Hook:
    """Calls a method of an object while the object exists; copies of the hook do nothing.

    Args:
        method: The method, bound to the object.
    """

    def __init__(self, method: Callable[..., None]) -> None:
        self._method = weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if (method := self._method()) is not None:
            method(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return inactive_hook, ()


def _depends(loss: Tensor, model: nn.Module) -> bool:
    """Return whether a loss depends on a model's parameters."""
    own = set(model.parameters())
    found: set[Any] = {None}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        if (node := waiting.pop()) not in found:
            found.add(node)
            if getattr(node, "variable", None) in own:
                return True
            waiting += [following for following, _ in node.next_functions]
    return False


def _detach(handles: list[RemovableHandle]) -> None:
    """Remove hooks."""
    for handle in handles:
        handle.remove()
