"""Products on a subset of the examples against dense GGNs of single examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, objective_of, train_step, weights
from torch import Tensor, nn
from torch.func import functional_call, jvp

from einconv_kfac import KFAC
from einconv_kfac.optim.recording.recorder import Recorder
from einconv_kfac.optim.replay.batch import with_subsets
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.replay.subsample import Subset
from einconv_kfac.optim.step.fits.quadratic_model import quadratic_model

EXACT = {"rtol": 1e-9, "atol": 1e-12}
LOSSES: dict[str, Any] = {
    "mean": nn.CrossEntropyLoss,
    "sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "weights": lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double(), ignore_index=1),
}


def dropping(kind: Any = nn.Dropout, *, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3, 2, 1), nn.GELU(), kind(0.4, inplace), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(36, 5), nn.Dropout(0.2), nn.Linear(5, 3)).double()


def curvatures_of_examples(
    model: nn.Module, loss_fn: nn.Module, batch: Any, direction: Any, state: Tensor
) -> Tensor:
    """Return ``d.G_n.d`` of every example ``n``, where the sum over them is that of the batch."""

    def output(values: dict[str, Tensor]) -> Tensor:
        torch.set_rng_state(state)
        return functional_call(model, values, (batch[0],))

    f, tangent = jvp(output, ({n: p.detach() for n, p in model.named_parameters()},), (direction,))
    parts = tangent.unsqueeze(0) * torch.eye(len(f)).double().unsqueeze(-1)
    hessian = torch.autograd.functional.hessian(lambda out: loss_fn(out, batch[1]), f)
    return torch.stack(
        [(p.flatten() @ hessian.reshape(f.numel(), -1)) @ p.flatten() for p in parts]
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("random_layers", [False, True])
def test_curvature_is_that_of_the_chosen_examples(
    loss: str, forward_mode: bool, random_layers: bool
) -> None:
    """The average over all subsets is the curvature of the batch."""
    model = dropping() if random_layers else conv_net()
    loss_fn, (x, y) = LOSSES[loss](), image_batch(6)
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    wanted = curvatures_of_examples(model, loss_fn, (x, y), direction, state)
    torch.set_rng_state(state)
    recorder = Recorder(model, loss_fn, lambda *_: None)
    recorder.keeps_outputs = True
    replay = Replay(model, recorder.paused)
    replay.forward_mode = forward_mode
    loss_fn(model(x), y).backward()
    (batch,) = with_subsets(recorder.take(), 0.25, 0, 3)
    assert batch.subset is not None
    assert len(batch.subset.rows) == 2
    parameters = dict(model.named_parameters())
    point = objective_of(parameters, gradient=direction, batches=[batch])
    found = quadratic_model(replay, point, [direction])
    expected = 3 * wanted[batch.subset.rows].sum()
    torch.testing.assert_close(found.curvature[0, 0], expected, **EXACT)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_is_that_of_the_batch(kind: Any, inplace: bool, layout: Any) -> None:
    model, loss_fn = dropping(kind, inplace=inplace).to(memory_format=layout), nn.CrossEntropyLoss()
    x, y = image_batch()
    recorder = Recorder(model, loss_fn, lambda *_: None)
    recorder.keeps_outputs = True
    output = model(x.to(memory_format=layout))
    loss_fn(output, y).backward()
    (batch,) = with_subsets(recorder.take(), 0.5, 0, 0)
    assert batch.subset is not None
    replay = Replay(model, recorder.paused)
    (found,) = replay.outputs(batch, subset=True)
    torch.testing.assert_close(found, output[batch.subset.rows], **EXACT)


@pytest.mark.parametrize("random_layers", [False, True])
def test_training_on_subsets(random_layers: bool) -> None:
    """Subsets are drawn anew each step, from the seed and the step alone."""
    found = []
    for resume in (False, True):
        model = dropping() if random_layers else conv_net()
        loss_fn = nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, curvature_fraction=0.5)
        torch.manual_seed(1)
        x, y = image_batch(24)
        for step in range(10):
            train_step(model, loss_fn, opt, (x, y))
            if resume and step == 4:
                state = opt.state_dict()
                opt = KFAC(model, loss_fn, curvature_fraction=0.5)
                opt.load_state_dict(state)
        assert loss_fn(model.eval()(x), y) < 0.7
        found.append(weights(model))
    assert torch.equal(*found)
    random = torch.get_rng_state()
    batch = type("Batch", (), {"outputs": [torch.zeros(9, 2)]})
    drawn = [Subset(torch.arange(2), 9)]
    assert drawn[0].scale == 4.5
    assert with_subsets([batch], 1.0, 0, 0) == [batch]  # type: ignore[list-item]
    assert torch.equal(random, torch.get_rng_state())


class Called(nn.Module):
    """Calls a network, with something else beside the images."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.layer = conv_net(), layer

    def forward(self, x: Tensor, *_: Any, scale: Any = 1.0) -> Tensor:
        x = x if self.layer is None else self.layer(x)
        return self.net(x * torch.as_tensor(scale))


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def refused(model: nn.Module, message: str, *others: Any, **options: Any) -> None:
    loss_fn, (x, y) = nn.CrossEntropyLoss(), image_batch()
    opt = KFAC(model, loss_fn, curvature_fraction=0.5, damping=0.1)
    before, buffers = weights(model), [b.clone() for b in model.buffers()]
    loss = loss_fn(model(x, *others, **options), y)
    buffers = [b.clone() for b in model.buffers()]
    loss.backward()
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert torch.equal(before, weights(model))
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers()))
    assert all(r["factors"] is None for r in opt._preconditioner.state_dict()["layers"].values())


def test_what_mixes_examples_is_refused() -> None:
    norm = nn.BatchNorm2d(1).double()
    refused(Called(norm), r"'layer' \(BatchNorm2d\), which takes its statistics from the batch")
    refused(Called(Mixing()), "a layer mixes examples")
    refused(Called(nn.RReLU()), "draws random numbers by other means than nn.Dropout")
    model, loss_fn = Called(norm.eval()), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, curvature_fraction=0.5)
    train_step(model, loss_fn, opt, image_batch())


def test_arguments_without_examples_first_are_refused() -> None:
    refused(Called(), r"got \[2\] for argument 1 of the model", torch.ones(2))
    refused(Called(), r"got \[\] for argument 'scale' of the model", scale=torch.ones(()).double())
    refused(Called(), r"got list for argument 1 of the model", [1.0])
    model, loss_fn, (x, y) = Called(), nn.CrossEntropyLoss(), image_batch()
    opt = KFAC(model, loss_fn, curvature_fraction=0.5)
    loss_fn(model(x, None, "plain", scale=2.0), y).backward()
    opt.step()


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan"), "half", True, None])
def test_bad_fractions_are_refused(value: Any) -> None:
    for name in ("curvature_fraction", "factor_fraction"):
        with pytest.raises(ValueError, match=rf"`{name}` must be a number in \(0, 1\]"):
            KFAC(conv_net(), nn.CrossEntropyLoss(), **{name: value})
    with pytest.raises(ValueError, match="must be 1 when adaptive=False"):
        KFAC(conv_net(), nn.CrossEntropyLoss(), lr=0.1, adaptive=False, curvature_fraction=0.5)
