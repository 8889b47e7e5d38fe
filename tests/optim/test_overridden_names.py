"""Models whose classes list their parameters themselves, as loss modules of other libraries do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC, coverage


class Listing(nn.Sequential):
    """A network that lists its parameters with fewer arguments than torch's method has."""

    def named_parameters(  # type: ignore[override]
        self, prefix: str = "", recurse: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        return super().named_parameters(prefix, recurse)


class Apart(nn.Module):
    """A network that keeps its weights in no module."""

    def __init__(self) -> None:
        super().__init__()
        self.held = {"actor.weight": nn.Parameter(torch.eye(3, 4))}

    def named_parameters(  # type: ignore[override]
        self, prefix: str = "", recurse: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.held.items()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.held["actor.weight"].T


def weights(kind: type[nn.Sequential]) -> list[Tensor]:
    """Return the parameters of a network after two steps."""
    torch.manual_seed(0)
    model = kind(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(16, 4).double()
    optimizer = KFAC(model, exclude=["2"])
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.observe(functional.mse_loss(model(x), x[:, :3])).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.filterwarnings("ignore:Kronecker factors cover")
def test_a_list_with_fewer_arguments() -> None:
    for one, other in zip(weights(Listing), weights(nn.Sequential)):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_parameters_of_no_module_are_refused() -> None:
    message = "got 'actor.weight', which no module has"
    with pytest.raises(ValueError, match=message):
        KFAC(Apart())
    with pytest.raises(ValueError, match=message):
        coverage(Apart())
