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

from einconv_kfac.curvature.estimation.capture import LayerCall, LayerCapture, inactive_hook
from einconv_kfac.optim.replay.buffers import ChangingBuffers
from einconv_kfac.optim.replay.forward import ForwardPass, Surroundings
from einconv_kfac.optim.replay.layer_jvp import LINEAR, NORMALIZING
from einconv_kfac.optim.replay.loss_input import Inside, Targets, loss_arguments
from einconv_kfac.optim.replay.pending import PendingPasses
from einconv_kfac.optim.replay.subsample import Portion, check_separate


@dataclass(frozen=True)
class Batch:
    """One backpropagated loss.

    Args:
        forward: The model call that made the output, or ``None`` if the loss was given
            something that the model did not return.
        output: First argument of the loss, ``[n, ...]``, detached.
        target: Second argument of the loss, or all `Targets`.
        loss: The loss, detached.
        weight: The derivative of the objective by this loss.
        portion: The examples that its curvature is taken from, if not all.
    """

    forward: ForwardPass | None
    output: Tensor
    target: Any
    loss: Tensor
    weight: Tensor
    portion: Portion | None = None


class Recorder:
    """Keeps the batches since the last step.

    The hooks do not keep the recorder alive, and copies of the model are not recorded.

    Args:
        model: The model.
        loss_fn: The loss module.
        on_backward: Called when the backward pass of a loss begins, with the output (with its
            graph), the target, and the calls of layers up to the loss.
        capture: Records the calls of layers; none by default.
        entry: The module that is called: the model, or what ``torch.compile`` made of it.
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
        self.forward_mode = True
        self.products_checked = False
        self.batches: list[Batch] = []
        self._model = model
        self._loss_fn = loss_fn
        self._on_backward = on_backward
        self._entry = model if entry is None else entry
        self._capture = LayerCapture([]) if capture is None else capture
        self._passes = PendingPasses(self._capture)
        self._buffers = ChangingBuffers()
        self._handles = _attach(weakref.ref(self), self._entry, loss_fn)
        weakref.finalize(self, _detach, self._handles)

    def take(self) -> list[Batch]:
        """Return the batches since the last time, and forget them."""
        batches, self.batches = self.batches, []
        self._passes.clear_()
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
        if self._is_recording() and model is self._entry:
            buffers = self._buffers.copied(self._model) if self.keeps_outputs else {}
            self._passes.begin_(args, kwargs, Surroundings.now(self._model, buffers))

    def after_layer(self, module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
        """Keep what Jacobian-vector products need not compute again."""
        if self.keeps_outputs and self.enabled:
            self._passes.keep_(module, output)

    def after_model(self, model: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        """Note how it ends."""
        if self._is_recording() and model is self._entry:
            self._passes.end_(output)
            self._buffers.notice_(self._model)

    def after_loss(
        self, loss_fn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor
    ) -> None:
        """Record the batch once its loss is backpropagated."""
        if not self.enabled or loss_fn is not self._loss_fn:
            return
        inside = self._passes.count_loss_(loss_fn)
        if not torch.is_grad_enabled() or not loss.requires_grad:
            return
        output, *targets = loss_arguments(loss_fn, args, kwargs)
        target = targets[0] if len(targets) == 1 else Targets(targets)
        forward, calls = self._passes.of_(output, inside)
        if forward is None and not _depends(loss, self._model):
            return  # it is another model's
        this, value = weakref.ref(self), loss.detach()  # a hook that knew the loss would keep it

        def begin_backward(weight: Tensor) -> None:
            recorder = this()
            if recorder is not None and recorder.enabled:
                with recorder.paused(), torch.enable_grad():
                    recorder._on_backward(output, target, calls)
                parts = (output.detach(), target, value, weight.detach())
                recorder.batches.append(Batch(forward, *parts))

        loss.register_hook(begin_backward)  # type: ignore[no-untyped-call]

    def _is_recording(self) -> bool:
        return self.enabled and torch.is_grad_enabled()

    def replay(self, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
        """Return the loss's argument on a batch, whose forward pass is known, for parameters."""
        assert batch.forward is not None
        with self.paused(), self._capture.paused():
            return batch.forward.again(self._model, parameters)

    def repeat(self, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
        """Return the loss's argument as `replay` does, for the batch's portion."""
        assert batch.forward is not None
        with self.paused(), self._capture.paused():
            return batch.forward.of(batch.portion).again(self._model, parameters)

    def tangent(self, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
        """Return the same for the batch's own parameters, which carry tangents."""
        assert batch.forward is not None
        with self.paused(), self._capture.paused():
            return batch.forward.of(batch.portion).tangent(self._model, parameters)

    def check_batch(self, batch: Batch) -> None:
        """Raise a ``RuntimeError`` if a batch or its portion cannot run again."""
        if batch.forward is None:
            return
        if isinstance(batch.forward.place, Inside) and self._entry is not self._model:
            raise RuntimeError(
                "`loss_fn` must be called outside of a compiled model when adaptive=True, got a "
                "call inside, which is not seen where compiled code runs. Compile the part before "
                "the loss and pass that here, or pass adaptive=False."
            )
        if batch.portion is not None:
            check_separate(self._model)
            batch.forward.of(batch.portion)

    def loss(self, output: Tensor, target: Any) -> Tensor:
        """Evaluate the loss without recording it."""
        targets = target if isinstance(target, Targets) else (target,)
        with self.paused():
            loss: Tensor = self._loss_fn(output, *targets)
        return loss


class _Hook:
    """Tells a recorder of an event while there is one; copies of it do nothing.

    Args:
        recorder: The recorder.
        event: Name of the method to call.
    """

    def __init__(self, recorder: weakref.ref[Recorder], event: str) -> None:
        self._recorder = recorder
        self._event = event

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if (recorder := self._recorder()) is not None:
            getattr(recorder, self._event)(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return inactive_hook, ()


def _attach(reference: weakref.ref[Recorder], model: nn.Module, loss_fn: nn.Module) -> list[Any]:
    """Attach hooks that do nothing once the recorder is gone."""
    layers = [m for m in model.modules() if type(m) in (*LINEAR, *NORMALIZING)]
    return [
        *(layer.register_forward_hook(_Hook(reference, "after_layer")) for layer in layers),
        model.register_forward_pre_hook(_Hook(reference, "before_model"), with_kwargs=True),
        model.register_forward_hook(_Hook(reference, "after_model")),
        loss_fn.register_forward_hook(_Hook(reference, "after_loss"), with_kwargs=True),
    ]


def _depends(loss: Tensor, model: nn.Module) -> bool:
    """Tell whether a loss depends on a model's parameters."""
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


def _detach(handles: list[Any]) -> None:
    """Remove hooks."""
    for handle in handles:
        handle.remove()
