"""What a step needs to know of the batches it steps on.

Hooks on the model and on the loss keep, for each batch whose loss is backpropagated, the
forward pass, the output, the target, the loss and the weight with which the loss enters the
objective (``1 / k`` if a user divides by ``k`` micro-batches).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.optim.replay import ForwardPass, Surroundings


@dataclass(frozen=True)
class Batch:
    """One backpropagated loss.

    Args:
        forward: The model call that made the output, or ``None`` if the loss was given
            something other than the model's output.
        output: First argument of the loss, ``[n, ...]``, detached.
        target: Second argument of the loss.
        loss: The loss, detached.
        weight: The derivative of the objective by this loss.
    """

    forward: ForwardPass | None
    output: Tensor
    target: Tensor
    loss: Tensor
    weight: Tensor


class Recorder:
    """Keeps the batches since the last step.

    The hooks do not keep the recorder alive, and copies of the model are not recorded.

    Args:
        model: The model.
        loss_fn: The loss module.
        on_backward: Called with output (with its graph) and target when the backward pass of
            a loss begins.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        on_backward: Callable[[Tensor, Tensor], None],
    ) -> None:
        self.enabled = True
        self.batches: list[Batch] = []
        self._model = model
        self._loss_fn = loss_fn
        self._on_backward = on_backward
        self._begun: tuple[tuple[Any, ...], dict[str, Any], Surroundings] | None = None
        self._last: ForwardPass | None = None
        self._handles = _attach(weakref.ref(self), model, loss_fn)
        weakref.finalize(self, _detach, self._handles)

    def take(self) -> list[Batch]:
        """Return the batches since the last time, and forget them."""
        batches, self.batches = self.batches, []
        self._last = self._begun = None
        return batches

    def remove(self) -> None:
        """Remove every hook, and forget what was recorded."""
        _detach(self._handles)
        self.take()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note how a forward pass begins."""
        if self._is_recording() and model is self._model:
            self._begun = (args, kwargs, Surroundings.now(model))

    def after_model(self, model: nn.Module, output: Any) -> None:
        """Note how it ends."""
        if self._is_recording() and model is self._model and self._begun is not None:
            self._last, self._begun = ForwardPass(*self._begun, output), None

    def after_loss(self, loss_fn: nn.Module, inputs: tuple[Any, ...], loss: Tensor) -> None:
        """Record the batch once its loss is backpropagated."""
        if not self._is_recording() or loss_fn is not self._loss_fn or not loss.requires_grad:
            return
        output, target = inputs
        forward = self._last if self._last is not None and self._last.output is output else None
        this, value = weakref.ref(self), loss.detach()  # a hook that knew the loss would keep it

        def begin_backward(weight: Tensor) -> None:
            recorder = this()
            if recorder is not None and recorder.enabled:
                with recorder.paused(), torch.enable_grad():
                    recorder._on_backward(output, target)
                parts = (output.detach(), target, value, weight.detach())
                recorder.batches.append(Batch(forward, *parts))

        loss.register_hook(begin_backward)  # type: ignore[no-untyped-call]

    def _is_recording(self) -> bool:
        return self.enabled and torch.is_grad_enabled()

    def replay(self, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
        """Return the model's output on a batch, whose forward pass is known, for parameters."""
        assert batch.forward is not None
        with self.paused():
            output: Tensor = batch.forward.again(self._model, parameters)
        return output

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Evaluate the loss without recording it."""
        with self.paused():
            loss: Tensor = self._loss_fn(output, target)
        return loss


def _attach(reference: weakref.ref[Recorder], model: nn.Module, loss_fn: nn.Module) -> list[Any]:
    """Attach hooks that do nothing once the recorder is gone."""

    def before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (recorder := reference()) is not None:
            recorder.before_model(module, args, kwargs)

    def after_model(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        if (recorder := reference()) is not None:
            recorder.after_model(module, output)

    def after_loss(module: nn.Module, inputs: tuple[Any, ...], loss: Tensor) -> None:
        if (recorder := reference()) is not None:
            recorder.after_loss(module, inputs, loss)

    return [
        model.register_forward_pre_hook(before_model, with_kwargs=True),
        model.register_forward_hook(after_model),
        loss_fn.register_forward_hook(after_loss),
    ]


def _detach(handles: list[Any]) -> None:
    """Remove hooks."""
    for handle in handles:
        handle.remove()
