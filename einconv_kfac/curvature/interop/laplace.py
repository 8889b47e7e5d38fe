"""A backend for laplace-torch (``pip install einconv-kfac[laplace]``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.diagonal_factor import dense
from einconv_kfac.curvature.blocks.kronecker import KroneckerBlock
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.estimation.estimate import kronecker_factors

try:
    from laplace.curvature import GGNInterface
    from laplace.utils import Kron
except ImportError as error:
    raise ImportError(
        "This backend needs laplace-torch: pip install einconv-kfac[laplace]"
    ) from error


class KroneckerGGN(GGNInterface):  # type: ignore[misc]
    """Kronecker factors and the diagonal of the Gauss-Newton matrix for ``laplace.Laplace``.

    ``Laplace(model, likelihood, hessian_structure="kron", backend=KroneckerGGN)`` takes the factors
    of this package, for every layer without channel groups. As laplace-torch stores them, a weight
    has a pair of factors and a bias a matrix of its own, ``sum_{n,s} g g^T``; the block between the
    two is left out. With ``hessian_structure="diag"`` every layer is possible.

    Args:
        model: The model, or the feature extractor of a last-layer approximation.
        likelihood: ``"classification"`` or ``"regression"``.
        last_layer: Whether the last layer alone has a posterior.
        subnetwork_indices: Indices of the parameters with a posterior; only for full and diagonal.
        dict_key_x: See laplace-torch.
        dict_key_y: See laplace-torch.
        stochastic: Sample the curvature at the output instead of computing all of it.
        num_samples: Number of samples.
        approximation: ``"expand"`` or ``"reduce"``, see `kronecker_factors`.
    """

    def __init__(
        self,
        model: Any,
        likelihood: Any,
        last_layer: bool = False,
        subnetwork_indices: Any = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        approximation: Any = "expand",
    ) -> None:
        super().__init__(
            model,
            likelihood,
            last_layer,
            subnetwork_indices,
            dict_key_x,
            dict_key_y,
            stochastic,
            num_samples,
        )
        self.num_samples: int = num_samples
        self.approximation = approximation

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Any]:  # noqa: N803
        """Return the loss and the Kronecker factors of a batch, a part of ``N`` examples.

        ``asdl_fisher_kwargs`` of `Laplace` may hold ``mc_samples`` and ``kfac_approx``, as for the
        backend of curvlinops; they replace ``num_samples`` and ``approximation``.

        Raises:
            TypeError: If another argument is given.
            ValueError: If a parameter's block is not the product of two factors.
        """
        blocks = self._curvature(x, y, "kfac", **_known(kwargs, "mc_samples", "kfac_approx"))
        by_parameter = {name: block for block in blocks.values() for name in block.parameters}
        factors = [
            _factors_of(name, by_parameter.get(name), len(y) / N) for name in self._trained_names()
        ]
        return self._loss(x, y), Kron(factors) * self.factor

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the loss and the diagonal of the Gauss-Newton matrix of a batch, see `kron`."""
        names = self._trained_names()
        entries = self._curvature(x, y, "diagonal", **_known(kwargs, "mc_samples")).diagonal()
        for name in names:
            if name not in entries:
                raise ValueError(_no_block(name))
        diagonal = torch.cat([entries[name].flatten() for name in names])
        if self.subnetwork_indices is not None:
            diagonal = diagonal[self.subnetwork_indices]
        return self._loss(x, y), self.factor * diagonal

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the loss and the Gauss-Newton matrix of a batch, as laplace-torch computes it."""
        own: int = self.num_samples
        self.num_samples = _known(kwargs, "mc_samples").get("mc_samples", own)
        try:
            loss, matrix = super().full(x, y)
        finally:
            self.num_samples = own
        return loss, matrix

    def _curvature(
        self,
        x: Any,
        y: Tensor,
        kind: Any,
        *,
        mc_samples: int | None = None,
        kfac_approx: Any = None,
    ) -> Any:
        """Return the curvature of a batch."""
        return kronecker_factors(
            self.model,
            self.lossfunc,
            [(x, y)],
            fisher="mc" if self.stochastic else "exact",
            mc_samples=self.num_samples if mc_samples is None else mc_samples,
            approximation=self.approximation if kfac_approx is None else kfac_approx,
            forward=_forward,
            parameters=self._trained_names(),
            kind=kind,
            seed=int(torch.randint(2**31, ())) if self.stochastic else 0,
        )

    def _trained_names(self) -> list[str]:
        """Return the names of the parameters with a posterior, in the order of laplace-torch."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[parameter] for parameter in self.params]

    def _loss(self, x: Any, y: Tensor) -> Tensor:
        with torch.no_grad():
            loss: Tensor = self.factor * self.lossfunc(self.model(x), y)
        return loss


def _forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Run a model as laplace-torch does, which passes a mapping as one argument."""
    x, y = batch
    return model(x), y


def _known(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the arguments of those names; ``N``, which laplace-torch passes, is left out."""
    for name in given:
        if name not in (*names, "N"):
            raise TypeError(f"`asdl_fisher_kwargs` must be of {list(names)}, got {name!r}.")
    return {name: value for name, value in given.items() if name in names}


def _factors_of(name: str, block: Any, share: float) -> list[Tensor]:
    """Return the matrices that laplace-torch keeps of one parameter.

    It adds up those of all batches. So ``B`` is a sum over the batch's examples, and ``A`` the
    part of an average over all data.
    """
    if not isinstance(block, KroneckerBlock):
        raise ValueError(_no_block(name))
    a, b, layout = dense(block.A), block.scale * dense(block.B), block.layout
    if name == layout.bias:
        return [torch.block_diag(*(b * a[:, -1:, -1:]))]  # type: ignore[no-untyped-call]
    if layout.bias is not None:
        a = a[:, :-1, :-1]
    if a.shape[-1] == b.shape[-1] == 1:  # a scale per channel
        return [torch.block_diag(*(b * a))]  # type: ignore[no-untyped-call]
    if len(a) > 1:
        raise ValueError(
            f"The layer of '{name}' must have one channel group for Kronecker factors in "
            f'laplace-torch, got {len(a)}. Use hessian_structure="diag", or leave the layer out.'
        )
    return _ordered(name, layout, a[0] * share, b[0])


def _ordered(name: str, layout: Layout, a: Tensor, b: Tensor) -> list[Tensor]:
    """Return ``[B, A]``, or ``[A, B]`` where the weight's first dimension is the input's."""
    rows, columns = len(b), len(a)
    index = torch.arange(rows * columns).reshape(1, rows, columns)
    weight = layout.without_bias().from_matrix(index)[name]
    flat = weight.reshape(len(weight), -1)
    if torch.equal(flat, index[0]):
        return [b, a]
    if torch.equal(flat, index[0].T):
        return [a, b]
    raise ValueError(
        f"The weight '{name}' must have inputs or outputs as its first dimension and the other as "
        f"the rest, got shape {tuple(weight.shape)} of a transposed convolution. "
        'Use hessian_structure="diag", or leave the layer out.'
    )


def _no_block(name: str) -> str:
    return (
        f"Parameter '{name}' must have a Kronecker-factored block, got none. "
        "`einconv_kfac.coverage(model)` says why. Freeze it by requires_grad_(False) before "
        "`Laplace` is built."
    )
