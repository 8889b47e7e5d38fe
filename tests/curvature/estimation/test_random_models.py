"""Random small models: whatever torch runs has exact diagonals, and nothing is left behind."""

from __future__ import annotations

import torch
from ggn import dense_ggn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from einconv_kfac.curvature import coverage, kronecker_factors

LAYERS = ("conv", "up", "norm", "group", "act", "pool")


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A chain of layers on 1-d or 2-d inputs, with a linear head, and a batch."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    dimensions = draw(st.integers(1, 2))
    conv, up = ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d))[dimensions - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d)[dimensions - 1]
    layers: list[nn.Module] = []
    for kind in draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4)):
        groups, bias = draw(st.sampled_from((1, 2, 4))), draw(st.booleans())
        kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        if kind == "conv":
            mode = draw(st.sampled_from(("zeros", "circular", "replicate")))
            layers.append(
                conv(4, 4, kernel, stride, 2, draw(st.integers(1, 2)), groups, bias, mode)
            )
        elif kind == "up":
            layers.append(up(4, 4, kernel, stride, groups=groups, bias=bias))
        else:
            layers.append(
                {
                    "norm": norm(4).eval(),
                    "group": nn.GroupNorm(2, 4),
                    "act": nn.Tanh(),
                    "pool": nn.ReLU(inplace=True),
                }[kind]
            )
    x = torch.randn(draw(st.integers(1, 3)), 4, *[4] * dimensions, dtype=torch.float64)
    body = nn.Sequential(*layers).double()
    head = nn.Linear(body(x).flatten(1).shape[1], 3).double()
    model = nn.Sequential(conv(4, 4, 1).double(), *body, nn.Flatten(), head)
    return model, x, torch.randint(3, (len(x),))


@settings(max_examples=15)
@given(models(), st.sampled_from(("mean", "sum")), st.sampled_from(("expand", "reduce")))
def test_corrected_blocks_keep_the_exact_trace(
    problem: tuple[nn.Sequential, Tensor, Tensor], reduction: str, approximation: str
) -> None:
    (model, x, y), loss_fn = problem, nn.CrossEntropyLoss(reduction=reduction)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"fisher": "exact", "approximation": approximation}
    diagonal = kronecker_factors(model, loss_fn, [(x, y)], kind="diagonal", **options)
    corrected = kronecker_factors(model, loss_fn, [(x, y)], kind="ekfac", **options)
    factored = kronecker_factors(model, loss_fn, [(x, y)], **options)
    assert not coverage(model).gaps()
    for name, block in diagonal.items():
        exact = dense_ggn(model, loss_fn, x, y, name).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(block.values.flatten(1), exact, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(
            corrected[name].values.sum((1, 2)), exact.sum(1), rtol=1e-7, atol=1e-10
        )
        for factor in (factored[name].A, factored[name].B):
            assert torch.equal(factor, factor.mT)
            assert torch.linalg.eigvalsh(factor).min() > -1e-9 * (1 + factor.abs().max())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
