"""The kinds of inverses: exact damping, corrected eigenvalues, recovery, background."""

from __future__ import annotations

import threading
import warnings
from typing import Any, ClassVar

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.curvature import kronecker_factors
from einconv_kfac.optim.inverses import background
from einconv_kfac.optim.inverses import registry as inversion

EXACT = {"rtol": 1e-8, "atol": 1e-10}
FLOAT = {"rtol": 1e-4, "atol": 1e-4}
KINDS: list[Any] = ["factored", "exact", "ekfac"]


def plain_net() -> nn.Sequential:
    """A network that curvlinops supports, without groups."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
    return nn.Sequential(*layers).double()


def preconditioned(model: nn.Module, steps: int = 1, **options: Any) -> dict[str, Tensor]:
    """Return gradient and preconditioned gradient, joined, after a few steps on one batch."""
    loss_fn, (x, y) = nn.CrossEntropyLoss(), image_batch()
    machine = KFACPreconditioner(model, loss_fn, fisher="exact", **options)
    for _ in range(steps):
        model.zero_grad()
        loss_fn(model(x), y).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
        machine.step()
    found = {n: p.grad for n, p in model.named_parameters()}
    return {f"{kind}{n}": t for kind, d in (("g:", gradient), ("", found)) for n, t in d.items()}


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(("inverse", "steps"), [("exact", 1), ("ekfac", 2), ("ekfac", 4)])
def test_equal_those_of_curvlinops(inverse: Any, steps: int, approximation: Any) -> None:
    """The second step on a batch corrects in the eigenbasis of the first, which is the same."""
    model, damping = plain_net(), 0.07
    options: dict[str, Any] = {"damping": damping, "factor_decay": 0.0}
    found = preconditioned(model, steps, inverse=inverse, approximation=approximation, **options)
    kind = EKFACLinearOperator if inverse == "ekfac" else KFACLinearOperator
    operator = kind(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [image_batch()],
        fisher_type="type-2", kfac_approx=approximation, separate_weight_and_bias=False,
        check_deterministic=False,
    )  # fmt: skip
    solve = KFACInverseLinearOperator(operator, damping=damping, use_exact_damping=True)
    names = [name for name, _ in model.named_parameters()]
    expected = solve @ [found[f"g:{name}"] for name in names]
    for name, tensor in zip(names, expected):
        torch.testing.assert_close(found[name], tensor, **EXACT)


@pytest.mark.parametrize(("inverse", "kind"), [("exact", "kfac"), ("ekfac", "ekfac")])
def test_equal_those_of_the_blocks(inverse: Any, kind: Any) -> None:
    """With groups, of which curvlinops has none."""
    model = conv_net()
    found = preconditioned(model, 2, inverse=inverse, damping=0.07, factor_decay=0.0)
    data = [image_batch()]
    blocks = kronecker_factors(model, nn.CrossEntropyLoss(), data, fisher="exact", kind=kind)
    gradient = {name: found[f"g:{name}"] for name, _ in model.named_parameters()}
    for name, tensor in blocks.solve(gradient, damping=0.07).items():
        torch.testing.assert_close(found[name], tensor, **EXACT)


def test_corrected_eigenvalues_keep_their_trace_in_a_new_basis() -> None:
    torch.manual_seed(0)
    model = conv_net()
    loss_fn = nn.CrossEntropyLoss()
    machine = KFACPreconditioner(model, loss_fn, inverse="ekfac")
    for seed in range(3):
        loss_fn(model(image_batch(seed=seed)[0]), image_batch(seed=seed)[1]).backward()
        machine.step()
    for running in machine._running.values():
        old = running.inverse.block
        a, b = (torch.randn_like(f) for f in running.factors)
        task = inversion.Task("", (a @ a.mT, b @ b.mT), 0.1, running.layer.layout)
        (found,) = inversion.KINDS["ekfac"].timed([task])
        new = found.inverse.following(running.inverse).block
        diagonal = new.to_dense().diagonal(dim1=-2, dim2=-1).sum()
        torch.testing.assert_close(diagonal, old.to_dense().diagonal(dim1=-2, dim2=-1).sum())
        for group in range(len(a)):  # the diagonal of the old block, seen in the new basis
            basis = torch.kron(new.basis_b[group], new.basis_a[group])
            seen = (basis.T @ old.to_dense()[group] @ basis).diagonal()
            torch.testing.assert_close(new.values[group].flatten(), seen)


@pytest.mark.parametrize("inverse", ["exact", "ekfac"])
def test_another_damping_needs_no_new_decomposition(
    inverse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, decomposed = [0], inversion.decomposed

    def counted(factor: Tensor) -> Any:
        counts[0] += 1
        return decomposed(factor)

    monkeypatch.setattr(inversion, "decomposed", counted)
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, inverse=inverse)
    train_step(model, loss_fn, opt, image_batch())
    assert counts == [6]
    train_step(model, loss_fn, opt, image_batch())  # it tries three dampings
    assert counts == [12]
    assert opt._step._scaled == 1
    model = conv_net()
    opt = KFAC(
        model, loss_fn, lr=0.1, adaptive=False, inverse=inverse, damping=lambda s: 1 / (1 + s)
    )
    opt._preconditioner._steps = 10000
    for step in range(3):
        train_step(model, loss_fn, opt, image_batch())
        dampings = [own.inverse.damping for own in opt._preconditioner._running.values()]
        assert dampings == [1 / (10001 + step)] * 3
    assert counts == [18]


@pytest.mark.parametrize("options", [{}, {"lr": 0.3, "adaptive": False, "kl_clip": 1e-1}])
@pytest.mark.parametrize("inverse", ["exact", "ekfac"])
def test_training_reduces_the_loss(inverse: Any, options: dict[str, Any]) -> None:
    model, loss_fn = conv_net(random_layers=not options).float(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, inverse=inverse, **options)
    x, y = image_batch(24)
    losses = [train_step(model, loss_fn, opt, (x.float(), y)) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`inverse` must be one of .*, got 'cholesky'"):
        KFAC(conv_net(), nn.CrossEntropyLoss(), inverse="cholesky")
    with pytest.raises(ValueError, match="`fisher` must have gradients for inverse='ekfac'"):
        KFAC(conv_net(), nn.CrossEntropyLoss(), inverse="ekfac", fisher="forward-only")


@pytest.mark.parametrize("inverse", KINDS)
def test_a_state_of_another_kind_is_refused(inverse: Any) -> None:
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


class TestRecovery:
    BAD = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # eigenvalues 3 and -1

    def spoiled(self, **options: Any) -> tuple[nn.Module, KFAC]:
        """A model of two layers of which the second has a bad factor ``B``."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.loss_fn = loss_fn = nn.MSELoss()
        opt = KFAC(model, loss_fn, lr=0.1, adaptive=False, **options)
        self.batch = torch.randn(6, 3), torch.randn(6, 2)
        train_step(model, loss_fn, opt, self.batch)
        running = opt._preconditioner._running["2"]
        monkey = running.update_

        def update_(a: Tensor, b: Tensor, decay: float) -> None:
            monkey(a, b, decay)
            running.factors = running.factors[0], self.scale * self.BAD[None]

        running.update_ = update_
        return model, opt

    def test_raises_the_damping_of_one_layer(self) -> None:
        self.scale = 1.0
        model, opt = self.spoiled(damping=0.1)
        with pytest.warns(RuntimeWarning, match="factors of '2' were not positive definite"):
            train_step(model, self.loss_fn, opt, self.batch)
        train_step(model, self.loss_fn, opt, self.batch)  # warns once
        dampings = {n: own.inverse.damping for n, own in opt._preconditioner._running.items()}
        assert dampings["0"] == 0.1
        assert dampings["2"] in (1.0, 10.0, 100.0)
        assert opt.statistics()["cholesky_retries"] >= 4
        assert all(p.isfinite().all() for p in model.parameters())

    def test_gives_up_and_changes_nothing(self) -> None:
        self.scale = 1e12
        model, opt = self.spoiled(damping=1e-3)
        before = weights(model)
        inverses = [own.inverse for own in opt._preconditioner._running.values()]
        with pytest.raises(RuntimeError, match="factor B of '2' must be positive definite"):
            train_step(model, self.loss_fn, opt, self.batch)
        assert torch.equal(before, weights(model))
        assert inverses == [own.inverse for own in opt._preconditioner._running.values()]

    def test_takes_float64_where_that_is_enough(self) -> None:
        ones = torch.ones(1, 2, 2)
        layout = KFAC(nn.Linear(1, 2), nn.MSELoss())._preconditioner._running[""].layer.layout
        task = inversion.Task("", (ones, torch.eye(2)[None]), 1e-16, layout)
        (found,) = inversion.KINDS["factored"].timed([task])  # float32: 1 + 1e-8 = 1
        assert found.retries == 1
        assert found.inverse.damping == 1e-16
        expected = torch.linalg.inv(ones.double() + 1e-8 * torch.eye(2).double())
        torch.testing.assert_close(found.inverse.a.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", KINDS)
def test_layers_of_one_shape_are_inverted_together(inverse: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layouts = [
        own.layer.layout for own in KFAC(conv_net(), nn.MSELoss())._preconditioner._running.values()
    ]
    tasks = []
    for index, layout in enumerate(2 * layouts):
        groups, rows, columns = layout.shape
        a, b = (torch.randn(groups, d, 2 * d, dtype=dtype) for d in (columns, rows))
        tasks.append(inversion.Task(str(index), (a @ a.mT, b @ b.mT), 0.1 * (index + 1), layout))
    together = inversion.KINDS[inverse].timed(tasks)
    for task, found in zip(tasks, together):
        (alone,) = inversion.KINDS[inverse].timed([task])
        rows = torch.randn(task.layout.shape, dtype=dtype)
        torch.testing.assert_close(found.inverse.apply(rows), alone.inverse.apply(rows))
        torch.testing.assert_close(found.conditions, alone.conditions, rtol=1e-3, atol=0)
        assert found.seconds > 0


class TestBackground:
    OPTIONS: ClassVar[dict[str, Any]] = {"fisher": "exact", "inverse_update_period": 20}

    def trained(self, steps: range, **options: Any) -> tuple[nn.Module, KFAC]:
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, **{**self.OPTIONS, **options})
        opt._preconditioner._steps = steps.start
        for seed in steps:
            train_step(model, loss_fn, opt, image_batch(seed=seed))
        return model, opt

    @pytest.mark.parametrize("inverse", KINDS)
    def test_takes_over_at_a_step_that_does_not_depend_on_time(
        self, inverse: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = {"lr": 0.1, "adaptive": False, "inverse": inverse, "inverse_in_background": True}
        model, opt = self.trained(range(1000, 1025), **options)
        assert {own.inverse_step for own in opt._preconditioner._running.values()} == {1020}
        begun = background.begun

        def waited(*args: Any) -> Any:
            future = begun(*args)
            future.result()
            return future

        monkeypatch.setattr("einconv_kfac.optim.factors.refresh.begun", waited)
        again, _ = self.trained(range(1000, 1025), **options)
        assert torch.equal(weights(model), weights(again))

    def test_is_a_tenth_of_a_period_late(self) -> None:
        """Period 20: the factors of step 1020 are inverted, and taken over at 1022."""
        options = {"lr": 0.1, "adaptive": False, "inverse_in_background": True}
        _, opt = self.trained(range(1000, 1022), **options)
        running = opt._preconditioner._running.values()
        assert {(own.pending.begun, own.pending.due) for own in running} == {(1020, 1022)}
        assert {own.inverse_step for own in running} == {1000}
        train_step(opt._model, opt._preconditioner._estimator.loss_fn, opt, image_batch())
        assert {(own.pending, own.inverse_step) for own in running} == {(None, 1020)}

    def test_errors_surface_when_it_is_taken_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, opt = self.trained(
            range(1000, 1020), lr=0.1, adaptive=False, inverse_in_background=True
        )
        loss_fn, before = opt._preconditioner._estimator.loss_fn, inversion.inverses
        monkeypatch.setattr(inversion, "inverses", lambda factors, _: [None] * len(factors))
        train_step(model, loss_fn, opt, image_batch())
        opt.state_dict()  # waits, and forgets the failure
        train_step(model, loss_fn, opt, image_batch())
        position = weights(model)
        with pytest.raises(RuntimeError, match="must be positive definite"):
            train_step(model, loss_fn, opt, image_batch())
        assert torch.equal(position, weights(model))
        monkeypatch.setattr(inversion, "inverses", before)
        for _ in range(4):
            train_step(model, loss_fn, opt, image_batch())
        assert {own.inverse_step for own in opt._preconditioner._running.values()} == {1022}

    def test_leaves_no_threads(self) -> None:
        _, opt = self.trained(range(1000, 1021), inverse_in_background=True)
        opt.state_dict()
        for thread in threading.enumerate():
            if thread.name.startswith("kfac"):
                thread.join(timeout=60)
        assert not any(thread.name.startswith("kfac") for thread in threading.enumerate())


def test_eigenvalues_are_corrected_by_a_part_of_the_examples() -> None:
    """With a fraction so large that it is all of them."""
    found = [
        preconditioned(conv_net(), 2, inverse="ekfac", damping=0.07, factor_fraction=fraction)
        for fraction in (1.0, 0.99)  # 12 of 12 examples
    ]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], **EXACT)
