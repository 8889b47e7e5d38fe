"""The cost of training steps: time of device and host, memory, waits, and steps to a loss."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from evidence.data import DIRECTORY, fashion_mnist, synthetic
from evidence.models import resnet20, small_cnn
from evidence.optimizers import library
from evidence.vision import torchvision_module
from gpu_lab import PRECISIONS, Lab, with_precision
from torch import Tensor, nn

from einconv_kfac.optim import KFAC

CLASSES = 10
LATE = 10_000  # steps after which nothing is updated more often than its period says
PERIODS = (10, 100)
RATE = 1e-4


@dataclass(frozen=True)
class Subject:
    """A network with a batch.

    Args:
        build: Returns the network.
        shape: Shape of the batch of images.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]


def resnet(name: str) -> nn.Module:
    """Return one of torchvision's residual networks."""
    model: nn.Module = getattr(torchvision_module("resnet"), name)(num_classes=CLASSES)
    return model


def vit_small() -> nn.Module:
    """Return ViT-S/16."""
    kind = torchvision_module("vision_transformer").VisionTransformer
    model: nn.Module = kind(224, 16, 12, 6, 384, 1536, num_classes=CLASSES)
    return model


SUBJECTS = {
    "ResNet-18": Subject(partial(resnet, "resnet18"), (128, 3, 224, 224)),
    "ResNet-50": Subject(partial(resnet, "resnet50"), (64, 3, 224, 224)),
    "ViT-S": Subject(vit_small, (64, 3, 224, 224)),
}
QUICK = {"a tiny ResNet": Subject(partial(resnet20, 2, 1), (4, 1, 8, 8))}


def late(model: nn.Module, loss_fn: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Return KFAC with its step count set late in training."""
    opt = KFAC(model, loss_fn, **options)
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = LATE
    opt.load_state_dict(state)
    return opt


def soap(model: nn.Module, loss_fn: nn.Module) -> torch.optim.Optimizer:
    """Return SOAP."""
    kind: Any = library("pytorch_optimizer").SOAP
    opt: torch.optim.Optimizer = kind(model.parameters(), lr=RATE, precondition_frequency=10)
    return opt


Build = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]
BUILDS: dict[str, Build] = {
    "SGD": lambda model, _: torch.optim.SGD(model.parameters(), RATE, momentum=0.9),
    "AdamW": lambda model, _: torch.optim.AdamW(model.parameters(), RATE),
    "SOAP": soap,
    "KFAC, fixed": partial(late, lr=RATE, adaptive=False),
    "KFAC, automatic": late,
}


def steps(lab: Lab) -> None:
    """Measure the steps of each optimizer on each network in each precision."""
    for title, subject in (QUICK if lab.quick else SUBJECTS).items():
        for precision in PRECISIONS:
            for name in BUILDS:
                call = partial(_steps, lab, subject, precision, name)
                lab.measure("steps", f"{title}, {precision}, {name}", 40, call)


def _steps(lab: Lab, subject: Subject, precision: str, name: str) -> dict[str, Any]:
    """Return medians by kind of step: milliseconds in all and of the host, and megabytes."""
    torch.manual_seed(0)
    model, loss_fn = subject.build().to(lab.device), nn.CrossEntropyLoss()
    x = torch.randn(subject.shape, device=lab.device)
    y = torch.randint(CLASSES, subject.shape[:1], device=lab.device)
    opt, found = BUILDS[name](model, loss_fn), dict[str, list[float]]()
    low = torch.autocast(lab.device.type, torch.bfloat16)
    with with_precision(precision):
        for step in range(3 if lab.quick else 2 * PERIODS[0] + 2):
            lab.synchronize()
            if lab.is_gpu:
                torch.cuda.reset_peak_memory_stats(lab.device)
            times = [time.perf_counter()]
            with low if precision == "bfloat16" else nullcontext():
                loss = loss_fn(model(x), y)
            opt.zero_grad()
            loss.backward()
            times.append(time.perf_counter())
            opt.step()
            times.append(time.perf_counter())
            lab.synchronize()
            kind = _kind(step)
            found.setdefault(kind, []).append(1e3 * (time.perf_counter() - times[0]))
            found.setdefault(f"{kind}, host in step", []).append(1e3 * (times[2] - times[1]))
            if lab.is_gpu:
                peak = torch.cuda.max_memory_allocated(lab.device) / 1e6
                found.setdefault(f"{kind}, MB", []).append(peak)
    return {key: round(median(values), 2) for key, values in found.items()}


def _kind(step: int) -> str:
    """Return what is due in a step; the step count starts at a multiple of all periods."""
    return "first" if step == 0 else "factors" if step % PERIODS[0] == 0 else "ordinary"


def waits(lab: Lab) -> None:
    """Note where the host waits for the device, by torch's own warnings."""
    if lab.is_gpu:
        for name in ("KFAC, fixed", "KFAC, automatic"):
            lab.measure("waits", name, 40, partial(_waits, lab, name))


def _waits(lab: Lab, name: str) -> dict[str, Any]:
    """Return the number of waits and their lines, by step."""
    torch.manual_seed(0)
    model, loss_fn = resnet("resnet18").to(lab.device), nn.CrossEntropyLoss()
    opt, found = BUILDS[name](model, loss_fn), {}
    x = torch.randn(32, 3, 64, 64, device=lab.device)
    y = torch.randint(CLASSES, (32,), device=lab.device)
    for step in range(12):
        loss = loss_fn(model(x), y)
        opt.zero_grad()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            loss.backward()
            opt.step()
            torch.cuda.set_sync_debug_mode("default")
        own = [warning for warning in seen if "synchroniz" in str(warning.message)]
        lines = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in own})
        found[f"step {step}"] = {"waits": len(own), "at": lines[:40]}
    return found


def train(lab: Lab) -> None:
    """Train on Fashion-MNIST, or on synthetic images without it, with three seeds."""
    data = fashion_mnist().train if DIRECTORY.is_dir() and not lab.quick else synthetic().train
    x, y = data.x.to(lab.device), data.y.to(lab.device)
    builds: dict[str, Build] = {
        "SGD": lambda m, _: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True),
        "AdamW": lambda m, _: torch.optim.AdamW(m.parameters(), 2e-3),
        "KFAC, fixed": partial(KFAC, lr=0.1, adaptive=False),
        "KFAC, automatic": KFAC,
    }
    for seed in range(1 if lab.quick else 3):
        for name, build in builds.items():
            lab.measure(
                "train", f"{name}, seed {seed}", 40, partial(_train, lab, x, y, build, seed)
            )


def _train(lab: Lab, x: Tensor, y: Tensor, build: Build, seed: int) -> dict[str, Any]:
    """Return steps, seconds and the running mean of the loss, along one run."""
    torch.manual_seed(seed)
    widths, count, size = ((4, 8), 4, 32) if lab.quick else ((32, 64), 700, 512)
    model, loss_fn = small_cnn(28, widths, 128).to(lab.device), nn.CrossEntropyLoss()
    opt, order = build(model, loss_fn), torch.Generator().manual_seed(seed)
    curve: list[tuple[int, float, float]] = []
    mean, begin = torch.zeros((), device=lab.device), time.perf_counter()
    for step in range(count):
        rows = torch.randint(len(x), (size,), generator=order).to(lab.device)
        loss = loss_fn(model(x[rows]), y[rows])
        opt.zero_grad()
        loss.backward()
        opt.step()
        mean = loss.detach() if step == 0 else mean.lerp(loss.detach(), 0.05)
        if step % 20 == 19 or step == count - 1:
            value = round(float(mean), 4)
            curve.append((step + 1, round(time.perf_counter() - begin, 3), value))
    return {"curve": curve}
