"""Kinds of inverses: their names, states and dampings, and a new one in one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inverse_cases import KINDS, at_step, dampings, tasks
from optim_cases import conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.curvature.blocks import eigen as blocks_eigen
from einconv_kfac.optim import inverses
from einconv_kfac.optim.inverses import eigen
from einconv_kfac.optim.inverses.registry import inverse_of, kinds

IDENTITY = """
from dataclasses import dataclass
import torch
from einconv_kfac.optim.inverses.protocol import Inverted, Kind, LayerInverse

@dataclass(frozen=True, eq=False)
class Identity(LayerInverse):
    kind = "identity"
    damping: float

    def apply(self, rows):
        return rows

    def to(self, device):
        return self

    def state_dict(self):
        return {"kind": self.kind, "damping": self.damping}

def invert(tasks):
    return [Inverted(Identity(task.damping), torch.ones(2)) for task in tasks]

KIND = Kind("identity", invert, lambda state, _: Identity(**state), True)
"""


@pytest.fixture
def identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more file among those of the kinds."""
    (tmp_path / "identity.py").write_text(IDENTITY)
    monkeypatch.setattr(inverses, "__path__", [*inverses.__path__, str(tmp_path)])
    kinds.cache_clear()
    yield
    kinds.cache_clear()


def test_a_new_kind_is_one_file(identity: None) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, inverse="identity", lr=0.1, adaptive=False, momentum=0.0)
    before = weights(model)
    train_step(model, loss_fn, opt, image_batch())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    moved = weights(model) - before  # along the gradient, up to the norm constraint
    torch.testing.assert_close(moved / moved.norm(), -gradient / gradient.norm())
    KFAC(conv_net(), loss_fn, inverse="identity", lr=0.1, adaptive=False).load_state_dict(
        opt.state_dict()
    )
    with pytest.raises(ValueError, match=r"one of .*'ekfac'.*'identity'.*, got 'cholesky'"):
        KFAC(conv_net(), loss_fn, inverse="cholesky")


def test_names_that_are_refused() -> None:
    assert list(kinds()) == KINDS
    assert all(kind.name == name for name, kind in kinds().items())
    message = r"`inverse` must be one of \('factored', 'exact', 'ekfac'\), got 'cholesky'"
    with pytest.raises(ValueError, match=message):
        KFAC(conv_net(), nn.CrossEntropyLoss(), inverse="cholesky")
    with pytest.raises(ValueError, match="`fisher` must have gradients for inverse='ekfac'"):
        KFAC(conv_net(), nn.CrossEntropyLoss(), inverse="ekfac", fisher="forward-only")


@pytest.mark.parametrize("inverse", KINDS)
def test_states_are_copies(inverse: str) -> None:
    torch.manual_seed(0)
    (task, *_) = tasks()
    (found,) = kinds()[inverse].timed([task])
    squares, rows = torch.rand(task.layout.shape).double(), torch.randn(task.layout.shape)
    own = found.inverse.with_squared_gradients(squares, 0.9)
    expected, state = own.apply(rows), own.state_dict()
    copied = inverse_of(state, task.layout, torch.device("cpu"))
    assert copied.state_dict().keys() == state.keys()
    assert copied.damping == task.damping
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()
    assert torch.equal(copied.apply(rows), expected)
    assert (copied.eigenbasis is None) == (not kinds()[inverse].needs_per_example_gradients)


@pytest.mark.parametrize("inverse", KINDS)
def test_a_state_of_another_kind_is_refused(inverse: str) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, inverse=inverse)
    train_step(model, loss_fn, opt, image_batch())
    for other in KINDS:
        target = KFAC(conv_net(), loss_fn, inverse=other)
        if other == inverse:
            target.load_state_dict(opt.state_dict())
            continue
        with pytest.raises(ValueError, match=f"same `inverse`, got '{inverse}' for"):
            target.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("inverse", KINDS)
def test_another_damping(inverse: str) -> None:
    torch.manual_seed(0)
    kind, (task, *_) = kinds()[inverse], tasks()
    (found,) = kind.timed([task])
    changed = found.inverse.with_damping(3.0)
    if kind.damping_needs_decomposition:
        assert changed is found.inverse
        return
    a, b = (torch.block_diag(*factor) for factor in task.factors)
    rows = torch.randn(task.layout.shape, dtype=a.dtype)
    assert len(rows) == 1
    dense = torch.kron(b, a) + 3.0 * torch.eye(rows.numel(), dtype=a.dtype)
    torch.testing.assert_close(changed.apply(rows).flatten(), dense.inverse() @ rows.flatten())
    assert found.inverse.damping == task.damping


@pytest.mark.parametrize("inverse", ["exact", "ekfac"])
def test_another_damping_needs_no_new_decomposition(
    inverse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, decomposition = [0], blocks_eigen.eigendecomposition
    tried, with_damping = set(), eigen.EigenInverse.with_damping

    def counted(*args: Any) -> Any:
        counts[0] += 1
        return decomposition(*args)

    def recorded(self: eigen.EigenInverse, damping: float) -> Any:
        tried.add(damping)
        return with_damping(self, damping)

    monkeypatch.setattr(blocks_eigen, "eigendecomposition", counted)
    monkeypatch.setattr(eigen.EigenInverse, "with_damping", recorded)
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, inverse=inverse)
    train_step(model, loss_fn, opt, image_batch())
    assert counts == [6]
    tried.clear()
    train_step(model, loss_fn, opt, image_batch())  # it tries three dampings
    assert counts == [12]
    assert len(tried) >= 3
    model = conv_net()
    opt = KFAC(
        model, loss_fn, lr=0.1, adaptive=False, inverse=inverse, damping=lambda s: 1 / (1 + s)
    )
    at_step(opt, 10000)
    for step in range(3):
        train_step(model, loss_fn, opt, image_batch())
        assert list(dampings(opt).values()) == [1 / (10001 + step)] * 3
    assert counts == [18]
