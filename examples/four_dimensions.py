"""Match the pixels of two images by a network of 4-d convolutions.

Every pixel `(i, j)` of one image may match every pixel `(k, l)` of the other one. Their
similarities form a tensor with four dimensions, in which a right match is supported by its
neighbours `(i + a, j + b, k + a, l + b)`. Rocco et al. (2018) learn to see that with 4-d
convolutions. Here the second image is a shifted digit, and both have noise. Pixels are compared by
the 3x3 pixels around them, which alone are ambiguous.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.nn import functional
from train_digits import split_digits

from einconv_kfac import KFAC
from einconv_kfac.modules import ConvNd

SIZE, SHIFT = 8, 2  # pixels per side, and by how many of them the second image is shifted at most


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines ``[n, 1, i, j, k, l]`` of all pairs of 3x3 patches."""
    patches = [functional.unfold(image, 3, padding=1) for image in (first, second)]
    patches = [functional.normalize(p - p.mean(1, keepdim=True), dim=1) for p in patches]
    pairs = torch.einsum("ncp,ncq->npq", *patches)
    return pairs.reshape(len(first), 1, SIZE, SIZE, SIZE, SIZE)


def shifted_pairs(images: Tensor, noise: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return similarities, and the right match ``[n, i, j]`` or -100 where it is not in view."""
    shifts = torch.randint(-SHIFT, SHIFT + 1, (len(images), 2), generator=generator)
    padded = functional.pad(images, [SHIFT] * 4)
    rows, columns = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None, :]
    moved, targets = [], []
    for image, (down, right) in zip(padded, shifts.tolist()):
        y, x = SHIFT - down, SHIFT - right
        moved.append(image[:, y : y + SIZE, x : x + SIZE])
        k, m = rows + down, columns + right
        inside = (k >= 0) & (k < SIZE) & (m >= 0) & (m < SIZE)
        targets.append(torch.where(inside, k * SIZE + m, -100))
    second = torch.stack(moved)
    first = images + noise * torch.randn(images.shape, generator=generator)
    second = second + noise * torch.randn(images.shape, generator=generator)
    return similarities(first, second), torch.stack(targets)


class Matcher(nn.Module):
    """Two 4-d convolutions; the output ``[n, (k l), i, j]`` has a score for each match."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ConvNd(4, 1, channels, 3, padding=1),
            nn.ReLU(),
            ConvNd(4, channels, 1, 3, padding=1),
        )

    def forward(self, pairs: Tensor) -> Tensor:
        """Score all matches."""
        scores: Tensor = pairs + self.layers(pairs)
        return scores.reshape(-1, SIZE, SIZE, SIZE * SIZE).movedim(-1, 1) * 10


@torch.no_grad()
def accuracy(scores: Tensor, target: Tensor) -> float:
    """Return the share of right matches, among the pixels that are in view in both images."""
    seen = target >= 0
    return float((scores.argmax(1) == target)[seen].float().mean())


def draw(curve: dict[int, float], before: float, path: Path) -> None:
    """Save the accuracy over the steps."""
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(curve), list(curve.values()), marker="o", label="two 4-d convolutions")
    axes.axhline(before, color="gray", linestyle="--", label="most similar patch")
    axes.set(xlabel="step", ylabel="right matches", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example, and return the accuracies that it prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=25, help="training steps (25)")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per step (16)")
    parser.add_argument("--channels", type=int, default=4, help="channels between layers (4)")
    parser.add_argument("--noise", type=float, default=0.1, help="noise on all pixels (0.1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (0)")
    parser.add_argument("--output", type=Path, help="write a picture")
    options = parser.parse_args(arguments)
    data, generator = split_digits(options.seed), Generator().manual_seed(options.seed)
    pairs, target = shifted_pairs(data.x_test[:32], options.noise, generator)
    before = accuracy(pairs.reshape(-1, SIZE, SIZE, SIZE * SIZE).movedim(-1, 1), target)
    torch.manual_seed(options.seed)
    model, loss_fn = Matcher(options.channels), nn.CrossEntropyLoss()
    optimizer, curve = KFAC(model, loss_fn), {0: accuracy(model(pairs), target)}
    for step in range(1, options.steps + 1):
        images = data.x[torch.randint(len(data.x), (options.batch_size,), generator=generator)]
        x, y = shifted_pairs(images, options.noise, generator)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        if step % 5 == 0 or step == options.steps:
            curve[step] = accuracy(model(pairs), target)
    after = curve[options.steps]
    print(f"right matches: {before:.1%} by similarity, {after:.1%} after 4-d convolutions")
    if options.output:
        draw(curve, before, options.output)
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
