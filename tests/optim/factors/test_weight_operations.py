"""What weights of losses cost."""

from __future__ import annotations

from typing import Any

from optim_cases import conv_net, image_batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from einconv_kfac import KFAC


class Operations(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_weights_take_few_operations_for_all_layers() -> None:
    """Sums are scaled as they are added; equal weights take none of these operations."""
    counts = []
    for weight in (0.5, 0.3):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, 0.1, adaptive=False, fisher="exact")
        with Operations() as operations:
            for seed, own in enumerate((0.5, weight)):
                x, y = image_batch(seed=seed)
                (own * loss_fn(model(x), y)).backward()
            opt.step()
        counts.append(operations.count)
    assert counts[0] <= counts[1] <= counts[0] + 8
