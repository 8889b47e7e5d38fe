"""Models of the layers in ONNX, evaluated by its reference implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from einconv_kfac.modules import ConvNd, ConvTransposeNd, FoldNd, UnfoldNd


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (
            nn.Sequential(
                ConvNd(2, 2, 4, 3, padding="same", padding_mode="reflect"),
                ConvNd(2, 4, 4, 3, stride=2, padding=((0, 1), (2, 0)), groups=2),
                ConvTransposeNd(2, 4, 2, 3, 2, ((1, 0), (0, 1)), 1),
            ),
            (2, 2, 7, 8),
        ),
        (ConvNd(4, 2, 3, 2, padding=1), (2, 2, 3, 4, 3, 3)),
        (nn.Sequential(UnfoldNd(3, padding=1), FoldNd((5, 6), 3, padding=1)), (2, 3, 5, 6)),
    ],
)
def test_export(layer: nn.Module, shape: tuple[int, ...]) -> None:
    pytest.importorskip("onnxscript")
    reference: Any = pytest.importorskip("onnx.reference")
    x = torch.randn(shape)
    program = torch.onnx.export(layer.eval(), (x,), dynamo=True, verbose=False)
    assert program is not None
    evaluator = reference.ReferenceEvaluator(program.model_proto)
    (found,) = evaluator.run(None, {program.model_proto.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), layer(x).detach(), rtol=1e-4, atol=1e-4)
