"""Whether a step computes something for examples alone."""

from __future__ import annotations

from einconv_kfac.curvature.estimation.fisher import FisherEstimator
from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.inverses.protocol import Kind


def separates(estimator: FisherEstimator, kind: Kind, settings: Hyperparameters) -> bool:
    """Return whether factors, inverses or the quadratic model depend on what an example is.

    Others depend on sums over all rows of calls alone.
    """
    return (
        estimator.fisher not in ("exact", "mc")
        or estimator.approximation != "expand"
        or kind.needs_per_example_gradients
        or settings.factor_fraction != 1
        or settings.curvature_fraction != 1
    )
