"""The rows of docs/scripts.md, run; those that need other libraries are in tests/ecosystem."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.func import functional_call
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from einconv_kfac import KFAC

DOCUMENT = Path(__file__).parents[2] / "docs" / "scripts.md"
ECOSYSTEM = (
    "a Hugging Face model", "Transformers' Trainer", "Lightning, automatic optimization",
    "Lightning, manual optimization", "Accelerate", "PEFT", "PyTorch Geometric",
)  # fmt: skip
STEPS = 10
Script = Callable[[], list[float]]
SCRIPTS: dict[str, Script] = {}


def script(row: str) -> Callable[[Script], Script]:
    """Register the script of a row."""

    def register(run: Script) -> Script:
        SCRIPTS[row] = run
        return run

    return register


def data(size: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 6, generator=generator)
    return x, (x @ torch.randn(6, 3, generator=generator)).argmax(1)


def net(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs))


def steps(opt: KFAC, loss: Callable[[], Tensor], count: int = STEPS) -> list[float]:
    losses = []
    for _ in range(count):
        opt.zero_grad()
        value = loss()
        value.backward()
        opt.step()
        losses.append(float(value.detach()))
    return losses


@script("a loss module on the output")
def module() -> list[float]:
    model, loss_fn, (x, y) = net(), nn.CrossEntropyLoss(), data()
    return steps(KFAC(model, loss_fn), lambda: loss_fn(model(x), y))


@script("a functional loss")
def functional_loss() -> list[float]:
    model, (x, y) = net(), data()
    opt = KFAC(model)
    return steps(opt, lambda: opt.observe(functional.cross_entropy(model(x), y)))


@script("a reshape before the loss")
def reshape() -> list[float]:
    model, loss_fn, (x, y) = net(), nn.CrossEntropyLoss(), data()
    return steps(
        KFAC(model, loss_fn),
        lambda: loss_fn(model(x.view(12, 4, 6)).view(-1, 3), y.view(12, 4).view(-1)),
    )


@script("several losses")
def several_losses() -> list[float]:
    model, (x, y) = net(4), data()
    opt = KFAC(model)

    def loss() -> Tensor:
        out = model(x)
        classes, value = (
            functional.cross_entropy(out[:, :3], y),
            functional.mse_loss(out[:, 3], y.float()),
        )
        return opt.observe(classes + 0.5 * value)

    return steps(opt, loss)


@script("a penalty")
def penalty() -> list[float]:
    model, loss_fn, (x, y) = net(), nn.CrossEntropyLoss(), data()
    opt = KFAC(model, loss_fn)
    return steps(
        opt,
        lambda: opt.observe(
            loss_fn(model(x), y) + 1e-3 * sum(p.square().sum() for p in model.parameters())
        ),
    )


@script(
    "a loss of tensors inside of the model (features that a hook or an attribute keeps, an "
    "auxiliary loss)"
)
def inner_tensors() -> list[float]:
    model, loss_fn, (x, y) = net(), nn.CrossEntropyLoss(), data()
    kept: list[Tensor] = []
    model[1].register_forward_hook(lambda _, __, hidden: kept.append(hidden))
    opt = KFAC(model, loss_fn)

    def loss() -> Tensor:
        scores = model(x)
        return opt.observe(loss_fn(scores, y) + 0.01 * kept.pop().square().mean())

    return steps(opt, loss)


@script("weights of examples")
def example_weights() -> list[float]:
    model, (x, y) = net(), data()
    opt, entries = KFAC(model), nn.CrossEntropyLoss(reduction="none")
    own = torch.linspace(0.5, 1.5, len(x))
    return steps(opt, lambda: opt.observe((entries(model(x), y) * own).mean()))


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


@script("a compiled model")
def compiled() -> list[float]:
    model = torch.compile(net(), backend="eager")
    loss_fn, (x, y) = nn.CrossEntropyLoss(), data()
    return steps(KFAC(model, loss_fn), lambda: loss_fn(model(x), y))


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


class Residual(nn.Module):
    """The residual of ``u'' = -pi^2 sin(pi x)`` and the values at the boundary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        ends = self.net(torch.tensor([[0.0], [1.0]]).double())
        return curvature + math.pi**2 * (math.pi * x).sin(), ends


@script(
    "parts of the model called one after the other (`model.encoder(x)`, `model.decoder(z)`), or "
    "beside the whole"
)
def parts_of_a_model() -> list[float]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(6, 4), "decoder": nn.Linear(4, 6)})
    loss_fn, (x, _) = nn.MSELoss(), data()
    opt = KFAC(model, loss_fn)
    return steps(opt, lambda: loss_fn(model["decoder"](model["encoder"](x).tanh()), x))


@script("a loop that passes a state from call to call")
def passed_state() -> list[float]:
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(2, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            state = self.cell(x, state)
            return self.head(state), state

    model, loss_fn, (x, y) = Reader(), nn.CrossEntropyLoss(), data()

    def loss() -> Tensor:
        state = torch.zeros(len(x), 8)
        for part in x.split(2, dim=1):
            scores, state = model(part, state)
        return torch.as_tensor(loss_fn(scores, y))

    return steps(KFAC(model, loss_fn), loss)


@script("derivatives of the network (PINN)")
def physics_informed() -> list[float]:
    model, x = Residual(), torch.linspace(0, 1, 20).double()[:, None]
    opt = KFAC(model)

    def loss() -> Tensor:
        residual, ends = model(x)
        return opt.observe(residual.square().mean() + 100 * ends.square().mean())

    return steps(opt, loss)


class Masked(nn.Module):
    """A network of which some weights are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        first: Tensor = self.net[0].weight
        return functional_call(self.net, {"0.weight": first * kept}, (x,))


@script("other tensors in place of parameters (`functional_call`: MAML, noise, masks)")
def other_tensors() -> list[float]:
    model, loss_fn, (x, y) = Masked(), nn.CrossEntropyLoss(), data()
    kept = (torch.arange(96) % 5 != 0).view(16, 6)
    return steps(KFAC(model, loss_fn), lambda: torch.as_tensor(loss_fn(model(x, kept), y)))


@script("a variational autoencoder")
def variational() -> list[float]:
    torch.manual_seed(0)

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log_variance = self.encoder(x).chunk(2, dim=1)
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            return self.decoder(z), mean, log_variance

    model, x = Autoencoder(), data()[0]
    opt = KFAC(model)

    def loss() -> Tensor:
        found, mean, log_variance = model(x)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        return opt.observe(functional.mse_loss(found, x) + 0.1 * divergence)

    return steps(opt, loss)


@script("a policy gradient")
def policy_gradient() -> list[float]:
    torch.manual_seed(0)
    model, best = net(4), torch.randn(6, 4)
    opt, costs = KFAC(model), []
    for _ in range(60):
        state = torch.randn(64, 6)
        policy = torch.distributions.Categorical(logits=model(state))
        action = policy.sample()
        reward = (action == (state @ best).argmax(1)).float()
        opt.zero_grad()
        advantage = reward - reward.mean()
        opt.observe(-(policy.log_prob(action) * advantage).mean()).backward()
        opt.step()
        costs.append(1 - float(reward.mean()))
    return [sum(costs[:5]) / 5, sum(costs[-10:]) / 10]


@script("a loss without curvature (L1, Dice, margins)")
def absolute() -> list[float]:
    model, loss_fn, (x, _) = net(1), nn.L1Loss(), data()
    target = x[:, :1] * x[:, 1:2]
    return steps(KFAC(model, loss_fn), lambda: loss_fn(model(x), target), 20)


@script("a loss written by hand")
def by_hand() -> list[float]:
    model, (x, y) = net(), data()
    opt, rows = KFAC(model), torch.arange(len(y))
    return steps(opt, lambda: opt.observe(-model(x).softmax(1).log()[rows, y].mean()))


@script("several processes")
def processes() -> list[float]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model, loss_fn, (x, y) = DistributedDataParallel(net()), nn.CrossEntropyLoss(), data()
        return steps(KFAC(model, loss_fn), lambda: loss_fn(model(x), y), 10)
    finally:
        torch.distributed.destroy_process_group()


def rows() -> list[str]:
    """Return the first column of the document's table."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in lines[1:]]


def test_every_row_is_run() -> None:
    assert sorted(rows()) == sorted([*SCRIPTS, *ECOSYSTEM])


@pytest.mark.parametrize("row", SCRIPTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_row(row: str) -> None:
    losses = SCRIPTS[row]()
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.9 * losses[0]
