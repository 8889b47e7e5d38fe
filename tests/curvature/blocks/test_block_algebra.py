"""The algebra of blocks against dense matrices, in float64."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature import (
    EigenBlock,
    KroneckerBlock,
    KroneckerFactors,
    Layout,
    kronecker_factors,
    pooled,
)

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2),
        nn.ConvTranspose2d(4, 2, 2, groups=2, bias=False),
        nn.LayerNorm((3, 3)),
        nn.Flatten(),
        nn.Linear(18, 3),
    ).double()


def data(count: int = 30, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = Generator().manual_seed(seed)
    x = torch.randn(count, 2, 3, 3, generator=generator, dtype=torch.float64)
    return [(x, torch.randint(3, (count,), generator=generator))]


def factors(kind: str, reduction: str = "sum") -> KroneckerFactors:
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    return kronecker_factors(network(), loss_fn, data(), kind=kind, fisher="exact")


def dense(block: object) -> Tensor:
    return torch.block_diag(*block.to_dense())


def whole(curvature: KroneckerFactors) -> Tensor:
    return torch.block_diag(*(dense(block) for block in curvature.values()))


def flat(curvature: KroneckerFactors, vector: dict[str, Tensor]) -> Tensor:
    """A vector ``[*v, *shape]`` by name as ``[*v, p]``, in the order of `whole`."""
    parts = [block.layout.to_matrix(vector).flatten(-3) for block in curvature.values()]
    return torch.cat(parts, dim=-1)


def vector(curvature: KroneckerFactors, *free: int) -> dict[str, Tensor]:
    shapes = {name: p.shape for name, p in network().named_parameters()}
    generator = Generator().manual_seed(3)
    return {
        name: torch.randn(*free, *shapes[name], generator=generator, dtype=torch.float64)
        for name in curvature.parameters
    }


Build = Callable[[], KroneckerFactors]
KINDS: dict[str, Build] = {
    "kfac": lambda: factors("kfac"),
    "ekfac": lambda: factors("ekfac"),
    "diagonal": lambda: factors("diagonal"),
    "sum": lambda: factors("kfac") + 2.0 * factors("ekfac") + factors("diagonal"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_linear_operations(kind: str) -> None:
    curvature = KINDS[kind]()
    matrix = whole(curvature)
    torch.testing.assert_close(matrix, matrix.T, **TOLERANCE)
    for free in ((), (2, 3)):
        v = vector(curvature, *free)
        got = curvature @ v
        assert {name: t.shape for name, t in got.items()} == {n: t.shape for n, t in v.items()}
        torch.testing.assert_close(flat(curvature, got), flat(curvature, v) @ matrix, **TOLERANCE)
    diagonal = curvature.diagonal()
    assert {name: t.shape for name, t in diagonal.items()} == {
        name: t.shape for name, t in vector(curvature).items()
    }
    torch.testing.assert_close(flat(curvature, diagonal), matrix.diagonal(), **TOLERANCE)
    torch.testing.assert_close(curvature.trace(), matrix.trace(), **TOLERANCE)
    torch.testing.assert_close(curvature.frobenius_norm(), matrix.norm(), **TOLERANCE)
    torch.testing.assert_close(whole(curvature * -0.5), -0.5 * matrix, **TOLERANCE)
    torch.testing.assert_close(whole(curvature + curvature), 2 * matrix, **TOLERANCE)
    half = curvature.to(torch.float32)
    assert whole(half).dtype == torch.float32


@pytest.mark.parametrize("damping", [0.1, 10.0])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_spectral_operations(kind: str, damping: float) -> None:
    curvature = KINDS[kind]()
    matrix = whole(curvature)
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    damped = matrix + damping * eye
    values = torch.cat([v.flatten() for v in curvature.eigenvalues().values()]).sort().values
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix), **TOLERANCE)
    torch.testing.assert_close(whole(curvature.eigh()), matrix, **TOLERANCE)
    torch.testing.assert_close(curvature.logdet(damping), damped.logdet(), **TOLERANCE)
    inverse = curvature.inverse(damping)
    torch.testing.assert_close(whole(inverse), damped.inverse(), **TOLERANCE)
    variances = flat(curvature, inverse.diagonal())
    torch.testing.assert_close(variances, damped.inverse().diagonal(), **TOLERANCE)
    v = vector(curvature)
    solved = flat(curvature, curvature.solve(v, damping))
    torch.testing.assert_close(damped @ solved, flat(curvature, v), **TOLERANCE)
    draws = flat(
        curvature, curvature.sample(20000, damping=damping, generator=Generator().manual_seed(0))
    )
    covariance = draws.T @ draws / len(draws)
    assert (covariance - damped.inverse()).abs().max() < 0.05 * damped.inverse().abs().max()


@pytest.mark.parametrize("damping", [0.1, 10.0])
def test_factored_inverse(damping: float) -> None:
    curvature = factors("kfac")
    for name, block in curvature.inverse(damping, exact=False).items():
        a, b, scale = curvature[name].A, curvature[name].B, curvature[name].scale
        for g in range(len(a)):
            pi = ((a[g].trace() / len(a[g])) / (b[g].trace() / len(b[g]))).sqrt()
            root = (damping / scale) ** 0.5
            left = b[g] + root / pi * torch.eye(len(b[g]), dtype=b.dtype)
            right = a[g] + root * pi * torch.eye(len(a[g]), dtype=a.dtype)
            expected = (scale * torch.kron(left, right)).inverse()
            torch.testing.assert_close(block.to_dense()[g], expected, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str) -> None:
    curvature = KINDS[kind]()
    buffer = io.BytesIO()
    torch.save(curvature.state_dict(), buffer)
    buffer.seek(0)
    loaded = KroneckerFactors.from_state_dict(torch.load(buffer, weights_only=True))
    assert list(loaded) == list(curvature)
    assert torch.equal(whole(loaded), whole(curvature))
    with pytest.raises(ValueError, match=r"`state` must be of version 1, got None"):
        KroneckerFactors.from_state_dict({})


def test_pooled_data_sets() -> None:
    loss_fn, model = nn.CrossEntropyLoss(), network()
    first, second = data(10), data(20, seed=1)
    both = kronecker_factors(model, loss_fn, first + second, fisher="exact")
    parts = [kronecker_factors(model, loss_fn, part, fisher="exact") for part in (first, second)]
    torch.testing.assert_close(whole(pooled(parts, [10, 20])), whole(both), **TOLERANCE)
    total = parts[0] * (1 / 3) + parts[1] * (2 / 3)
    v = vector(total)
    got = flat(total, total @ v)
    expected = (whole(parts[0]) / 3 + 2 * whole(parts[1]) / 3) @ flat(total, v)
    torch.testing.assert_close(got, expected, **TOLERANCE)


def block_of(matrix: Tensor) -> KroneckerFactors:
    layout = Layout("w", None, (1, len(matrix)), (1, 1, len(matrix)), (0, 1, 2))
    return KroneckerFactors({"": KroneckerBlock(matrix[None], torch.ones(1, 1, 1), layout)})


def test_failures_are_repaired_in_float64_or_reported() -> None:
    with pytest.warns(RuntimeWarning, match="factors of w were not positive definite.*float64"):
        # float32: 1 + 1e-9 = 1
        inverse = block_of(torch.ones(2, 2)).inverse(1e-18, exact=False)[""]
    expected = torch.linalg.inv(torch.ones(2, 2).double() + 1e-9 * torch.eye(2).double())
    torch.testing.assert_close(inverse.A[0].double(), expected, rtol=1e-4, atol=0)
    singular = block_of(torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.raises(RuntimeError, match=r"damped factor A of w must be positive definite"):
        singular.inverse(0.0, exact=False)
    with pytest.raises(RuntimeError, match=r"block of w must be positive definite.*eigenvalue 0"):
        singular.inverse(0.0)
    with pytest.raises(RuntimeError, match=r"must be positive definite"):
        singular.sample(1)
    assert singular.logdet() == -torch.inf


def test_errors() -> None:
    curvature, v = block_of(torch.eye(2)), {"w": torch.ones(1, 2)}
    for damping in (-1.0, float("nan"), float("inf")):
        for exact in (True, False):
            with pytest.raises(ValueError, match=r"`damping` must be a finite number >= 0, got"):
                curvature.solve(v, damping, exact=exact)
    with pytest.raises(ValueError, match=r"must have an entry for 'w', has \['b'\]"):
        curvature @ {"b": torch.ones(2)}
    with pytest.raises(
        ValueError, match=r"entry 'w' must have shape \[\*v, \*\[1, 2\]\], got \[3\]"
    ):
        curvature @ {"w": torch.ones(3)}
    with pytest.raises(ValueError, match=r"must cover the same layers, they differ in \['x'\]"):
        curvature + KroneckerFactors({"": curvature[""], "x": curvature[""]})
    with pytest.raises(ValueError, match=r"must be of the same parameters to be added"):
        curvature + block_of(torch.eye(3))
    for operation in ("eigh", "eigenvalues", "logdet", "sample"):
        with pytest.raises(NotImplementedError, match=r"sum of 2 blocks.*`pooled`"):
            getattr(curvature + curvature, operation)()
    with pytest.raises(NotImplementedError, match=r"sum of 2 blocks"):
        (curvature + curvature).inverse(1.0)
    with pytest.raises(ValueError, match=r"`weights` must be a positive number for each of 1"):
        pooled([curvature], [0.0])
    with pytest.raises(ValueError, match=r"got EigenBlock, KroneckerBlock of 1 layouts. Add them"):
        pooled([curvature, curvature.eigh()], [1.0, 1.0])
    torch.testing.assert_close(whole(curvature + curvature.eigh()), 2 * whole(curvature))
    loss_fn = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"`kind` must be one of .*, got 'full'"):
        kronecker_factors(network(), loss_fn, data(), kind="full")
    with pytest.raises(ValueError, match=r"must have gradients for kind='diagonal'"):
        kronecker_factors(network(), loss_fn, data(), kind="diagonal", fisher="forward-only")
    with pytest.raises(ValueError, match=r"must be iterable twice.*got an iterator"):
        kronecker_factors(network(), loss_fn, iter(data()), kind="ekfac")


def test_blocks_name_their_parameters() -> None:
    curvature = factors("ekfac")
    assert curvature.parameters[:3] == ("0.weight", "0.bias", "1.weight")
    assert isinstance(curvature["0"], EigenBlock)
    assert "0: (2, 2, 5)" in repr(curvature)
