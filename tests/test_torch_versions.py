"""Questions to torch that its versions answer in different ways."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from einconv_kfac.torch_versions import is_packed

X = torch.randn(3, 4, requires_grad=True)


def older(node: Any) -> Any:
    """Return what stands for a node of a version of torch in which saved tensors tell less."""
    names = [name for name in dir(node) if name.startswith("_raw_saved_")]
    saved = {name: getattr(node, name) for name in names}
    several = {n: each if isinstance(each, tuple) else (each,) for n, each in saved.items()}
    known = {
        name: tuple(SimpleNamespace(register_hooks=own.register_hooks) for own in each)
        for name, each in several.items()
    }
    return type("Node", (), known)()


def classes(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


@pytest.mark.parametrize("version", [older, lambda node: node])
def test_checkpoints_pack_what_operations_save(version: Any) -> None:
    packed = checkpoint(classes, X * 1, use_reentrant=False)
    for tensor in (classes(X), X[[0, 2]], X * 2, torch.nn.functional.nll_loss(X, torch.arange(3))):
        assert not is_packed(version(tensor.grad_fn))
        tensor.sum().backward()
    assert is_packed(version(packed.grad_fn))
