"""What the kinds of inverses compute, against curvlinops, blocks and dense matrices."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from inverse_cases import EXACT, KINDS, preconditioned, tasks
from optim_cases import conv_net, image_batch, train_step
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

from einconv_kfac import KFAC
from einconv_kfac.curvature import kronecker_factors
from einconv_kfac.optim.inverses.registry import kinds


def plain_net() -> nn.Sequential:
    """A network that curvlinops supports, without groups."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(("inverse", "steps"), [("exact", 1), ("ekfac", 2), ("ekfac", 4)])
def test_equal_those_of_curvlinops(inverse: str, steps: int, approximation: Any) -> None:
    """The second step on a batch corrects in the eigenbasis of the first, which is the same."""
    model, damping = plain_net(), 0.07
    options: dict[str, Any] = {"damping": damping, "factor_decay": 0.0, "inverse": inverse}
    gradient, found = preconditioned(
        model, image_batch(), steps, approximation=approximation, **options
    )
    kind = EKFACLinearOperator if inverse == "ekfac" else KFACLinearOperator
    operator = kind(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [image_batch()],
        fisher_type="type-2", kfac_approx=approximation, separate_weight_and_bias=False,
        check_deterministic=False,
    )  # fmt: skip
    solve = KFACInverseLinearOperator(operator, damping=damping, use_exact_damping=True)
    for tensor, expected in zip(found.values(), solve @ list(gradient.values())):
        torch.testing.assert_close(tensor, expected, **EXACT)


@pytest.mark.parametrize(("inverse", "kind"), [("exact", "kfac"), ("ekfac", "ekfac")])
def test_equal_those_of_the_blocks(inverse: str, kind: Any) -> None:
    """With groups, of which curvlinops has none."""
    model, batch = conv_net(), image_batch()
    options: dict[str, Any] = {"damping": 0.07, "factor_decay": 0.0, "inverse": inverse}
    gradient, found = preconditioned(model, batch, 2, **options)
    blocks = kronecker_factors(model, nn.CrossEntropyLoss(), [batch], fisher="exact", kind=kind)
    for name, tensor in blocks.solve(gradient, damping=0.07).items():
        torch.testing.assert_close(found[name], tensor, **EXACT)


def test_corrected_eigenvalues_keep_their_trace_in_a_new_basis() -> None:
    torch.manual_seed(0)
    kind = kinds()["ekfac"]
    previous = [found.inverse for found in kind.timed(tasks())]
    for _ in range(2):
        squares = [torch.rand_like(own.eigenbasis.values) for own in previous]
        previous = [own.with_squared_gradients(s, 0.9) for own, s in zip(previous, squares)]
    for old, found in zip(previous, kind.timed(tasks())):
        new = found.inverse.with_statistics_of(old).eigenbasis
        dense = old.eigenbasis.to_dense()
        trace = dense.diagonal(dim1=-2, dim2=-1).sum()
        torch.testing.assert_close(new.to_dense().diagonal(dim1=-2, dim2=-1).sum(), trace)
        for group, matrix in enumerate(dense):  # the diagonal of the old block in the new basis
            basis = torch.kron(new.basis_b[group], new.basis_a[group])
            seen = (basis.T @ matrix @ basis).diagonal()
            torch.testing.assert_close(new.values[group].flatten(), seen)


def test_without_updates_there_is_nothing_to_project() -> None:
    torch.manual_seed(0)
    (first, *_), (second, *_) = (kinds()["ekfac"].timed(tasks()) for _ in range(2))
    assert second.inverse.with_statistics_of(first.inverse) is second.inverse
    assert second.inverse.with_statistics_of(None) is second.inverse


def test_corrected_eigenvalues_are_a_bias_corrected_average() -> None:
    torch.manual_seed(0)
    inverse, decay = kinds()["ekfac"].timed(tasks())[0].inverse, 0.8
    updates = [torch.rand_like(inverse.eigenbasis.values) for _ in range(4)]
    for squares in updates:
        inverse = inverse.with_squared_gradients(squares, decay)
    weights = torch.tensor([decay**n for n in range(4)], dtype=torch.float64).flip(0)
    expected = torch.einsum("n,n...->...", weights / weights.sum(), torch.stack(updates))
    torch.testing.assert_close(inverse.eigenbasis.values, expected)


@pytest.mark.parametrize("options", [{}, {"lr": 0.3, "adaptive": False, "kl_clip": 1e-1}])
@pytest.mark.parametrize("inverse", ["exact", "ekfac"])
def test_training_reduces_the_loss(inverse: str, options: dict[str, Any]) -> None:
    model, loss_fn = conv_net().float(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, inverse=inverse, **options)
    x, y = image_batch(24)
    losses = [train_step(model, loss_fn, opt, (x.float(), y)) for _ in range(8)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", KINDS)
def test_layers_of_one_shape_are_inverted_together(inverse: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    several, kind = tasks(dtype, copies=2), kinds()[inverse]
    for task, found in zip(several, kind.timed(several)):
        (alone,) = kind.timed([task])
        rows = torch.randn(task.layout.shape, dtype=dtype)
        torch.testing.assert_close(found.inverse.apply(rows), alone.inverse.apply(rows))
        torch.testing.assert_close(found.conditions, alone.conditions, rtol=1e-3, atol=0)
        assert found.seconds > 0


def test_eigenvalues_are_corrected_by_a_part_of_the_examples() -> None:
    """With a fraction so large that it is all of them."""
    options: dict[str, Any] = {"inverse": "ekfac", "damping": 0.07}
    (_, whole), (_, part) = (
        preconditioned(conv_net(), image_batch(), 2, factor_fraction=fraction, **options)
        for fraction in (1.0, 0.99)  # 12 of 12 examples
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, part[name], **EXACT)
