"""Kronecker factors of a model: which Fisher, from which data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from einconv_kfac.curvature.capture import LayerCall, LayerCapture, call_gradients
from einconv_kfac.curvature.kronecker import KroneckerBlock, KroneckerFactors
from einconv_kfac.curvature.layers import Approximation, find_layers
from einconv_kfac.curvature.losses import check_reduction, loss_rule
from einconv_kfac.curvature.moments import LayerMoments

Fisher: TypeAlias = Literal["mc", "empirical", "exact", "forward-only"]


@dataclass(frozen=True)
class FisherEstimator:
    """Which Fisher of which loss, and how positions are treated.

    Args:
        loss_fn: The loss module.
        fisher: ``"mc"`` samples targets from the model, ``"exact"`` takes every direction of
            the loss Hessian, ``"empirical"`` takes the given targets, ``"forward-only"`` sets
            ``B`` to the identity.
        mc_samples: Number of samples per example for ``"mc"``.
        approximation: ``"expand"`` or ``"reduce"``.

    Raises:
        ValueError: If an argument is not one of these, or the loss is not known.
    """

    loss_fn: nn.Module
    fisher: Fisher = "mc"
    mc_samples: int = 1
    approximation: Approximation = "expand"

    def __post_init__(self) -> None:
        for name, kinds in (("fisher", Fisher), ("approximation", Approximation)):
            if getattr(self, name) not in get_args(kinds):
                value = getattr(self, name)
                raise ValueError(f"`{name}` must be one of {get_args(kinds)}, got {value!r}.")
        if self.mc_samples < 1:
            raise ValueError(f"`mc_samples` must be at least 1, got {self.mc_samples}.")
        if self.fisher in {"mc", "exact"}:
            loss_rule(self.loss_fn)
        check_reduction(self.loss_fn)

    def scale(self, examples: int) -> float:
        """Return what ``A (x) B`` is multiplied by: 1 for a mean loss, ``examples`` for a sum."""
        return 1.0 if check_reduction(self.loss_fn) == "mean" else float(examples)

    def factors(self, moments: LayerMoments) -> tuple[Tensor, Tensor]:
        """Return a layer's ``A [g, d, d]`` and ``B [g, co, co]``."""
        a, b = moments.factors()
        if self.fisher == "forward-only":
            b = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device).expand_as(b).contiguous()
        return a, b

    def add_(
        self,
        moments: Mapping[str, LayerMoments],
        calls: Sequence[LayerCall],
        loss: tuple[Tensor, Tensor, Tensor],
        generator: Generator,
    ) -> None:
        """Add one batch to the moments.

        Args:
            moments: By layer name.
            calls: The calls of the layers in the forward pass.
            loss: Model output, target, and the loss of the two.
            generator: For ``"mc"``; the global random state is left alone.
        """
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for position, gradient in self._gradients(calls, loss, generator).items():
            pairs[calls[position].layer].append((calls[position].x, gradient))
        for name, found in pairs.items():
            moments[name].add_([x for x, _ in found], [gradient for _, gradient in found])

    def _gradients(
        self,
        calls: Sequence[LayerCall],
        loss: tuple[Tensor, Tensor, Tensor],
        generator: Generator,
    ) -> dict[int, Tensor]:
        """Return per-example gradients ``[v, *y]`` by the position of the call."""
        output, target, value = loss
        if self.fisher == "forward-only":
            return {
                p: call.x.new_zeros(()).expand(1, *call.y_shape) for p, call in enumerate(calls)
            }
        if self.fisher in {"mc", "exact"}:
            rule, detached = loss_rule(self.loss_fn), output.detach()
            roots = (
                rule.sampled(self.loss_fn, detached, target, self.mc_samples, generator)
                if self.fisher == "mc"
                else rule.exact(self.loss_fn, detached, target)
            )
            power = 0.5
        else:
            output, roots, power = value, torch.ones_like(value).unsqueeze(0), 1.0
        gradients = call_gradients(output, roots, calls)
        if check_reduction(self.loss_fn) == "mean":
            for position, gradient in gradients.items():
                gradient.mul_(calls[position].x.shape[0] ** power)
        return gradients


def kronecker_factors(
    model: nn.Module,
    loss_fn: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    *,
    fisher: Fisher = "mc",
    mc_samples: int = 1,
    approximation: Approximation = "expand",
    progress: bool = False,
    seed: int = 0,
) -> KroneckerFactors:
    """Return the Kronecker factors of every linear and convolution layer, averaged over data."""
    estimator = FisherEstimator(loss_fn, fisher, mc_samples, approximation)
    layers = find_layers(model)
    moments = {layer.name: LayerMoments(layer, approximation) for layer in layers}
    capture = LayerCapture([(layer.name, layer.module) for layer in layers])
    generators: dict[torch.device, Generator] = {}
    total = len(data) if isinstance(data, Sized) else None
    try:
        for x, y in tqdm(data, total=total, desc="factors", disable=not progress):
            with torch.enable_grad():
                output = model(x)
                value = loss_fn(output, y)
            generator = generators.setdefault(
                output.device, Generator(output.device).manual_seed(seed)
            )
            estimator.add_(moments, capture.take(), (output, y, value), generator)
    finally:
        capture.remove()
    blocks = {}
    for layer in layers:
        a, b = estimator.factors(moments[layer.name])
        scale = estimator.scale(moments[layer.name].examples)
        blocks[layer.name] = KroneckerBlock(a, b, layer.parameters, scale)
    return KroneckerFactors(blocks)
