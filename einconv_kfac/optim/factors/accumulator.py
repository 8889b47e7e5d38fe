"""What a step gathers of one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from torch import Tensor

from einconv_kfac.curvature.blocks.diagonal_factor import diagonal_of
from einconv_kfac.curvature.blocks.eigen import EigenBlock
from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.estimation.factor_sums import DEFAULT_MAX_FACTOR_SIZE
from einconv_kfac.curvature.estimation.moments import LayerMoments
from einconv_kfac.curvature.estimation.squared_gradients import SquaredGradients
from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.distributed.summable import SumPart
from einconv_kfac.optim.factors.batch_shares import BatchShares


class LayerSums(LayerMoments):
    """Second moments for the factors and, in an eigenbasis, squared gradients.

    Args:
        layer: The layer.
        approximation: ``"expand"`` or ``"reduce"``.
        basis: The eigenbasis in which squared gradients of single examples are summed, if they
            are wanted.
        max_factor_size: Number of rows above which a factor is replaced by its diagonal.
        shares: How much each batch counts; all alike by default.
    """

    def __init__(
        self,
        layer: Layer,
        approximation: Approximation,
        basis: EigenBlock | None = None,
        max_factor_size: int = DEFAULT_MAX_FACTOR_SIZE,
        shares: BatchShares | None = None,
    ) -> None:
        super().__init__(layer, approximation, max_factor_size)
        self.shares = BatchShares() if shares is None else shares
        self.squares = None if basis is None else SquaredGradients(layer, basis)
        self.seconds = 0.0

    @property
    def needs_examples(self) -> bool:
        """See `Moments`."""
        return super().needs_examples or self.squares is not None

    def add_inputs_(
        self,
        calls: Sequence[LayerCall],
        examples: int | None = None,
        weight: int | None = None,
    ) -> None:
        """See `LayerMoments`."""
        start, before = perf_counter(), self.examples
        super().add_inputs_(calls, examples, weight)
        self.shares.count_(self.examples - before)
        if self.squares is not None:
            self.squares.add_inputs_(calls, examples, weight)
        self.seconds += perf_counter() - start

    def snapshot(self) -> Callable[[], None]:
        """See `Moments`."""
        restore_sums, restore_shares = super().snapshot(), self.shares.snapshot()
        restore_squares = None if self.squares is None else self.squares.snapshot()

        def restore() -> None:
            restore_sums()
            restore_shares()
            if restore_squares is not None:
                restore_squares()

        return restore

    def add_gradients_(
        self,
        calls: Sequence[LayerCall],
        gradients: Sequence[Tensor],
        scale: float,
        are_alone: Sequence[bool] = (),
    ) -> None:
        """See `Moments`."""
        start, scale = perf_counter(), scale * self.shares.share
        super().add_gradients_(calls, gradients, scale)
        if self.squares is not None:
            self.squares.add_gradients_(calls, gradients, scale, are_alone)
        self.seconds += perf_counter() - start

    def add_examples_(self, examples: int) -> None:
        """See `Moments`."""
        super().add_examples_(examples)
        self.shares.count_(examples)
        if self.squares is not None:
            self.squares.add_examples_(examples)

    def add_weight_gradient_(self, gradient: Tensor, scale: float) -> None:
        """See `Moments`."""
        scale *= self.shares.share
        super().add_weight_gradient_(gradient, scale)
        if self.squares is not None:
            self.squares.add_weight_gradient_(gradient, scale)

    def parts(self) -> list[SumPart]:
        """See `Summable`."""
        return [*super().parts(), *([] if self.squares is None else self.squares.parts())]

    def counts(self) -> list[int]:
        """See `Summable`."""
        return [*super().counts(), *([] if self.squares is None else self.squares.counts())]

    def set_counts_(self, counts: Sequence[int]) -> None:
        """See `Summable`."""
        own = len(super().counts())
        super().set_counts_(counts[:own])
        if self.squares is not None:
            self.squares.set_counts_(counts[own:])

    def checked(self) -> list[Tensor]:
        """Return tensors that are finite exactly if what was gathered is.

        A sum of outer products is finite where its diagonal is.
        """
        diagonals = [diagonal_of(part) for part in self.sums()]
        total = None if self.squares is None else self.squares.total
        return diagonals if total is None else [*diagonals, total]
