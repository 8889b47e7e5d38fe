"""Stop a training run, and resume it from its checkpoint.

The state of `KFAC` contains factors, inverses, damping and the random generator of the sampled
targets; it loads with ``weights_only=True``. The weights of a resumed run are bit-identical to
those of an uninterrupted one.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from train_digits import batches, build_network, split_digits

from einconv_kfac import KFAC


def advance(model: nn.Module, loss_fn: nn.Module, optimizer: KFAC, first: int, last: int) -> None:
    """Take the steps ``first`` to ``last - 1``, counted from 0."""
    stream = batches(split_digits(seed=0), batch_size=448, seed=0)
    for x, y in islice(stream, first, last):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def main(steps: int = 6) -> bool:
    """Stop after half of the steps and resume; return whether the weights are bit-identical."""
    half, loss_fn = steps // 2, nn.CrossEntropyLoss()
    model = build_network(seed=0)
    optimizer = KFAC(model, loss_fn)
    advance(model, loss_fn, optimizer, 0, half)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        checkpoint = torch.load(path, weights_only=True)
    advance(model, loss_fn, optimizer, half, steps)

    resumed = build_network(seed=1)
    optimizer = KFAC(resumed, loss_fn)
    resumed.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    advance(resumed, loss_fn, optimizer, half, steps)
    pairs: list[tuple[Tensor, Tensor]] = list(zip(model.parameters(), resumed.parameters()))
    same = all(torch.equal(a, b) for a, b in pairs)
    print(f"resumed after {half} of {steps} steps; weights bit-identical: {same}")
    return same


if __name__ == "__main__":
    main()
