"""Curvature of a model, averaged over data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.arguments import (
    callback,
    check_batches,
    choice,
    flag,
    names_of,
    seed_value,
)
from einconv_kfac.curvature.blocks.block_diagonal import KroneckerFactors
from einconv_kfac.curvature.blocks.eigen import EigenBlock
from einconv_kfac.curvature.blocks.kronecker import KroneckerBlock
from einconv_kfac.curvature.estimation.data_pass import DataPass
from einconv_kfac.curvature.estimation.factor_sums import DEFAULT_MAX_FACTOR_SIZE
from einconv_kfac.curvature.estimation.fisher import Fisher, FisherEstimator
from einconv_kfac.curvature.estimation.forward import Forward, Loss
from einconv_kfac.curvature.estimation.moments import LayerMoments
from einconv_kfac.curvature.estimation.squared_gradients import SquaredGradients
from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.layers.discovery import find_layers
from einconv_kfac.curvature.layers.exclusion import Exclusion
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.curvature.losses import check_reduction, loss_rule
from einconv_kfac.curvature.losses.loss_call import is_sum
from einconv_kfac.curvature.module_arguments import check_module
from einconv_kfac.distributed.detection import check_whole, parallel_workers_of
from einconv_kfac.distributed.wrappers import unwrapped

Kind: TypeAlias = Literal["kfac", "ekfac", "diagonal"]


def kronecker_factors(
    model: nn.Module,
    loss_fn: Loss,
    data: Iterable[Any],
    *,
    fisher: Fisher = "mc",
    mc_samples: int = 1,
    approximation: Approximation = "expand",
    max_factor_size: int = DEFAULT_MAX_FACTOR_SIZE,
    exclude: Exclusion = (),
    parameters: Collection[str] | None = None,
    forward: Forward | None = None,
    kind: Kind = "kfac",
    progress: bool = False,
    seed: int = 0,
) -> KroneckerFactors:
    """Return the Kronecker factors of every layer that a rule covers, averaged over data.

    With the inputs ``a[n, s]`` of a layer and the gradients ``g[n, s]`` of the loss of example
    ``n`` alone at its outputs, a layer's block is ``B (x) A`` per channel group with::

        expand:  A = 1/N sum_{n,s} a a^T,     B = 1/(N S) sum_{n,s} g g^T
        reduce:  A = 1/N sum_n abar abar^T,   B = 1/N sum_n gsum gsum^T

    (Grosse and Martens, 2016; Eschenhagen et al., 2023), times ``N`` for a sum loss. A layer that
    some batches do not use, as an expert or a branch, has averages over the batches that do; for a
    mean loss its block is multiplied by their share of all examples. A batch in which no target
    counts, since every label is ignored or of a class without weight, is left out of all averages,
    as if it were not in the data. For fisher='empirical' and a mean over ``T`` terms per example,
    the block is of the order of ``1/T`` of the others, see `FisherEstimator`. With ``"expand"`` the
    ``A`` of an embedding is diagonal and stored as its diagonal. An embedding and a linear layer of
    one weight have one block: the Kronecker product that has the partial traces of the sum of both
    layers' products, so that its trace is that of the sum. The model does not change:
    gradients, buffers, training flags and the random state are restored.

    A weight may be used past the calls of its layer: transposed, in a function, or in a
    derivative of the network that the forward pass takes. The calls do not describe its gradients
    then. With the gradients ``G[n] [co, d]`` of the weight itself its block is::

        A = sum_n G^T G / sum_n |G|^2,   B = 1/N sum_n G G^T

    It has the trace and the partial traces of the exact block, and it is the exact block where
    ``co`` or ``d`` is 1, or where that is a Kronecker product. It takes a backward pass for each
    example and each root vector.

    Args:
        model: The model. With `DistributedDataParallel`, each worker passes its part of the data,
            and all of them have the average over the whole.
        loss_fn: The loss module, with reduction ``"mean"``, ``"batchmean"`` or ``"sum"``. If it
            is a submodule of the model, which then computes its loss itself, it is not called
            again. A function of output and target, such as
            ``torch.nn.functional.cross_entropy``, is a mean over examples; its curvature is read
            off the autograd graph. ``None`` stands for a loss that ``forward``, or else the
            model, returns.
        data: Batches ``(x, y)``. An ``x`` that is a tuple, list or mapping is passed as
            positional or keyword arguments. A tuple ``y`` is passed as several targets.
        fisher: See `FisherEstimator`, as for the next two.
        mc_samples: See `FisherEstimator`.
        approximation: See `FisherEstimator`.
        max_factor_size: Largest number of rows of ``A`` or ``B``. A larger factor is replaced by
            its diagonal and never formed; the printed result names such factors.
        exclude: Modules, their types, their names or patterns of names (``"encoder.*"``), with
            all that they contain, that get no block.
        parameters: Names of the weights that get a block, with their layers' biases; all by
            default.
        forward: Runs the model on a batch of another form, and returns output and target.
        kind: ``"kfac"`` for the blocks above; ``"ekfac"`` for the exact second moments of
            per-example gradients in their eigenbasis (George et al., 2018), in a second pass
            over the data; ``"diagonal"`` for the exact diagonal of the Fisher or GGN.
        progress: Whether to show a progress bar.
        seed: Seed of the samples for ``"mc"``, which also depend on the number of the batch: of
            ``N`` workers, the ``i``-th batch of worker ``r`` has the number ``i N + r``.

    Raises:
        ValueError: If an argument is not one of those above, no rule covers the loss, no layer
            is left that a rule covers, a layer's input is not a batch, a block is not finite, or
            a weight is used past the calls of its layer in some batches only, or without
            gradients (``fisher="forward-only"``).
        RuntimeError: If several processes work together, the data is empty, or the loss does not
            depend on a layer.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    >>> data = [(torch.ones(5, 1, 4, 4), torch.zeros(5, dtype=torch.long))]
    >>> kronecker_factors(model, nn.CrossEntropyLoss(), data, fisher="exact")
    KroneckerFactors(  # [g, co, d] by layer
      0: (1, 4, 10)
      2: (1, 2, 17)
    )
    """
    check_module(model, "kronecker_factors(model, loss_fn, data)")
    check_batches("data", data)
    check_whole(model, "kronecker_factors")
    workers = parallel_workers_of(model, "kronecker_factors")
    estimator = FisherEstimator(
        loss_fn, fisher, mc_samples, approximation, max_factor_size, batches_vectors=True
    )
    if isinstance(loss_fn, nn.Module):
        check_reduction(loss_fn)
        if fisher in {"mc", "exact"}:
            loss_rule(loss_fn)
    _check_kind(kind, fisher, data)
    model = unwrapped(model)
    layers = _chosen(model, exclude, parameters)
    given = callback("forward", forward), seed_value(seed), flag("progress", progress)
    data_pass = DataPass(model, layers, data, *given, workers)
    if kind == "diagonal":
        return _with_squares(data_pass, estimator, {})
    moments = {layer.name: LayerMoments(layer, approximation, max_factor_size) for layer in layers}
    part = data_pass.add_to_(moments, estimator)
    blocks = {n: _block(own, estimator, part.share(n)) for n, own in moments.items()}
    factors = _finite(KroneckerFactors(blocks))
    return factors if kind == "kfac" else _with_squares(data_pass, estimator, factors.eigh())


def _with_squares(
    data_pass: DataPass, estimator: FisherEstimator, bases: Mapping[str, EigenBlock]
) -> KroneckerFactors:
    """Return blocks with exact second moments of per-example gradients as eigenvalues.

    Args:
        data_pass: The data, which are iterated over once.
        estimator: Which Fisher of which loss.
        bases: Blocks whose eigenbases are used, by layer name; other layers use the identity.
    """
    squares = {
        layer.name: SquaredGradients(layer, bases.get(layer.name)) for layer in data_pass.layers
    }
    part = data_pass.add_to_(squares, estimator)
    blocks = {
        name: own.block(_scale(own.examples, estimator, part.share(name)))
        for name, own in squares.items()
    }
    return _finite(KroneckerFactors(blocks))


def _finite(factors: KroneckerFactors) -> KroneckerFactors:
    """Return the blocks, all of whose entries must be finite; the host waits once."""
    parts = [
        (name, part)
        for name, block in factors.items()
        for part in block.state_dict().values()
        if isinstance(part, Tensor)
    ]
    finite = torch.stack([part.isfinite().all() for _, part in parts]).tolist()
    if wrong := sorted({name for (name, _), is_finite in zip(parts, finite) if not is_finite}):
        raise ValueError(
            "`data` must give finite inputs, outputs and gradients, got a block with NaN or "
            f"infinity for {wrong}. Leave out the batches whose loss is not finite."
        )
    return factors


def _block(moments: LayerMoments, estimator: FisherEstimator, share: float) -> KroneckerBlock:
    """Return a layer's block, whose batches have a share of the examples."""
    a, b = estimator.factors(moments)
    scale = _scale(moments.examples, estimator, share)
    return KroneckerBlock(a, b, moments.layer.layout, scale)


def _scale(examples: int, estimator: FisherEstimator, share: float) -> float:
    """Return the scale of a block of a layer whose batches have a share of all examples."""
    scale = estimator.scale(examples)
    return scale if is_sum(estimator.loss_fn) else share * scale


def _chosen(
    model: nn.Module, exclude: Exclusion, parameters: Collection[str] | None
) -> list[Layer]:
    """Return the layers that get a block, at least one."""
    layers = find_layers(model, every=True, exclude=exclude)
    if parameters is not None:
        names, weights = set(names_of("parameters", parameters)), [own.weight for own in layers]
        layers = [layer for layer in layers if layer.weight in names]
        if unknown := names - {name for layer in layers for name in layer.parameters}:
            raise ValueError(
                "`parameters` must be names of weights that a rule covers, or of biases beside "
                f"them, got {sorted(unknown)}. The weights are {weights}."
            )
    if not layers:
        raise ValueError(
            "`model` must have a layer that a rule covers and that is not left out, got none. "
            "`coverage(model)` lists the reasons; `register_layer` adds a rule."
        )
    return layers


def _check_kind(kind: str, fisher: str, data: Iterable[Any]) -> None:
    """Check the kind of blocks, also against the Fisher and the data."""
    if choice("kind", kind, get_args(Kind)) != "kfac" and fisher == "forward-only":
        raise ValueError(
            f"`fisher` must have gradients for kind={kind!r}, got 'forward-only'. Pass another "
            "`fisher`, or kind='kfac'."
        )
    if kind == "ekfac" and iter(data) is data:
        raise ValueError(
            "`data` must be iterable twice for kind='ekfac', got an iterator. Pass a list or a "
            "data loader without shuffling."
        )
