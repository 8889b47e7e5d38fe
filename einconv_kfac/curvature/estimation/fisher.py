"""Estimators of the Fisher information of a loss, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, TypeAlias, get_args

from torch import Generator, Tensor

from einconv_kfac.curvature.arguments import choice, plain
from einconv_kfac.curvature.estimation.arranged_call import ArrangedCall, by_layer
from einconv_kfac.curvature.estimation.arrangement import Arrangement, Layouts
from einconv_kfac.curvature.estimation.backward_passes import BackwardPasses, StackedRoots
from einconv_kfac.curvature.estimation.call_checks import check_batched, check_call, scattered_rows
from einconv_kfac.curvature.estimation.capture import LayerCall, call_gradients
from einconv_kfac.curvature.estimation.evaluation import (
    Evaluation,
    Root,
    empirical_roots,
    loss_gradients,
)
from einconv_kfac.curvature.estimation.factor_sums import (
    DEFAULT_MAX_FACTOR_SIZE,
    check_max_factor_size,
)
from einconv_kfac.curvature.estimation.forward import Loss
from einconv_kfac.curvature.estimation.moments import LayerMoments, Moments
from einconv_kfac.curvature.estimation.weight_gradients import weight_gradients
from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.curvature.losses.loss_call import is_sum
from einconv_kfac.curvature.module_arguments import check_loss
from einconv_kfac.curvature.objective.graph import reached_nodes

WEIGHT_SAMPLES = 8
"""Number of samples for a weight that is used past the calls of its layer, while training."""
Fisher: TypeAlias = Literal["mc", "empirical", "exact", "forward-only"]


@dataclass(frozen=True)
class FisherEstimator:
    """The Fisher information of a loss, and the approximation of weight sharing.

    Args:
        loss_fn: The loss module. A function, or ``None``, stands for a loss that is read off the
            autograd graph.
        fisher: ``"mc"`` draws root vectors of the loss Hessian, as from targets sampled from
            the model; ``"exact"`` takes every direction of the loss Hessian; ``"empirical"``
            takes the given targets; ``"forward-only"`` sets ``B`` to the identity. Where the
            loss of an example is a mean over ``T`` terms (pixels, tokens or output entries),
            ``"empirical"`` is of the order of ``1/T`` of the others: it is the outer product of
            the example's gradient, ``1/T^2 (sum_t g_t)(sum_t g_t)^T`` for the gradients ``g_t``
            of its terms, where the Fisher is ``1/T sum_t E[g_t g_t^T]``. A damping has to be
            chosen accordingly. It is not rescaled, as in curvlinops.
        mc_samples: Number of samples per example for ``"mc"``.
        approximation: ``"expand"`` or ``"reduce"``.
        max_factor_size: Largest number of rows of a factor ``A`` or ``B``; of a larger one, only
            the diagonal is computed.
        batches_vectors: Whether small vectors pass backwards together. Hooks on tensors in the
            model get batches of gradients then, which nobody must keep.

    Raises:
        ValueError: If an argument is not one of these, or no rule covers the loss.
    """

    loss_fn: Loss
    fisher: Fisher = "mc"
    mc_samples: int = 1
    approximation: Approximation = "expand"
    max_factor_size: int = DEFAULT_MAX_FACTOR_SIZE
    batches_vectors: bool = field(default=False, kw_only=True)
    layouts: Layouts = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, kinds in (("fisher", Fisher), ("approximation", Approximation)):
            choice(name, getattr(self, name), get_args(kinds))
        check_loss(self.loss_fn)
        for name in ("mc_samples", "max_factor_size"):  # other libraries' integers become Python's
            object.__setattr__(self, name, plain(getattr(self, name)))
        if not isinstance(self.mc_samples, int) or isinstance(self.mc_samples, bool):
            raise ValueError(f"`mc_samples` must be an integer, got {self.mc_samples!r}.")
        if self.mc_samples < 1:
            raise ValueError(f"`mc_samples` must be at least 1, got {self.mc_samples}.")
        if self.mc_samples > 1 and self.fisher != "mc":
            raise ValueError(
                f"`mc_samples` must be 1 for fisher={self.fisher!r}, which draws no samples, got "
                f"{self.mc_samples}. Leave it out, or pass fisher='mc'."
            )
        check_max_factor_size(self.max_factor_size)

    def scale(self, examples: float) -> float:
        """Return the factor of ``B (x) A``: 1 for a mean loss, ``examples`` for a sum."""
        return float(examples) if is_sum(self.loss_fn) else 1.0

    def shapes(self, layer: Layer) -> list[tuple[int, ...]]:
        """Return the shapes of a layer's ``A`` and ``B``, see `LayerMoments.shapes`."""
        return LayerMoments(layer, self.approximation, self.max_factor_size).shapes

    def factors(self, moments: LayerMoments) -> tuple[Tensor, Tensor]:
        """Return a layer's ``A [g, d, d]`` and ``B [g, co, co]``, or the diagonal of either."""
        return moments.factors()

    def add_(
        self,
        moments: Mapping[str, Moments],
        calls: Sequence[LayerCall],
        evaluation: Evaluation,
        generator: Generator,
        *,
        may_be_empty: bool = True,
    ) -> None:
        """Add one batch to the moments, unless no target of it counts.

        The mean over such a batch (of padding, or of classes without weight) is ``0 / 0``.

        Args:
            moments: By layer name.
            calls: The calls of the layers in the forward pass.
            evaluation: Model output, target, and the loss of the two.
            generator: Draws the samples for ``"mc"``; the global random state does not change.
            may_be_empty: Whether to look for targets that count, for which the host waits.
        """
        if evaluation.examples:  # an expert that no example was sent to has a call without rows
            calls = [call for call in calls if call.x.shape[:1] != (0,)]
        if may_be_empty and evaluation.is_empty:
            for call in calls:
                check_call(call)
            return
        if not evaluation.takes_unbatched:
            check_batched(calls)
        arrangement = self._arrangement(evaluation, moments)
        if self.fisher == "forward-only":
            reached = reached_nodes(evaluation.outputs)
            used = [call for call in calls if call.output.node in reached]
            self._add_inputs_alone_(moments, used, arrangement)
            return
        sources, vectors = evaluation.outputs, self._roots(evaluation, generator)
        if self.fisher == "empirical":
            sources, own_roots = empirical_roots(evaluation)
            vectors = iter([Root(own_roots)])
        arranged: list[ArrangedCall] | None = None
        asked = arrangement.ask(calls)  # the gradients below keep a GPU busy meanwhile
        passes = BackwardPasses(sources, calls, self.batches_vectors)
        for roots in passes.stacked(vectors):
            own = calls if arranged is None else [each.call for each in arranged]
            found = passes.gradients(roots.vectors, own)
            if arranged is None:
                used = [call for call, gradient in zip(calls, found) if gradient is not None]
                arranged = arrangement.arranged_(used, asked)
                self._add_inputs_(moments, arranged)
            single = self._single(arranged, evaluation, roots)
            known = [g for g in found if g is not None]
            self._add_roots_(moments, arranged, known, single, roots.are_alone)

    def _arrangement(self, evaluation: Evaluation, moments: Mapping[str, Moments]) -> Arrangement:
        """Return what arranges the calls of a batch."""
        return Arrangement(
            evaluation.like_outputs(),
            evaluation.outputs,
            evaluation.examples,
            self.layouts,
            lambda vectors, own: call_gradients(evaluation.outputs, vectors, own),
            by_example=self.fisher in {"exact", "empirical"},
            tells_shared=self.fisher != "mc",
            owned=[name for name, own in moments.items() if own.needs_examples],
        )

    def _single(
        self, arranged: Sequence[ArrangedCall], evaluation: Evaluation, roots: StackedRoots
    ) -> dict[int, list[Tensor]]:
        """Return the gradients of single examples, by the call, where their rows are shared."""
        shared = [each.call for each in arranged if each.is_shared]
        if not shared:
            return {}
        passes = BackwardPasses(evaluation.outputs, shared, self.batches_vectors)
        is_empirical = self.fisher == "empirical"
        own = [Root(loss_gradients(evaluation))] if is_empirical else roots.single()
        found = [passes.by_example(root, evaluation.examples, shared) for root in own]
        return {id(call): list(each) for call, each in zip(shared, zip(*found))}

    def _add_inputs_(
        self, moments: Mapping[str, Moments], arranged: Sequence[ArrangedCall]
    ) -> None:
        """Add the inputs of calls."""
        for name, own in by_layer(arranged).items():
            calls = [call for each in own for call in each.calls]
            if moments[name].needs_examples and own[0].is_scattered:
                raise scattered_rows(name)
            together = own[0].is_together
            counts = (own[0].examples, own[0].weight) if together else (None, None)
            moments[name].add_inputs_(calls, *counts)

    def _add_inputs_alone_(
        self, moments: Mapping[str, Moments], calls: Sequence[LayerCall], arrangement: Arrangement
    ) -> None:
        """Add the inputs of calls of which no gradients are needed.

        While the host waits for layouts, a GPU adds the inputs by the usual ones. Where those turn
        out to be others, the inputs are added anew.
        """
        asked = arrangement.ask(calls)
        guess = None if asked is None else arrangement.guessed(calls)
        undo: list[Callable[[], None]] = []
        if guess is not None:
            undo = [moments[name].snapshot() for name in by_layer(guess)]
            try:
                self._add_inputs_(moments, guess)
            except (RuntimeError, ValueError):  # of layouts that may not be the calls' own
                guess = None
        arranged = arrangement.arranged_(calls, asked)
        if guess is not None and all(a.is_like(b) for a, b in zip(guess, arranged)):
            return
        for restore in undo:
            restore()
        self._add_inputs_(moments, arranged)

    def add_weights_(
        self,
        moments: Mapping[str, Moments],
        layers: Sequence[Layer],
        evaluation: Evaluation,
        generator: Generator,
        *,
        together: bool = False,
    ) -> None:
        """Add one batch to the moments of layers whose weights are used past their calls.

        The gradients of the weights are taken, in a backward pass for each example and each root
        vector, or of all examples together for `WEIGHT_SAMPLES` samples of ``"mc"``, which are
        independent between examples. A batch of which no target counts is left out, see `add_`.

        Args:
            moments: By layer name.
            layers: The layers.
            evaluation: See `add_`.
            generator: See `add_`.
            together: Whether samples of all examples are backpropagated together.

        Raises:
            ValueError: If the Fisher takes no gradients.
        """
        if self.fisher == "forward-only":
            names = [layer.name for layer in layers]
            raise ValueError(
                f"`fisher` must have gradients for weights that are used past the calls of their "
                f"layers, as those of {names}, got 'forward-only'. Leave them out: exclude={names}."
            )
        if evaluation.is_empty:
            return
        examples, is_empirical = evaluation.examples, self.fisher == "empirical"
        scale = 1.0 if is_sum(self.loss_fn) else float(examples ** (2 if is_empirical else 1))
        for layer in layers:
            moments[layer.name].add_examples_(examples)
        roots: Iterable[Root] = self._roots(evaluation, generator)
        if is_empirical:
            roots = [Root(loss_gradients(evaluation))]
        together = together and self.fisher == "mc"
        if together:
            roots = (Root(evaluation.sample(generator)) for _ in range(WEIGHT_SAMPLES))
            scale /= WEIGHT_SAMPLES
        for root in roots:
            count = None if together or root.is_alone else examples
            for gradients in weight_gradients(evaluation.outputs, root.vectors, layers, count):
                for name, gradient in gradients.items():
                    moments[name].add_weight_gradient_(gradient, scale)

    def _add_roots_(
        self,
        moments: Mapping[str, Moments],
        arranged: Sequence[ArrangedCall],
        found: Sequence[Tensor],
        single: Mapping[int, Sequence[Tensor]],
        are_alone: Sequence[bool],
    ) -> None:
        """Add the gradients of several roots, scaled to those of the examples' own losses."""
        gradients = {id(each.call): gradient for each, gradient in zip(arranged, found)}
        mean = not is_sum(self.loss_fn)
        power = 2 if self.fisher == "empirical" else 1
        for name, own in by_layer(arranged).items():
            scale = float(own[0].examples ** power) if mean else 1.0
            calls = [call for each in own for call in each.calls]
            parts = [
                part
                for each in own
                for part in each.gradients(single.get(id(each.call), gradients[id(each.call)]))
            ]
            moments[name].add_gradients_(calls, parts, scale, are_alone)

    def _roots(self, evaluation: Evaluation, generator: Generator) -> Iterator[Root]:
        """Yield the vectors that are backpropagated from the outputs."""
        if self.fisher == "exact":
            yield from evaluation.roots()
        elif self.mc_samples == 1:
            yield Root(evaluation.sample(generator))
        else:
            scale = self.mc_samples**-0.5
            for vectors in islice(evaluation.samples(generator), self.mc_samples):
                yield Root([vector * scale for vector in vectors])
