"""The spectrum of a network's curvature, by curvlinops: Kronecker factors beside the exact matrix.

`CurvatureOperator` makes the curvature of this package a linear operator of curvlinops
(``pip install einconv-kfac[curvlinops]``), whose Lanczos quadrature then estimates spectral
densities. The script compares K-FAC and EKFAC with the exact Gauss-Newton matrix of a network
trained on digits, which has a few large eigenvalues and many that are almost zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from curvlinops import GGNLinearOperator, lanczos_approximate_log_spectrum
from matplotlib.figure import Figure
from pruning import trained
from torch import Tensor, nn
from train_digits import Split, split_digits

from einconv_kfac import kronecker_factors
from einconv_kfac.curvature.interop.curvlinops import CurvatureOperator

EPSILON = 1e-5  # the spectrum of log(|l| + epsilon) is estimated


def operators(model: nn.Module, data: Split) -> dict[str, Any]:
    """Return linear operators for the exact matrix and for its approximations."""
    loss_fn, batches = nn.CrossEntropyLoss(), [(data.x, data.y)]
    exact = GGNLinearOperator(model, loss_fn, list(model.parameters()), batches)
    found: dict[str, Any] = {"exact": exact}
    for name in ("kfac", "ekfac"):
        curvature = kronecker_factors(model, loss_fn, batches, fisher="exact", kind=name)
        found[name] = CurvatureOperator(curvature, model)
    return found


def largest_eigenvalue(operator: Any, steps: int, seed: int) -> float:
    """Return the largest eigenvalue by power iteration."""
    vector = torch.randn(operator.shape[1], generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        vector = operator @ (vector / vector.norm())
    return float(vector.norm())


def log_density(operator: Any, largest: float, vectors: int) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, and the density of their logarithms."""
    grid, density = lanczos_approximate_log_spectrum(
        operator,
        ncv=vectors,
        num_points=400,
        num_repeats=2,
        boundaries=(0.0, largest),
        epsilon=EPSILON,
    )
    return grid, density * grid  # curvlinops returns the density of the eigenvalues


def large_share(grid: Tensor, density: Tensor, threshold: float) -> float:
    """Return the share of eigenvalues above a threshold."""
    logs = grid.log()
    mass = (density[:-1] + density[1:]) / 2 * logs.diff()
    return float(mass[grid[1:] > threshold].sum() / mass.sum())


def draw(densities: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Save the densities."""
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, (grid, density) in densities.items():
        axes.plot(grid.tolist(), density.tolist(), label=name)
    axes.set(xscale="log", xlabel="eigenvalue", ylabel="density of the logarithm")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the example, and return the numbers that it prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=200, help="images in the curvature (200)")
    parser.add_argument("--steps", type=int, default=6, help="training steps (6)")
    parser.add_argument("--vectors", type=int, default=40, help="Lanczos vectors (40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (0)")
    parser.add_argument("--output", type=Path, help="write a picture")
    options = parser.parse_args(arguments)
    data = split_digits(options.seed)
    model = trained(data, options.steps, options.seed)
    part = Split(data.x[: options.images], data.y[: options.images], data.x_test, data.y_test)
    torch.manual_seed(options.seed)  # curvlinops draws the first vectors
    results, densities = {}, {}
    print("          largest eigenvalue   above 0.01")
    for name, operator in operators(model, part).items():
        top = largest_eigenvalue(operator, 20, options.seed)
        grid, density = densities[name] = log_density(operator, top, options.vectors)
        results[name] = {"largest": top, "large": large_share(grid, density, 0.01)}
        print(f"{name:8}  {top:18.3f}   {results[name]['large']:9.2%}")
    if options.output:
        draw(densities, options.output)
    return results


if __name__ == "__main__":
    main()
