"""Normalisation of entries over examples, positions or channels, as in a discriminator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.objective.node_rule import Function, NodeRule


@dataclass(frozen=True)
class Normalisation(NodeRule):
    """A normalisation whose scale and shift are constants; the shift is left out.

    No node saves the shift. The output changes as much without it.

    Args:
        kind: See `NodeRule`.
        of: Returns the operation of a node.
    """

    kind: str
    of: Callable[[Any], Function]

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        return [node._saved_input.detach()]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return self.of(node)


def _of_batch(node: Any, *, eps: str = "eps") -> Function:
    """Return a batch normalisation, with the statistics of the batch or with saved ones."""
    own = {"weight": _constant(node._saved_weight), "eps": getattr(node, f"_saved_{eps}")}
    if node._saved_training:
        return partial(_normalised, None, None, training=True, **own)
    mean, variance = node._saved_running_mean.detach(), node._saved_running_var.detach()
    return partial(_normalised, mean, variance, training=False, **own)


def _normalised(mean: Tensor | None, variance: Tensor | None, x: Tensor, **own: Any) -> Tensor:
    """Return a batch normalisation of ``x [n, c, *]``, which is the last positional argument."""
    return functional.batch_norm(x, mean, variance, **own)


def _of_layer(node: Any) -> Function:
    """Return a layer normalisation, whose node does not save eps."""
    shape, x = [*node._saved_normalized_shape], node._saved_input.detach().double()
    dims = [*range(x.ndim - len(shape), x.ndim)]
    eps = _eps(node, x.var(dims, correction=0, keepdim=True))
    weight = _constant(node._saved_weight)
    return partial(functional.layer_norm, normalized_shape=shape, weight=weight, eps=eps)


def _of_groups(node: Any) -> Function:
    """Return a normalisation of groups of channels; not all versions of torch save eps."""
    x, groups = node._saved_input.detach().double(), node._saved_group
    eps = _eps(node, x.reshape(len(x), groups, -1).var(2, correction=0))
    weight = _constant(node._saved_weight)
    return partial(functional.group_norm, num_groups=groups, weight=weight, eps=eps)


def _eps(node: Any, variance: Tensor) -> float:
    """Return the number that was added to the variance, of which the node saves the inverse root.

    Args:
        node: The node.
        variance: The variance, shaped like that inverse root.
    """
    inner = node._saved_result2.detach().double().square().reciprocal()
    return float((inner - variance).mean().clamp_min(0))


def _constant(value: Tensor | None) -> Tensor | None:
    """Return a scale, if there is one."""
    return None if value is None else value.detach()


RULES = (
    Normalisation("NativeBatchNorm", _of_batch),
    Normalisation("CudnnBatchNorm", partial(_of_batch, eps="epsilon")),
    Normalisation("NativeLayerNorm", _of_layer),
    Normalisation("NativeGroupNorm", _of_groups),
)
