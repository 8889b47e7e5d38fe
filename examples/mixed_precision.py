"""Train in mixed precision, with gradients accumulated over micro-batches.

The forward passes run under bfloat16 autocast. Each loss is divided by the number of micro-batches,
so that the step equals that of the whole batch; factors and quadratic model use every micro-batch.
With float16, add a ``torch.amp.GradScaler`` as for any optimizer.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn
from train_digits import batches, build_network, evaluate, split_digits

from einconv_kfac import KFAC


def main(steps: int = 15, parts: int = 4, device: str = "cpu") -> float:
    """Train; print and return the test accuracy."""
    data, loss_fn = split_digits(seed=0, device=device), nn.CrossEntropyLoss()
    model = build_network(seed=0).to(device)
    optimizer = KFAC(model, loss_fn)
    for x, y in islice(batches(data, batch_size=448, seed=0), steps):
        optimizer.zero_grad()
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts)):
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = loss_fn(model(x_part), y_part) / parts
            loss.backward()
        optimizer.step()
    _, accuracy = evaluate(model, data)
    print(f"test accuracy {accuracy:.1%} after {steps} steps of {parts} micro-batches")
    return accuracy


if __name__ == "__main__":
    main()
