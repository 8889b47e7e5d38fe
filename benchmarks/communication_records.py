"""Trainings on several workers, and what one of them sends and receives in a step."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from communication_networks import SUBJECTS
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from einconv_kfac import KFAC
from einconv_kfac.curvature.layers.discovery import find_layers
from einconv_kfac.distributed.message import LENGTH

MESSAGE_BYTES, FLOAT, SHORT = 8 * LENGTH, 4, 2
IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "einconv_kfac.optim"]
"""What the process imports that forks all workers."""
MODES: dict[str, dict[str, Any]] = {"fixed": {"lr": 0.01, "adaptive": False}, "automatic": {}}


def triangle(size: int) -> int:
    """Return how many numbers the triangle of a symmetric matrix is sent as."""
    return (size + 1) // 2 * (size + 1)


@dataclass(frozen=True)
class Sizes:
    """What there is to send, in bytes.

    Args:
        parameters: Parameters, and as much of gradients.
        triangles: One triangle of every factor, and as much of inverses.
        diagonals: The diagonals of all factors.
        layers: The number of layers.
    """

    parameters: int
    triangles: int
    diagonals: int
    layers: int

    @property
    def short(self) -> int:
        """Triangles in float16."""
        return self.triangles * SHORT // FLOAT

    @staticmethod
    def of(model: nn.Module) -> Sizes:
        """Return the sizes of a model."""
        shapes = [layer.layout.shape for layer in find_layers(model)]
        numbers = sum(g * (triangle(rows) + triangle(columns)) for g, rows, columns in shapes)
        diagonals = sum(g * (rows + columns) for g, rows, columns in shapes)
        count = sum(parameter.numel() for parameter in model.parameters())
        return Sizes(FLOAT * count, FLOAT * numbers, FLOAT * diagonals, len(shapes))


@dataclass
class Traffic:
    """What one worker takes part in: bytes and messages of each kind."""

    sizes: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add_(self, kind: str, size: int) -> None:
        """Count a message."""
        self.sizes[kind] = self.sizes.get(kind, 0) + size
        self.counts[kind] = self.counts.get(kind, 0) + 1


@contextmanager
def recorded(traffic: Traffic) -> Iterator[None]:
    """Record the collectives inside the block."""

    def watch(name: str, kind: str, index: int) -> Any:
        original = getattr(distributed, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[index] if args else kwargs["output_tensor"]
            size = tensor.numel() * tensor.element_size()
            traffic.add_("message" if size == MESSAGE_BYTES else kind, size)
            return original(*args, **kwargs)

        return mock.patch.object(distributed, name, call)

    gathers = "all_gather_single"  # FSDP2's, from torch 2.13 on
    gathers = gathers if hasattr(distributed, gathers) else "all_gather_into_tensor"
    with (
        watch("all_reduce", "all-reduce", 0),
        watch("reduce", "reduce", 0),
        watch("broadcast", "broadcast", 0),
        watch(gathers, "all-gather", 0),
        watch("all_to_all_single", "exchange", 1),
    ):
        yield


@dataclass(frozen=True)
class Way:
    """A way to train.

    Args:
        mode: ``"fixed"`` or ``"automatic"``.
        sharded: Whether `fully_shard` divides the model.
        divides: Whether each layer's factors are on one worker.
        short: Whether factors are sent in float16.
    """

    mode: str
    sharded: bool = False
    divides: bool = False
    short: bool = False

    def names(self) -> tuple[str, str, str, str]:
        """Return the names of wrapper and step, of workers that have factors, and their bits."""
        wrapper = "fully_shard" if self.sharded else "DDP"
        return wrapper, self.mode, "one" if self.divides else "all", "16" if self.short else "32"

    def options(self) -> dict[str, Any]:
        """Return the options of the optimizer."""
        dtype = torch.float16 if self.short else None
        own = {"divide_factors": self.divides, "communication_dtype": dtype}
        return {**MODES[self.mode], "fallback": "gradient", **own}


def work(rank: int, size: int, folder: str, subject: str, runs: Sequence[tuple[int, Way]]) -> None:
    """Train some runs in one process, and save what each sent in its first and last step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=start, rank=rank, world_size=size)
    found = [trained(size, subject, steps, way) for steps, way in runs]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    distributed.destroy_process_group()


def trained(size: int, subject: str, steps: int, way: Way) -> tuple[Traffic, Traffic]:
    """Return what one worker takes part in, in the first of some steps and in the last."""
    torch.manual_seed(0)
    model, loss_fn = SUBJECTS[subject].made(full=False), nn.CrossEntropyLoss()
    if way.sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))  # in place
        wrapped: nn.Module = model
    else:
        wrapped = DistributedDataParallel(model)
    opt, found = KFAC(wrapped, loss_fn, **way.options()), []
    for _ in range(steps):
        opt.zero_grad()
        loss_fn(wrapped(torch.randn(2, 3, 32, 32)), torch.randint(10, (2,))).backward()
        found.append(traffic := Traffic())
        with recorded(traffic):
            opt.step()
    return found[0], found[-1]


def measured(
    subject: str, size: int, runs: Sequence[tuple[int, Way]]
) -> list[tuple[Traffic, Traffic]]:
    """Return what one worker takes part in, for each of some runs, in the same processes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, folder, subject, runs)
        get_context("forkserver").set_forkserver_preload(IMPORTED)
        start_processes(work, arguments, nprocs=size, start_method="forkserver")  # type: ignore[no-untyped-call]
        found: list[tuple[Traffic, Traffic]] = torch.load(f"{folder}/found.pt", weights_only=False)
    return found
