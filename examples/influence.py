"""Which training examples is a prediction of a transformer due to? Influence functions by EKFAC.

Removing the training example `z` changes the loss on a test example `t` by about
`g_t (G + damping)^-1 g_z / N`, with the gradients `g` and the Gauss-Newton matrix `G`. Grosse et
al. (2023) take `G` from EKFAC to study language models. A small transformer reads digits row by
row. For some test images the 10 most helpful training images are removed, and the network is
trained again. The loss on the test image grows more than after removing 10 random images. Removing
the 10 images of the same class that look most alike hurts even more: influences are estimates of
first order, and such a removal is large.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from train_digits import Split, split_digits

from einconv_kfac import KFAC, kronecker_factors

Gradients = dict[str, Tensor]


class Transformer(nn.Module):
    """Attention between rows, two layers on each row, and class scores of their mean."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(0.5 * torch.randn(8, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``[n, 10]`` of images ``[n, 1, 8, 8]``."""
        h = self.embed(x[:, 0]) + self.place  # [n, 8, width]
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = h + self.outer(torch.relu(self.inner(h)))
        scores: Tensor = self.head(h.mean(1))
        return scores


def trained(x: Tensor, y: Tensor, steps: int, seed: int) -> nn.Module:
    """Return a transformer that is trained on all images in each step."""
    torch.manual_seed(seed)
    model, loss_fn = Transformer(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    optimizer.remove_hooks()
    return model


def example_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    """Return the gradient of each example's loss, ``[n, *shape]`` per parameter."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: Gradients, x: Tensor, y: Tensor) -> Tensor:
        scores = functional_call(model, weights, (x[None],))
        return cross_entropy(scores, y[None])

    with sdpa_kernel(SDPBackend.MATH):  # the others have no rule for vmap
        gradients: Gradients = vmap(grad(loss), (None, 0, 0))(weights, x, y)
    return gradients


def influences(model: nn.Module, data: Split, tests: Tensor, damping: float) -> Tensor:
    """Return by how much each training image lowers the loss on each test image, ``[t, n]``."""
    curvature = kronecker_factors(
        model, nn.CrossEntropyLoss(), [(data.x, data.y)], fisher="exact", kind="ekfac"
    )
    train = example_gradients(model, data.x, data.y)
    test = example_gradients(model, data.x_test[tests], data.y_test[tests])
    covered = curvature.parameters  # all but the embedding of places
    solved = curvature.solve({name: test[name] for name in covered}, damping)
    parts = [solved[name].flatten(1) @ train[name].flatten(1).T for name in covered]
    return torch.stack(parts).sum(0) / len(data.x)


def alike(data: Split, tests: Tensor) -> Tensor:
    """Return how close each training image is to each test image, ``[t, n]``, by class first."""
    distances = torch.cdist(data.x_test[tests].flatten(1), data.x.flatten(1))
    same = data.y_test[tests][:, None] == data.y[None, :]
    return 1000.0 * same - distances


def growth(data: Split, test: int, score: Tensor, options: argparse.Namespace) -> float:
    """Return the loss on a test image after training without the images with the highest score."""
    kept = score.argsort(descending=True)[options.removed :]
    model = trained(data.x[kept], data.y[kept], options.steps, options.seed)
    x, y = data.x_test[test : test + 1], data.y_test[test : test + 1]
    return float(cross_entropy(model(x), y).detach())


def draw(data: Split, tests: Tensor, scores: Tensor, path: Path) -> None:
    """Save test images, each with the training images that helped and harmed it most."""
    figure = Figure(figsize=(8, 1.1 * len(tests)), layout="constrained")
    for row, (panels, test) in enumerate(
        zip(figure.subplots(len(tests), 9, squeeze=False), tests.tolist())
    ):
        order = scores[row].argsort(descending=True).tolist()
        images = [(f"test: {data.y_test[test]}", data.x_test[test])]
        images += [(f"helps: {data.y[i]}", data.x[i]) for i in order[:5]]
        images += [(f"harms: {data.y[i]}", data.x[i]) for i in order[:-4:-1]]
        for axes, (title, image) in zip(panels, images):
            axes.imshow(image[0].tolist(), cmap="gray_r")
            axes.set_title(title, fontsize=7)
            axes.axis("off")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example, and return the mean losses that it prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=200, help="training images (200)")
    parser.add_argument("--tests", type=int, default=4, help="test images (4)")
    parser.add_argument("--removed", type=int, default=10, help="images to remove (10)")
    parser.add_argument("--steps", type=int, default=40, help="training steps (40)")
    parser.add_argument("--damping", type=float, default=1e-3, help="damping of the inverse (1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (0)")
    parser.add_argument("--output", type=Path, help="write a picture")
    options = parser.parse_args(arguments)
    whole = split_digits(options.seed)
    data = Split(whole.x[: options.images], whole.y[: options.images], whole.x_test, whole.y_test)
    tests = torch.arange(options.tests)
    model = trained(data.x, data.y, options.steps, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    scores = {
        "influence": influences(model, data, tests, options.damping),
        "same class, alike": alike(data, tests),
        "random": torch.rand(len(tests), len(data.x), generator=generator),
    }
    nothing = cross_entropy(model(data.x_test[tests]), data.y_test[tests])
    losses = {"nothing": float(nothing.detach())}
    for name, rows in scores.items():
        losses[name] = fmean(growth(data, t, row, options) for t, row in enumerate(rows))
    print(f"loss on a test image, after {options.removed} of {len(data.x)} images were removed by")
    for name, loss in losses.items():
        print(f"{name:18} {loss:.3f}")
    if options.output:
        draw(data, tests, scores["influence"], options.output)
    return losses


if __name__ == "__main__":
    main()
