"""Rows of docs/scripts.md about training loops."""

from __future__ import annotations

import torch
from documented_scripts import STEPS, data, net, script, steps
from torch import nn
from torch.distributed import HashStore
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from einconv_kfac import KFAC


@script("mixed precision")
def mixed_precision() -> list[float]:
    model, loss_fn, (x, y) = net(), nn.CrossEntropyLoss(), data()
    opt, scaler = KFAC(model, loss_fn), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    losses = []
    for _ in range(STEPS):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_fn(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(float(loss.detach()))
    return losses


@script(
    "targets, masks or inputs that are filled anew in place after `backward` (`label.fill_(0)`)"
)
def filled_anew() -> list[float]:
    model, loss_fn, (x, y) = net(1), nn.BCEWithLogitsLoss(), data()
    opt, losses, label = KFAC(model, loss_fn), [], torch.empty(24)
    for _ in range(2 * STEPS):
        opt.zero_grad()
        total = 0.0
        for kind, value in ((y == 0, 1.0), (y != 0, 0.0)):
            rows = x[kind][:12]
            loss = loss_fn(model(rows)[:, 0], label.fill_(value)[: len(rows)])
            loss.backward()
            total += float(loss.detach())
        opt.step()
        losses.append(total)
    return losses


@script("gradient accumulation")
def accumulation() -> list[float]:
    model, loss_fn, (x, y) = net(), nn.CrossEntropyLoss(), data()
    opt, losses = KFAC(model, loss_fn), []
    for _ in range(STEPS):
        opt.zero_grad()
        total = 0.0
        for rows in (slice(0, 24), slice(24, 48)):
            loss = loss_fn(model(x[rows]), y[rows]) / 2
            loss.backward()
            total += float(loss.detach())
        opt.step()
        losses.append(total)
    return losses


@script("gradient clipping")
def clipping() -> list[float]:
    model, loss_fn, (x, y) = net(), nn.CrossEntropyLoss(), data()
    opt, losses = KFAC(model, loss_fn), []
    for _ in range(STEPS):
        opt.zero_grad()
        loss = loss_fn(model(100 * x), y)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        losses.append(float(loss.detach()))
    return losses


@script("a discriminator and a generator")
def adversarial() -> list[float]:
    torch.manual_seed(0)
    generator, critic = nn.Linear(2, 6), net(1)
    loss_fn, own = nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()
    opt, other = KFAC(critic, loss_fn), torch.optim.Adam(generator.parameters(), 1e-3)
    x, one, losses = data()[0] + 2, torch.ones(48, 1), []
    for _ in range(STEPS):
        opt.zero_grad()
        fake = generator(torch.randn(48, 2))
        loss = loss_fn(critic(x), one) + loss_fn(critic(fake.detach()), 0 * one)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
        other.zero_grad()
        own(critic(fake), one).backward()  # leaves gradients in the critic, which are zeroed
        other.step()
    return losses


@script("two passes per step (SAM)")
def sharpness_aware() -> list[float]:
    model, loss_fn, (x, y) = net(), nn.CrossEntropyLoss(), data()
    opt, losses = KFAC(model, loss_fn), []
    for _ in range(STEPS):
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        moves = [0.01 * p.grad / p.grad.norm() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves):
                p.add_(move)
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves):
                p.sub_(move)
        opt.step()
        losses.append(float(loss.detach()))
    return losses


@script("gradients of single losses (PCGrad)")
def projected() -> list[float]:
    model, loss_fn, (x, y) = net(), nn.CrossEntropyLoss(), data()
    opt, losses = KFAC(model, loss_fn, 0.1, adaptive=False), []
    parameters = list(model.parameters())
    for _ in range(STEPS):
        opt.zero_grad()
        parts = [loss_fn(model(x[rows]), y[rows]) for rows in (slice(0, 24), slice(24, 48))]
        found = [torch.autograd.grad(own, parameters, retain_graph=True) for own in parts]
        loss = parts[0] + parts[1]
        loss.backward()
        first, second = (torch.cat([g.flatten() for g in own]) for own in found)
        inner = (first @ second).clamp(max=0)
        weights = 1 - inner / first.square().sum(), 1 - inner / second.square().sum()
        for p, a, b in zip(parameters, *found):
            p.grad = weights[0] * a + weights[1] * b
        opt.step()
        losses.append(float(loss.detach()))
    return losses


@script("several processes")
def processes() -> list[float]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model, loss_fn, (x, y) = DistributedDataParallel(net()), nn.CrossEntropyLoss(), data()
        return steps(KFAC(model, loss_fn), lambda: loss_fn(model(x), y), 10)
    finally:
        torch.distributed.destroy_process_group()


@script("unbatched inputs (`policy(state)` with a state `[d]`), whose losses are added up")
def unbatched() -> list[float]:
    model, (x, y) = net(), data(12)
    opt = KFAC(model)
    return steps(
        opt,
        lambda: opt.observe(
            torch.stack(
                [functional.cross_entropy(model(own), y[i]) for i, own in enumerate(x)]
            ).sum()
        ),
    )
