"""The neural tangent kernel of a CNN, and what its spectrum predicts about gradient descent.

`J J^T` for the Jacobian `J` of a network's outputs with respect to its weights is a sum over
layers of Gram matrices, which `convNd_gram` contracts without forming `J`. Under gradient descent
on the squared error the residual along an eigenvector with eigenvalue `l` shrinks by
`1 - lr l / N` in each step, as long as the network is close to its linearisation. The script
trains a network to tell even from odd digits, and compares.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from train_digits import split_digits

from einconv_kfac.expressions import convNd_gram


def build_network(width: int, seed: int) -> nn.Sequential:
    """Return a network of two convolutions and a linear layer, with one output."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, 1),
    )


def layer_kernel(module: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    """Return a layer's part ``[n, n]``, from its input and the gradients of the outputs there."""
    if isinstance(module, nn.Linear):
        return (a @ a.T + 1) * (g @ g.T)
    assert isinstance(module, nn.Conv2d)
    equation, operands, shape = convNd_gram.einsum_expression(
        a, g[None], module.kernel_size, module.dilation, module.padding, module.stride
    )
    bias = g.flatten(2).sum(2)
    return torch.einsum(equation, *operands).reshape(shape) + bias @ bias.T


def tangent_kernel(model: nn.Module, x: Tensor) -> Tensor:
    """Return the neural tangent kernel ``[n, n]`` of a network with one output."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [
        m.register_forward_hook(lambda m, inputs, out: calls.append((m, inputs[0], out)))
        for m in model.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    output = model(x).sum()
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(output, [out for _, _, out in calls])
    layers = [layer_kernel(m, a.detach(), g) for (m, a, _), g in zip(calls, gradients)]
    return torch.stack(layers).sum(0)


def residuals(model: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int) -> Tensor:
    """Train by gradient descent on the mean squared error; return residuals ``[steps + 1, n]``."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    rows = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        residual = model(x)[:, 0] - y
        rows.append(residual.detach())
        (residual.square().mean() / 2).backward()
        optimizer.step()
    return torch.stack(rows)


def draw(values: Tensor, measured: Tensor, predicted: Tensor, path: Path) -> None:
    """Save the spectrum, and the residual along some eigenvectors over time."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(range(1, len(values) + 1), values.clamp_min(1e-12).tolist())
    left.set(xlabel="index", ylabel="eigenvalue", title="spectrum of the kernel")
    for index, color in zip((0, 1, 3, 9, 29), ("C0", "C1", "C2", "C3", "C4")):
        right.plot(measured[:, index].abs().tolist(), color=color, label=f"eigenvector {index + 1}")
        right.plot(predicted[:, index].abs().tolist(), color=color, linestyle="--", linewidth=1)
    right.set(yscale="log", xlabel="step", ylabel="residual", ylim=(0.01, None))
    right.set(title="measured, and predicted (dashed)")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example, and return the numbers that it prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=200, help="training images (200)")
    parser.add_argument("--width", type=int, default=128, help="channels (128)")
    parser.add_argument("--steps", type=int, default=60, help="steps of gradient descent (60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (0)")
    parser.add_argument("--output", type=Path, help="write a picture")
    options = parser.parse_args(arguments)
    data = split_digits(options.seed)
    x, y = data.x[: options.images], 1.0 - 2.0 * (data.y[: options.images] % 2)
    model = build_network(options.width, options.seed)
    values, vectors = torch.linalg.eigh(tangent_kernel(model, x).double())
    values, vectors = values.flip(0), vectors.flip(1)
    lr = len(x) / (2 * float(values[0]))  # half of the largest that does not oscillate
    measured = residuals(model, x, y, lr, options.steps).double() @ vectors
    time = torch.arange(options.steps + 1)[:, None]
    predicted = (1 - lr / len(x) * values) ** time * measured[0]
    mass = values.cumsum(0) / values.sum()
    error = float((measured - predicted).norm() / predicted.norm())
    print(f"of the trace, the first eigenvalue has {mass[0]:.1%}, the first ten {mass[9]:.1%}")
    print(f"after {options.steps} steps the squared residual is", end=" ")
    print(f"{measured[-1].square().mean():.4f}, predicted {predicted[-1].square().mean():.4f}")
    print(f"relative difference of all residuals over time: {error:.1%}")
    if options.output:
        draw(values, measured, predicted, options.output)
    return {"first": float(mass[0]), "error": error, "loss": float(measured[-1].square().mean())}


if __name__ == "__main__":
    main()
