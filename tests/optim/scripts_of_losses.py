"""Rows of docs/scripts.md about losses."""

from __future__ import annotations

from typing import Any

import torch
from documented_scripts import data, net, script, steps
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC


@script("a loss module on the output")
def module() -> list[float]:
    model, loss_fn, (x, y) = net(), nn.CrossEntropyLoss(), data()
    return steps(KFAC(model, loss_fn), lambda: loss_fn(model(x), y))


@script("a functional loss")
def functional_loss() -> list[float]:
    model, (x, y) = net(), data()
    opt = KFAC(model)
    return steps(opt, lambda: opt.observe(functional.cross_entropy(model(x), y)))


@script(
    "a model that computes its losses (`logits, loss = model(x, y)`, a mapping of losses that the "
    "loop adds up with weights)"
)
def returned_losses() -> list[float]:
    class Both(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.net, self.name = net(), name

        def forward(self, x: Tensor, y: Tensor) -> Any:
            scores = self.net(x)
            loss = functional.cross_entropy(scores, y)
            small = scores.square().mean()
            return (scores, loss) if self.name == "pair" else {"class": loss, "size": small}

    pair, parts, (x, y) = Both("pair"), Both("parts"), data()
    first = steps(KFAC(pair), lambda: pair(x, y)[1])
    opt = KFAC(parts)
    weights = {"class": 1.0, "size": 1e-3}

    def total() -> Tensor:
        return torch.stack([weights[name] * own for name, own in parts(x, y).items()]).sum()

    return max(first, steps(opt, total), key=lambda losses: losses[-1])


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


@script("a loss of several calls (Siamese networks, triplets, contrastive pairs, consistency)")
def several_calls() -> list[float]:
    model, (x, _) = net(8), data()
    loss_fn = nn.TripletMarginLoss(margin=0.5)
    near, far = x + 0.1 * x.flip(1), x.roll(1, 0)
    return steps(KFAC(model, loss_fn), lambda: loss_fn(model(x), model(near), model(far)))


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


class Coupling(nn.Module):
    """A flow of one coupling, which scales and shifts half of the entries."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 6))

    def forward(self, x: Tensor) -> Tensor:
        """Return log-densities ``[n]``."""
        fixed, moved = x.chunk(2, 1)
        scale, shift = self.net(fixed).chunk(2, 1)
        z = torch.cat([fixed, moved * scale.exp() + shift], 1)
        base: Tensor = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
        return base + scale.sum(1)


@script("a normalising flow")
def flow() -> list[float]:
    model, (x, _) = Coupling(), data()
    x = torch.cat([x[:, :3], 3 * x[:, :3] + 0.3 * x[:, 3:]], 1)
    opt = KFAC(model)
    return steps(opt, lambda: opt.observe(-model(x).mean()), 10)


@script("a loss without curvature (L1, hinges, quantiles, Dice)")
def absolute() -> list[float]:
    model, loss_fn, (x, _) = net(1), nn.L1Loss(), data()
    target = x[:, :1] * x[:, 1:2]
    return steps(KFAC(model, loss_fn), lambda: loss_fn(model(x), target), 20)


@script("a loss written by hand")
def by_hand() -> list[float]:
    model, (x, y) = net(), data()
    opt, rows = KFAC(model), torch.arange(len(y))
    return steps(opt, lambda: opt.observe(-model(x).softmax(1).log()[rows, y].mean()))


@script(
    "distributions that are compared (Jensen-Shannon of several views, R-drop, distillation in "
    "reverse, entropies)"
)
def compared_views() -> list[float]:
    model, (x, y) = net(), data()
    opt = KFAC(model)

    def loss() -> Tensor:
        scores = model(torch.cat([x, x + 0.1 * x.flip(1)]))
        views = [each.softmax(1) for each in scores.split(len(x))]
        mean = torch.stack(views).mean(0).clamp(1e-7, 1).log()
        apart = sum(functional.kl_div(mean, p, reduction="batchmean") for p in views) / 2
        return opt.observe(functional.cross_entropy(scores[: len(x)], y) + 12 * apart)

    return steps(opt, loss)
