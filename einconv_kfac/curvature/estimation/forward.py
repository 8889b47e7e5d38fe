"""Evaluation of a model and its loss on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.arguments import described, shown
from einconv_kfac.curvature.estimation.capture import LayerCall, outputs_of
from einconv_kfac.curvature.estimation.evaluation import (
    Evaluation,
    ReadEvaluation,
    RuleEvaluation,
)
from einconv_kfac.curvature.losses.loss_call import targets_of
from einconv_kfac.curvature.losses.loss_registry import is_overridden
from einconv_kfac.curvature.objective.graph import Edge, edge_of, mark_, mark_of
from einconv_kfac.curvature.objective.loss_account import LossAccount
from einconv_kfac.curvature.objective.outputs import losses_of, tensors_of
from einconv_kfac.curvature.objective.reading import Reading

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch and returns its output and the target, or the loss."""
Loss: TypeAlias = nn.Module | Callable[..., Tensor] | None
"""A loss module, a function of output and target, or ``None`` for a loss that is returned."""


def evaluation_of(
    model: nn.Module,
    loss_fn: Loss,
    batch: Any,
    forward: Forward | None = None,
    calls: Sequence[LayerCall] = (),
    account: LossAccount | None = None,
) -> Evaluation:
    """Evaluate a model and any loss on a batch.

    Args:
        model: The model.
        loss_fn: A loss module, see `evaluated`; a function of output and target; or ``None`` if
            ``forward``, or else the model itself, returns the loss.
        batch: One batch.
        forward: Runs the model on the batch, and returns output and target, or the loss.
        calls: Receives the calls of layers. A loss may depend on their outputs past that of the
            model, as on features that an attribute keeps.
        account: Receives what a loss that is read is taken as.

    Raises:
        ValueError: If there is no loss that depends on the model.
    """
    if isinstance(loss_fn, nn.Module) and not is_overridden(loss_fn):
        return evaluated(model, loss_fn, batch, forward)
    values: list[Tensor] = []

    def mark(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        for tensor in tensors_of(output):
            if tensor.requires_grad:
                mark_(tensor, id(values), len(values))
                values.append(tensor.detach())

    handle = model.register_forward_hook(mark)
    try:
        loss = _read_loss(model, loss_fn, batch, forward)
    finally:
        handle.remove()

    def value(edge: Edge) -> Tensor | None:
        index = mark_of(edge, id(values))
        return None if index is None else values[index]

    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    own = edge_of(loss), loss.detach(), torch.ones_like(loss), value, names
    return ReadEvaluation(Reading(*own, layers=outputs_of(calls), account=account))


def _read_loss(model: nn.Module, loss_fn: Loss, batch: Any, forward: Forward | None) -> Tensor:
    """Return the loss of a batch, one number with its graph."""
    if loss_fn is not None:
        output, target = (_on_pair if forward is None else forward)(model, batch)
        found = [loss_fn(output, *targets_of(target))]
    else:
        returned: Any = _called(model, batch) if forward is None else forward(model, batch)
        found = losses_of(returned)
    is_one = len(found) == 1 and isinstance(found[0], Tensor)
    if not is_one or found[0].numel() != 1 or not found[0].requires_grad:
        raise ValueError(
            "The loss must be one number that depends on the model, got "
            f"{', '.join(map(shown, found)) or 'none'}. Pass a loss module, a function of output "
            "and target, or loss_fn=None with a `forward` that returns the loss."
        )
    return found[0]


def evaluated(
    model: nn.Module, loss_fn: nn.Module, batch: Any, forward: Forward | None = None
) -> RuleEvaluation:
    """Evaluate a model and its loss on a batch.

    Args:
        model: The model. If ``loss_fn`` is one of its submodules, the loss of that call is
            returned.
        loss_fn: The loss module.
        batch: One batch, ``(x, y)`` without ``forward``.
        forward: Runs the model on the batch.

    Raises:
        ValueError: If the batch is not a pair and there is no ``forward``, or the output is no
            tensor.
        RuntimeError: If ``loss_fn`` is a submodule that is not called exactly once.
    """
    if any(module is loss_fn for module in model.modules()):
        return _evaluated_inside(model, loss_fn, batch, forward)
    output, target = (_on_pair if forward is None else forward)(model, batch)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"The model's output must be a tensor for a {type(loss_fn).__name__}, got "
            f"{described(output)}. Pass `forward`, a function of model and batch that returns the "
            "tensor of scores and the target, or a function of output and target as `loss_fn`."
        )
    return RuleEvaluation(loss_fn, output, target)


def _evaluated_inside(
    model: nn.Module, loss_fn: nn.Module, batch: Any, forward: Forward | None
) -> RuleEvaluation:
    """Evaluate a model that computes its loss itself."""
    seen: list[RuleEvaluation] = []

    def record(_: nn.Module, inputs: tuple[Any, ...], loss: Tensor) -> None:
        output, *targets = inputs
        target = targets[0] if len(targets) == 1 else tuple(targets)
        seen.append(RuleEvaluation(loss_fn, output, target, loss))

    handle = loss_fn.register_forward_hook(record)
    try:
        _called(model, batch) if forward is None else forward(model, batch)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise RuntimeError(
            f"A model that computes its loss must call `loss_fn` once per batch, got {len(seen)} "
            "calls. Pass loss_fn=None and return the whole loss from `forward`."
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
