"""Use the installed package; the argument is the checkout, from which nothing may be imported."""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import einconv_kfac
from einconv_kfac import KFAC, conv_input_factor, kronecker_factors


def main() -> None:
    """Compute factors, train for ten steps, and check where the package was imported from."""
    warnings.simplefilter("error")
    checkout = Path(sys.argv[1]).resolve()
    source = Path(einconv_kfac.__file__).resolve()
    assert checkout not in source.parents, f"imported from the checkout: {source}"
    assert find_spec("optim") is None, "a top-level package `optim` is installed"
    assert (source.parent / "py.typed").exists()

    torch.manual_seed(0)
    x, y = torch.rand(16, 2, 8, 8), torch.randint(3, (16,))
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )
    loss_fn = nn.CrossEntropyLoss()
    factors = kronecker_factors(model, loss_fn, [(x, y)])
    assert factors["0"].A.shape == (2, 10, 10), factors["0"].A.shape
    assert conv_input_factor(x, 3, stride=2, groups=2).shape == (2, 9, 9)

    optimizer = KFAC(model, loss_fn)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    print(f"einconv_kfac {einconv_kfac.__version__} from {source.parent}: works")


if __name__ == "__main__":
    main()
