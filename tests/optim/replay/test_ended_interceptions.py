"""Models that return losses of layers whose functions are intercepted leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode

from einconv_kfac import KFAC
from einconv_kfac.curvature.layers.interception import closed_interceptions


class Masked(nn.Linear):
    """A linear layer whose weight has a mask, as in autoregressive flows."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("mask", torch.ones(4, 4).tril())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.mask * self.weight, self.bias)


class Attention(nn.MultiheadAttention):
    """Attention of rows to each other."""

    def __init__(self) -> None:
        super().__init__(4, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x[None], x[None], x[None], need_weights=False)[0][0]


class Recurrent(nn.GRU):
    """A recurrent layer over single steps."""

    def __init__(self) -> None:
        super().__init__(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x[:, None])[0][:, 0]


class Likelihood(nn.Module):
    """Computes its loss from two calls of a layer.

    Args:
        layer: The layer, with inputs and outputs ``[n, 4]``.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), layer

    def forward(self, x: Tensor) -> Tensor:
        mean = self.layer(self.first(x))
        scale = self.layer(x).tanh()
        return ((x - mean).square() * (-scale).exp() + scale).sum(1).mean()


@pytest.mark.parametrize("layer", [Masked, Attention, Recurrent])
def test_steps_leave_no_mode_behind(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Likelihood(layer()), torch.randn(6, 4)
    opt, losses, seen = KFAC(model), list[float](), list[Tensor]()
    for _ in range(4):
        opt.zero_grad()
        loss = model(x)
        loss.register_hook(seen.append)
        opt.observe(loss).backward()
        opt.step()
        assert _get_current_function_mode() is None
        losses.append(loss.item())
    assert len(seen) == 4
    assert losses[-1] < losses[0]


class _EndError(BaseException):
    """Ends a run, as a request to stop does."""


def test_what_ends_a_call_ends_its_interception() -> None:
    torch.manual_seed(0)
    model, x = Likelihood(Masked()), torch.randn(6, 4)
    opt = KFAC(model)
    opt.observe(model(x)).backward()
    opt.step()

    def end(*_: object) -> None:
        raise _EndError

    handle = model.layer.register_forward_hook(end, prepend=True)
    with pytest.raises(_EndError), closed_interceptions():
        model(x)
    assert _get_current_function_mode() is None
    handle.remove()
    opt.zero_grad()
    opt.observe(model(x)).backward()
    opt.step()
