"""A Laplace approximation of a convolutional network, from its Kronecker factors.

A network trained on a few handwritten digits is overconfident. The posterior of its weights is
approximated by a Gaussian around them, whose precision is the Kronecker-factored curvature of the
loss plus that of the prior. The prior is chosen on held-out images. Predictions are averages over
the linearised network. The script prints accuracy, loss and expected calibration error before and
after, on images that are noisier than the training images, and saves reliability diagrams.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.func import functional_call, jvp
from tqdm import tqdm

from einconv_kfac.curvature import KroneckerFactors, kronecker_factors

BINS = 15
PRIORS = (10.0, 31.6, 100.0, 316.0, 1000.0, 3160.0, 10000.0)  # precisions to choose from


def split_digits(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``count`` training images ``[N, 1, 8, 8]`` in [0, 1], their digits, and the rest."""
    images, digits = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y, order = torch.tensor(digits), torch.randperm(len(x), generator=Generator().manual_seed(seed))
    x, y = x[order], y[order]
    return x[:count], y[:count], x[count:], y[count:]


def build_network(seed: int) -> nn.Sequential:
    """Return a network of three convolutions, one of them strided and one grouped."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Fit the model by full-batch Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in tqdm(range(steps), desc="training"):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def choose_prior(
    model: nn.Module, curvature: KroneckerFactors, x: Tensor, y: Tensor, samples: int
) -> float:
    """Return the prior precision with the smallest loss on held-out images."""
    best, lowest = PRIORS[0], float("inf")
    for prior in tqdm(PRIORS, desc="prior"):
        loss = summary(predict(model, curvature, prior, x, samples), y)["loss"]
        if loss < lowest:
            best, lowest = prior, loss
    return best


@torch.no_grad()
def predict(
    model: nn.Module, curvature: KroneckerFactors, prior: float, x: Tensor, samples: int
) -> Tensor:
    """Return class probabilities ``[n, c]``, averaged over the linearised network."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    draws = curvature.sample(samples, damping=prior, generator=Generator().manual_seed(0))
    total = torch.zeros(len(x), 10)
    for index in range(samples):
        direction = {name: draw[index] for name, draw in draws.items()}
        output, tangent, *_ = jvp(
            lambda w: functional_call(model, w, (x,)), (weights,), (direction,)
        )
        total += (output + tangent).softmax(dim=1)
    return total / samples


def reliability(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the share of predictions, mean confidence and accuracy, per bin of confidence."""
    confidence, predicted = p.max(dim=1)
    index = (confidence * BINS).long().clamp_max(BINS - 1)
    onehot = nn.functional.one_hot(index, BINS).to(p)
    count = onehot.sum(0)
    right = (predicted == y).to(p)
    return count / len(p), confidence @ onehot / count, right @ onehot / count


def calibration_error(p: Tensor, y: Tensor) -> float:
    """Return the expected calibration error: the mean gap between confidence and accuracy."""
    share, confidence, accuracy = reliability(p, y)
    return float((share * (confidence - accuracy).abs()).nansum())


def summary(p: Tensor, y: Tensor) -> dict[str, float]:
    """Return accuracy, negative log-likelihood and expected calibration error."""
    loss = nn.functional.nll_loss(p.clamp_min(1e-12).log(), y)
    accuracy = (p.argmax(1) == y).float().mean()
    return {"accuracy": float(accuracy), "loss": float(loss), "ece": calibration_error(p, y)}


def draw(predictions: dict[str, Tensor], y: Tensor, path: Path) -> None:
    """Save reliability diagrams side by side."""
    figure = Figure(figsize=(4.2 * len(predictions), 4.2), layout="constrained")
    for axes, (title, p) in zip(figure.subplots(1, len(predictions)), predictions.items()):
        share, confidence, accuracy = reliability(p, y)
        filled = share > 0
        axes.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1)
        axes.scatter(confidence[filled], accuracy[filled], s=20 + 900 * share[filled], alpha=0.6)
        axes.plot(confidence[filled], accuracy[filled], linewidth=1)
        axes.set(title=f"{title}: calibration error {calibration_error(p, y):.3f}")
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.05), ylim=(-0.05, 1.05))
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the example, and return the numbers that it prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=150, help="training images (150)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (200)")
    parser.add_argument("--samples", type=int, default=100, help="posterior samples (100)")
    parser.add_argument("--noise", type=float, default=0.2, help="noise on test images (0.2)")
    parser.add_argument("--seed", type=int, default=0, help="split and initial weights (0)")
    parser.add_argument("--output", type=Path, default=Path("reliability.png"), help="the picture")
    options = parser.parse_args(arguments)
    x, y, x_test, y_test = split_digits(options.seed, options.images)
    generator = Generator().manual_seed(options.seed)
    x_test = x_test + options.noise * torch.randn(x_test.shape, generator=generator)
    held_out, y_held_out, x_test, y_test = x_test[:200], y_test[:200], x_test[200:], y_test[200:]
    model = build_network(options.seed)
    train(model, x, y, options.steps)
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    curvature = kronecker_factors(model, loss_fn, [(x, y)], fisher="exact", progress=True).eigh()
    prior = choose_prior(model, curvature, held_out, y_held_out, options.samples // 4)
    predictions = {
        "network": model(x_test).detach().softmax(dim=1),
        "Laplace": predict(model, curvature, prior, x_test, options.samples),
    }
    results = {name: summary(p, y_test) for name, p in predictions.items()}
    print(f"{len(x)} training and {len(x_test)} test images; prior precision {prior:.3g}")
    for name, row in results.items():
        numbers = "  ".join(f"{key} {value:.4f}" for key, value in row.items())
        print(f"{name:8}  {numbers}")
    draw(predictions, y_test, options.output)
    print(f"picture: {options.output}")
    return results


if __name__ == "__main__":
    main()
