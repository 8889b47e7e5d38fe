"""The examples of the gallery, with small settings: each shows what its first sentence says."""

from __future__ import annotations

from pathlib import Path

import continual_learning
import curvature_spectrum
import four_dimensions
import gradient_norms
import influence
import neural_tangent_kernel
import pruning
import pytest
import torch
import train_digits
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return tmp_path / "picture.png"


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_large_gradients_find_wrong_labels(picture):
    found = gradient_norms.main(["--steps", "6", "--output", str(picture)])
    assert found["found"] > 5 * found["share"]
    assert is_picture(picture)


def test_gradient_norms_are_those_of_autograd():
    data, model = train_digits.split_digits(seed=0), train_digits.build_network(seed=0).double()
    x, y = data.x[:5].double(), data.y[:5]

    def loss(weights, x, y):
        return cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    weights = {name: p.detach() for name, p in model.named_parameters()}
    gradients = vmap(grad(loss), (None, 0, 0))(weights, x, y)
    expected = sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()
    torch.testing.assert_close(gradient_norms.gradient_norms(model, x, y), expected)


def test_kernel_is_that_of_autograd():
    model = neural_tangent_kernel.build_network(width=3, seed=0).double()
    x = train_digits.split_digits(seed=0).x[:6].double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = jacrev(lambda weights: functional_call(model, weights, (x,))[:, 0])(weights)
    rows = torch.cat([part.flatten(1) for part in jacobian.values()], dim=1)
    torch.testing.assert_close(neural_tangent_kernel.tangent_kernel(model, x), rows @ rows.T)


def test_kernel_predicts_training(picture):
    options = ["--images", "60", "--width", "64", "--steps", "20", "--output", str(picture)]
    result = neural_tangent_kernel.main(options)
    assert result["error"] < 0.25
    assert is_picture(picture)


def test_pruning_by_curvature_keeps_more(picture):
    curves = pruning.main(["--steps", "12", "--output", str(picture)])
    start, *_ = curves["Gauss-Newton"]
    at = pruning.SHARES.index(0.7)
    assert start > 0.9
    assert curves["Gauss-Newton"][at] > curves["magnitude"][at] + 0.05
    assert curves["magnitude"][at] >= curves["random"][at]
    assert is_picture(picture)


def test_curvature_prevents_forgetting(picture):
    options = ["--tasks", "3", "--steps", "60", "--output", str(picture)]
    last = {name: rows[-1] for name, rows in continual_learning.main(options).items()}
    assert sum(last["curvature"]) > sum(last["distance"]) + 0.3
    assert sum(last["curvature"]) > sum(last["none"]) + 0.3
    assert is_picture(picture)


def test_four_dimensions_find_more_matches(picture):
    options = ["--steps", "8", "--batch-size", "4", "--channels", "2", "--output", str(picture)]
    found = four_dimensions.main(options)
    assert found["after"] > found["before"] + 0.01
    assert is_picture(picture)


def test_targets_are_the_shifted_pixels():
    images = torch.rand(3, 1, 8, 8)
    pairs, target = four_dimensions.shifted_pairs(images, 0.0, torch.Generator().manual_seed(1))
    scores = pairs.reshape(3, 8, 8, 64).movedim(-1, 1)
    inner = torch.full_like(target, -100)  # where whole patches are in view
    inner[:, 3:5, 3:5] = target[:, 3:5, 3:5]
    assert four_dimensions.accuracy(scores, inner) == 1


def test_influence_is_that_of_dense_algebra():
    data = train_digits.split_digits(seed=0)
    part = train_digits.Split(data.x[:40], data.y[:40], data.x_test, data.y_test)
    torch.manual_seed(0)
    model, tests = influence.Transformer(width=4), torch.arange(3)
    found = influence.influences(model, part, tests, damping=0.1)
    curvature = influence.kronecker_factors(
        model, torch.nn.CrossEntropyLoss(), [(part.x, part.y)], fisher="exact", kind="ekfac"
    )
    train = influence.example_gradients(model, part.x, part.y)
    test = influence.example_gradients(model, data.x_test[tests], data.y_test[tests])
    expected = torch.zeros(3, 40)
    for block in curvature.values():
        left, right = (
            torch.cat([g[name].flatten(1) for name in block.parameters], 1) for g in (test, train)
        )
        columns = [block.layout.from_matrix(row) for row in identity(block)]
        order = torch.stack(
            [torch.cat([c[name].flatten() for name in block.parameters]) for c in columns]
        )
        dense = order.T @ block_diagonal(block.to_dense()) @ order
        solved = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense)), left.T)
        expected += solved.T @ right.T / 40
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def identity(block):
    g, rows, columns = block.layout.shape
    return torch.eye(g * rows * columns).reshape(-1, g, rows, columns)


def block_diagonal(dense):
    return torch.block_diag(*dense)


def test_removing_influential_images_hurts_most(picture):
    options = ["--images", "100", "--tests", "1", "--removed", "10", "--steps", "8"]
    losses = influence.main([*options, "--output", str(picture)])
    assert losses["influence"] > losses["random"]
    assert is_picture(picture)


def test_spectra_agree(picture):
    options = ["--images", "60", "--steps", "3", "--vectors", "15", "--output", str(picture)]
    results = curvature_spectrum.main(options)
    exact = results["exact"]["largest"]
    for name in ("kfac", "ekfac"):
        assert 0.5 * exact < results[name]["largest"] < 1.5 * exact
    assert is_picture(picture)
