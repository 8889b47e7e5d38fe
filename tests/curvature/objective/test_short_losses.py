"""Losses that the script computes in bfloat16 or float16, behind a model in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC, kronecker_factors

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 6, generator=GENERATOR)
SCORES = torch.randn(32, 5, generator=GENERATOR)
LABELS = torch.randint(5, (32,), generator=GENERATOR)
WEIGHT = torch.rand(5, generator=GENERATOR) + 0.5
Loss = Callable[[Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda y: functional.cross_entropy(y, LABELS, WEIGHT.to(y.dtype)),
    "nll_loss": lambda y: functional.nll_loss(
        functional.log_softmax(y / 2, -1), LABELS, reduction="none"
    ).mean(),
    "bce": lambda y: functional.binary_cross_entropy_with_logits(
        y, (SCORES > 0).to(y.dtype), WEIGHT.to(y.dtype)
    ),
    "mse": lambda y: functional.mse_loss(y, SCORES.to(y.dtype)),
    "huber": lambda y: functional.huber_loss(y, SCORES.to(y.dtype), delta=0.7),
    "smooth_l1": lambda y: functional.smooth_l1_loss(y, SCORES.to(y.dtype), beta=0.7),
    "poisson": lambda y: functional.poisson_nll_loss(y, SCORES.exp().to(y.dtype)),
}
SHORT = [torch.bfloat16, torch.float16]


def has_gradient(loss: Loss, dtype: torch.dtype) -> bool:
    """Whether this version of torch differentiates a loss in this data type."""
    scores = torch.ones(32, 5, dtype=dtype, requires_grad=True)
    try:
        loss(scores).backward()
    except RuntimeError:
        return False
    return True


CASES = [(n, dtype) for dtype in SHORT for n, loss in LOSSES.items() if has_gradient(loss, dtype)]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def exact(model: nn.Module, loss: Loss) -> float:
    """The loss of the parameters in float64."""
    values = {name: p.detach().double() for name, p in model.named_parameters()}
    return loss(torch.func.functional_call(model, values, (X.double(),))).item()


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_factor_of_the_last_layer_is_the_hessian(name: str, dtype: torch.dtype) -> None:
    loss, model = LOSSES[name], network()

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return loss(net(x).to(dtype))

    factors = kronecker_factors(model, None, [X], fisher="exact", forward=forward)
    outputs = model(X).detach().to(dtype).double()
    whole = torch.func.hessian(loss)(outputs)
    blocks = torch.stack([whole[n, :, n] for n in range(len(X))])  # of each example
    expected = blocks.sum(0)
    error = (factors["2"].B[0].double() - expected).norm() / expected.norm()
    assert error < 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_ratio_is_that_of_the_loss_in_float64(name: str, dtype: torch.dtype) -> None:
    """The change of a loss has an error relative to the change, not to the loss."""
    loss, model = LOSSES[name], network()
    opt, before = KFAC(model, fisher="exact"), exact(model, loss)
    opt.observe(loss(model(X).to(dtype))).backward()
    opt.step()
    found = opt.statistics()
    ratio = (exact(model, loss) - before) / found["predicted"]
    assert found["ratio"] == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_given_module_is_evaluated_in_float32(is_weighted: bool, dtype: torch.dtype) -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.net(x)
            return output.to(dtype if x.dtype == torch.float32 else x.dtype)

    weight = torch.tensor([1.0, 2.0, 0.5, 4.0, 0.25]) if is_weighted else None
    model, target = Short(), torch.arange(len(X)) % 5
    loss_fn = nn.CrossEntropyLoss(None if weight is None else weight.to(dtype))

    def loss(output: Tensor) -> Tensor:
        own = None if weight is None else weight.double()
        return functional.cross_entropy(output, target, own)

    opt, before = KFAC(model, loss_fn, fisher="exact"), exact(model, loss)
    loss_fn(model(X), target).backward()
    opt.step()
    found = opt.statistics()
    ratio = (exact(model, loss) - before) / found["predicted"]
    assert found["ratio"] == pytest.approx(ratio, rel=0.01)
