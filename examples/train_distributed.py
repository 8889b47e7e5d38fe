"""Train on handwritten digits with several workers, as one worker would with all their batches.

    torchrun --standalone --nproc-per-node=2 examples/train_distributed.py

Each worker has a part of every batch. A training loop for `DistributedDataParallel` stays as it is;
the optimizer gets the wrapped model. Workers with a GPU each use it. The last line compares the
parameters of all workers.
"""

from __future__ import annotations

import argparse
import os

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from train_digits import Split, build_network, split_digits

from einconv_kfac import KFAC


def main(epochs: int = 10, batch_size: int = 448) -> float:
    """Train, and return the test accuracy.

    Args:
        epochs: Number of epochs.
        batch_size: Number of examples per step, of all workers together.
    """
    device = _joined()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    data = split_digits(0, device)
    examples = TensorDataset(data.x, data.y)
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(examples, size, rank)
    loader = DataLoader(examples, batch_size // size, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(build_network(0).to(device))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1:2d}: loss {loss.item():.4f} on the last part of a batch")
    found = _accuracy(model, data)
    spread = _spread(model)
    if rank == 0:
        print(f"test accuracy {found:.2%}; parameters of {size} workers differ by {spread:g}")
    distributed.barrier()  # so that none leaves while another one still sends
    distributed.destroy_process_group()
    return found


def _joined() -> str:
    """Join the workers that torchrun started, and return the device of this one."""
    if not torch.cuda.is_available():
        distributed.init_process_group("gloo")
        return "cpu"
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl")
    return device


@torch.no_grad()
def _accuracy(model: nn.Module, data: Split) -> float:
    """Return the fraction of test images that are recognized."""
    model.eval()
    return float((model(data.x_test).argmax(1) == data.y_test).float().mean())


def _spread(model: nn.Module) -> float:
    """Return the largest difference between the parameters of any two workers."""
    own = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    largest, smallest = own.clone(), own.clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
    return float((largest - smallest).max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=448)
    given = parser.parse_args()
    main(given.epochs, given.batch_size)
