"""What a step needs to know of the batches it steps on.

Hooks on the model and on the loss keep, for each batch whose loss is backpropagated, the
model's inputs, the random state before the forward pass, the output, the target, the loss
and the weight with which the loss enters the objective (``1 / k`` if a user divides by ``k``
micro-batches). That is enough to run the model again exactly as it ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class RandomState:
    """The state of torch's global random generators on the devices of a model."""

    cpu: Tensor
    cuda: dict[int, Tensor]

    @staticmethod
    def current(devices: set[int]) -> RandomState:
        """Return the state now."""
        cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
        return RandomState(torch.get_rng_state(), cuda)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Go back to this state inside the block, and to the current one after it."""
        with torch.random.fork_rng(devices=list(self.cuda)):
            torch.set_rng_state(self.cpu)
            for device, state in self.cuda.items():
                torch.cuda.set_rng_state(state, device)
            yield


@dataclass(frozen=True)
class ForwardPass:
    """One call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    output: Tensor


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

    Args:
        model: The model.
        loss_fn: The loss module.
        on_backward: Called with output, target and loss (with their graph) when the backward
            pass of a loss begins.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        on_backward: Callable[[Tensor, Tensor, Tensor], None],
    ) -> None:
        self.enabled = True
        self.batches: list[Batch] = []
        self._model = model
        self._loss_fn = loss_fn
        self._on_backward = on_backward
        self._pending: tuple[tuple[Any, ...], dict[str, Any], RandomState] | None = None
        self._last: ForwardPass | None = None
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model),
            loss_fn.register_forward_hook(self._after_loss),
        ]

    def take(self) -> list[Batch]:
        """Return the batches since the last time, and forget them."""
        batches, self.batches = self.batches, []
        self._last = None
        return batches

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def _recording(self) -> bool:
        return self.enabled and torch.is_grad_enabled()

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._recording():
            devices = {p.device.index for p in model.parameters() if p.is_cuda}
            self._pending = (args, kwargs, RandomState.current(devices))

    def _after_model(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if self._recording() and self._pending is not None:
            self._last, self._pending = ForwardPass(*self._pending, output), None

    def _after_loss(self, _: nn.Module, inputs: tuple[Any, ...], loss: Tensor) -> None:
        if not self._recording() or not loss.requires_grad:
            return
        output, target = inputs
        forward = self._last if self._last is not None and self._last.output is output else None

        def begin_backward(weight: Tensor) -> None:
            if self.enabled:
                with self.paused(), torch.enable_grad():
                    self._on_backward(output, target, loss)
                parts = (output.detach(), target, loss.detach(), weight.detach())
                self.batches.append(Batch(forward, *parts))

        loss.register_hook(begin_backward)  # type: ignore[no-untyped-call]

    def replay(self, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
        """Return the model's output on a batch for other parameters.

        Random layers draw what they drew; buffers such as running statistics stay as they are.

        Raises:
            RuntimeError: If the batch does not know its forward pass.
        """
        forward = batch.forward
        if forward is None:
            raise RuntimeError(
                "`loss_fn` must be called on the model's output itself when adaptive=True, "
                "got another tensor. Move what happens in between into the model, or pass "
                "adaptive=False."
            )
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        with self.paused(), forward.random.restored():
            output: Tensor = functional_call(
                self._model, {**buffers, **parameters}, forward.args, forward.kwargs
            )
        return output

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Evaluate the loss without recording it."""
        with self.paused():
            loss: Tensor = self._loss_fn(output, target)
        return loss
