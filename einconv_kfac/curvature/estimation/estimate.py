"""Curvature of a model, averaged over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from einconv_kfac.curvature.blocks.block_diagonal import KroneckerFactors
from einconv_kfac.curvature.blocks.kronecker import KroneckerBlock
from einconv_kfac.curvature.estimation.capture import LayerCapture
from einconv_kfac.curvature.estimation.fisher import Fisher, FisherEstimator
from einconv_kfac.curvature.estimation.moments import LayerMoments, Moments
from einconv_kfac.curvature.estimation.preservation import undisturbed
from einconv_kfac.curvature.estimation.squared_gradients import SquaredGradients
from einconv_kfac.curvature.layers.layer import Layer, find_layers
from einconv_kfac.curvature.layers.rules import Approximation
from einconv_kfac.curvature.losses import evaluate_loss

Kind: TypeAlias = Literal["kfac", "ekfac", "diagonal"]
Forward: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor, Any]]
"""Runs a model on a batch and returns its output and the target."""


def kronecker_factors(
    model: nn.Module,
    loss_fn: nn.Module,
    data: Iterable[Any],
    *,
    fisher: Fisher = "mc",
    mc_samples: int = 1,
    approximation: Approximation = "expand",
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

    (Grosse and Martens, 2016; Eschenhagen et al., 2023), times ``N`` for a sum loss. The
    model is left as it was: gradients, buffers, training flags and the random state.

    Args:
        model: The model.
        loss_fn: The loss module, with reduction ``"mean"`` or ``"sum"``. If it is a submodule
            of the model, which then computes its loss itself, it is not called again.
        data: Batches ``(x, y)``. An ``x`` that is a tuple, list or mapping is passed as
            positional or keyword arguments. A tuple ``y`` is passed as several targets.
        fisher: See `FisherEstimator`, as for the next two.
        mc_samples: See `FisherEstimator`.
        approximation: See `FisherEstimator`.
        forward: Runs the model on a batch of another form, and returns output and target.
        kind: ``"kfac"`` for the blocks above; ``"ekfac"`` for the exact second moments of
            per-example gradients in their eigenbasis (George et al., 2018), in a second pass
            over the data; ``"diagonal"`` for the exact diagonal of the Fisher or GGN.
        progress: Whether to show a progress bar.
        seed: Seed of the generator for ``"mc"``.

    Raises:
        ValueError: If an argument is not known, or a layer's input is not a batch.
        RuntimeError: If there is no data.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    >>> data = [(torch.ones(5, 1, 4, 4), torch.zeros(5, dtype=torch.long))]
    >>> kronecker_factors(model, nn.CrossEntropyLoss(), data, fisher="exact")
    KroneckerFactors(  # [g, co, d] by layer
      0: (1, 4, 10)
      2: (1, 2, 17)
    )
    """
    estimator = FisherEstimator(loss_fn, fisher, mc_samples, approximation)
    _check_kind(kind, fisher, data)
    model = uncompiled(model)
    layers = find_layers(model, every=True)

    def run(moments: Mapping[str, Moments]) -> None:
        batches = _with_progress(data, progress)
        add_batches_(estimator, (model, forward), batches, layers, moments, seed)

    factors = None
    if kind != "diagonal":
        moments = {layer.name: LayerMoments(layer, approximation) for layer in layers}
        run(moments)
        factors = KroneckerFactors({n: _block(own, estimator) for n, own in moments.items()})
        if kind == "kfac":
            return factors
    bases = {} if factors is None else dict(factors.eigh())
    squares = {layer.name: SquaredGradients(layer, bases.get(layer.name)) for layer in layers}
    run(squares)
    scaled = {name: own.block(estimator.scale(own.examples)) for name, own in squares.items()}
    return KroneckerFactors(scaled)


def _block(moments: LayerMoments, estimator: FisherEstimator) -> KroneckerBlock:
    """Return a layer's block."""
    a, b = estimator.factors(moments)
    return KroneckerBlock(a, b, moments.layer.layout, estimator.scale(moments.examples))


def _check_kind(kind: str, fisher: str, data: Iterable[Any]) -> None:
    """Check that the kind of blocks is known, and fits the Fisher and the data."""
    if kind not in get_args(Kind):
        raise ValueError(f"`kind` must be one of {get_args(Kind)}, got {kind!r}.")
    if kind != "kfac" and fisher == "forward-only":
        raise ValueError(f"`fisher` must have gradients for kind={kind!r}, got 'forward-only'.")
    if kind == "ekfac" and iter(data) is data:
        raise ValueError(
            "`data` must be iterable twice for kind='ekfac', got an iterator. Pass a list or a "
            "data loader without shuffling."
        )


def add_batches_(
    estimator: FisherEstimator,
    run: tuple[nn.Module, Forward | None],
    data: Iterable[Any],
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    seed: int,
) -> None:
    """Add the batches of ``data`` to the moments of each layer, and leave the model as it was.

    Args:
        estimator: Which Fisher of which loss.
        run: The model, and how it is run on a batch.
        data: The batches.
        layers: The layers.
        moments: What to add to, by layer name.
        seed: Seed of the generator for sampled targets.
    """
    model, forward = run
    generators: dict[torch.device, Generator] = {}
    with undisturbed(model), LayerCapture(layers) as capture, torch.enable_grad():
        for batch in data:
            output, target, loss = evaluated(model, estimator.loss_fn, batch, forward)
            device = output.device
            if device not in generators:
                generators[device] = Generator(device).manual_seed(seed)
            calls = capture.take()
            with capture.paused():  # checkpointed layers run again in backward passes
                estimator.add_(moments, calls, (output, target, loss), generators[device])


def evaluated(
    model: nn.Module, loss_fn: nn.Module, batch: Any, forward: Forward | None = None
) -> tuple[Tensor, Any, Tensor]:
    """Return a model's output on a batch, the target, and the loss of the two."""
    if not any(module is loss_fn for module in model.modules()):
        output, target = (_forward if forward is None else forward)(model, batch)
        return output, target, evaluate_loss(loss_fn, output, target)
    seen: list[tuple[Tensor, Any, Tensor]] = []

    def record(_: nn.Module, inputs: tuple[Any, ...], loss: Tensor) -> None:
        output, *target = inputs
        seen.append((output, target[0] if len(target) == 1 else tuple(target), loss))

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


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or the model itself."""
    original = getattr(model, "_orig_mod", model)
    assert isinstance(original, nn.Module)
    return original


def _forward(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
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


def _with_progress(data: Iterable[Any], progress: bool) -> Iterator[Any]:
    """Iterate over data, with a progress bar if wanted."""
    total = len(data) if isinstance(data, Sized) else None
    yield from tqdm(data, total=total, desc="factors", disable=not progress)
