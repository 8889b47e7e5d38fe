"""Evaluation of a model and its loss on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from einconv_kfac.curvature.losses import evaluate_loss

Forward: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor, Any]]
"""Runs a model on a batch and returns its output and the target."""


class Evaluation(NamedTuple):
    """A model's output on a batch, the target, and the loss of the two."""

    output: Tensor
    target: Any
    loss: Tensor


def evaluated(
    model: nn.Module, loss_fn: nn.Module, batch: Any, forward: Forward | None = None
) -> Evaluation:
    """Evaluate a model and its loss on a batch.

    Args:
        model: The model. If ``loss_fn`` is one of its submodules, the loss of that call is
            returned.
        loss_fn: The loss module.
        batch: One batch, ``(x, y)`` without ``forward``.
        forward: Runs the model on the batch.

    Raises:
        ValueError: If the batch is not a pair and there is no ``forward``.
        RuntimeError: If ``loss_fn`` is a submodule that is not called exactly once.
    """
    if any(module is loss_fn for module in model.modules()):
        return _evaluated_inside(model, loss_fn, batch, forward)
    output, target = (_on_pair if forward is None else forward)(model, batch)
    return Evaluation(output, target, evaluate_loss(loss_fn, output, target))


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or the model itself."""
    original = getattr(model, "_orig_mod", model)
    assert isinstance(original, nn.Module)
    return original


def _evaluated_inside(
    model: nn.Module, loss_fn: nn.Module, batch: Any, forward: Forward | None
) -> Evaluation:
    """Evaluate a model that computes its loss itself."""
    seen: list[Evaluation] = []

    def record(_: nn.Module, inputs: tuple[Any, ...], loss: Tensor) -> None:
        output, *target = inputs
        seen.append(Evaluation(output, target[0] if len(target) == 1 else tuple(target), loss))

    handle = loss_fn.register_forward_hook(record)
    try:
        _called(model, batch) if forward is None else forward(model, batch)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise RuntimeError(
            f"A model that computes its loss must call `loss_fn` once per batch, got {len(seen)} "
            "calls."
        )
    return seen[0]


def _on_pair(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    """Run the model on a batch ``(x, y)``."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(
            f"`data` must yield pairs (x, y), got {type(batch).__name__}. Pass `forward` for "
            "batches of another form."
        )
    x, y = batch
    return _called(model, x), y


def _called(model: nn.Module, x: Any) -> Tensor:
    """Return the model's output for one input, several, or named ones."""
    output: Tensor
    if isinstance(x, Mapping):
        output = model(**x)
    elif isinstance(x, (tuple, list)):
        output = model(*x)
    else:
        output = model(x)
    return output
