"""Find wrong labels by the norm of each example's gradient, without storing one gradient.

The squared norm of an example's gradient is a contraction of a layer's inputs and output gradients
(`convNd_gradient_norm`), so that one backward pass is enough for all examples. A network trained
for a few epochs on digits, some of which have a wrong label, fits the right labels first: the
examples with the largest gradients are mostly the mislabelled ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from train_digits import Split, batches, build_network, split_digits

from einconv_kfac import KFAC
from einconv_kfac.expressions import convNd_gradient_norm


def layer_tensors(model: nn.Module, x: Tensor, y: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Return each layer with its input and the gradient of the summed loss at its output."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [
        m.register_forward_hook(lambda m, inputs, out: calls.append((m, inputs[0], out)))
        for m in layers
    ]
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(loss, [out for _, _, out in calls])
    return [(m, a.detach(), g) for (m, a, _), g in zip(calls, gradients)]


def weight_norm(module: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    """Return the squared norm ``[n]`` of the gradient with respect to the layer's weight."""
    if isinstance(module, nn.Linear):
        return a.square().sum(1) * g.square().sum(1)
    assert isinstance(module, nn.Conv2d)
    equation, operands, shape = convNd_gradient_norm.einsum_expression(
        a, g, module.kernel_size, module.dilation, module.padding, module.stride, module.groups
    )
    return torch.einsum(equation, *operands).reshape(shape)


def gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the norm ``[n]`` of each example's gradient of the cross entropy."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for module, a, g in layer_tensors(model, x, y):
        bias = g.flatten(2).sum(2) if g.ndim > 2 else g
        total += weight_norm(module, a, g) + bias.square().sum(1)
    return total.sqrt()


def with_wrong_labels(data: Split, share: float, seed: int) -> tuple[Split, Tensor]:
    """Return the data with a share of wrong labels, and a mask of these."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(data.y), generator=generator) < share
    shift = torch.randint(1, 10, data.y.shape, generator=generator)
    y = torch.where(wrong, (data.y + shift) % 10, data.y)
    return Split(data.x, y, data.x_test, data.y_test), wrong


def draw(norms: Tensor, wrong: Tensor, path: Path) -> None:
    """Save histograms of the norms of right and wrong labels."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    bins = torch.logspace(-2, 2.5, 46).tolist()
    for mask, label in ((~wrong, "right label"), (wrong, "wrong label")):
        axes.hist(norms[mask].clamp_min(0.011).tolist(), bins, alpha=0.7, label=label)
    axes.set(xscale="log", yscale="log", xlabel="norm of the gradient", ylabel="examples")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example, and return the numbers that it prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=12, help="training steps (12)")
    parser.add_argument("--share", type=float, default=0.05, help="share of wrong labels (0.05)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (0)")
    parser.add_argument("--output", type=Path, help="write a picture")
    options = parser.parse_args(arguments)
    data, wrong = with_wrong_labels(split_digits(options.seed), options.share, options.seed)
    model, loss_fn = build_network(options.seed), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn)
    for x, y in islice(batches(data, 448, options.seed), options.steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    norms = gradient_norms(model, data.x, data.y)
    count = int(wrong.sum())
    found = float(wrong[norms.topk(count).indices].float().mean())
    print(f"{count} of {len(wrong)} labels are wrong; of the {count} examples with the largest")
    print(f"gradients {found:.0%} have a wrong label")
    print(f"median norm {norms[~wrong].median():.3f} (right), {norms[wrong].median():.3f} (wrong)")
    if options.output:
        draw(norms, wrong, options.output)
    return {"found": found, "share": count / len(wrong)}


if __name__ == "__main__":
    main()
