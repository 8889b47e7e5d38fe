"""Conversion to the linear operators of curvlinops (``pip install einconv-kfac[curvlinops]``)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.arguments import described
from einconv_kfac.curvature.blocks.block_diagonal import KroneckerFactors
from einconv_kfac.curvature.blocks.diagonal_factor import dense
from einconv_kfac.curvature.blocks.kronecker import KroneckerBlock
from einconv_kfac.curvature.module_arguments import check_module

try:
    from curvlinops import KFACLinearOperator
    from curvlinops._torch_base import PyTorchLinearOperator
except ImportError as error:
    raise ImportError(
        "This conversion needs curvlinops: pip install einconv-kfac[curvlinops]"
    ) from error


class CurvatureOperator(PyTorchLinearOperator):  # type: ignore[misc]
    """Curvature as an operator of curvlinops, for its spectra, traces and iterative inverses.

    It acts on lists of tensors in the order of ``curvature.parameters``.

    Args:
        curvature: The curvature, of any types of blocks.
        model: The model, whose parameters have the shapes of the tensors.
    """

    SELF_ADJOINT = True

    def __init__(self, curvature: KroneckerFactors, model: nn.Module) -> None:
        parameters = _parameters(curvature, model)
        self._like = [parameters[name] for name in curvature.parameters]
        self._curvature = curvature
        shapes = [tuple(parameter.shape) for parameter in self._like]
        super().__init__(shapes, shapes)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._like[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self._like[0].dtype

    def _matmat(self, columns: list[Tensor]) -> list[Tensor]:
        """Multiply with tensors ``[*shape, v]``."""
        vector = {n: x.movedim(-1, 0) for n, x in zip(self._curvature.parameters, columns)}
        result = self._curvature @ vector
        return [
            result[name].movedim(0, -1).to(column.dtype)
            for name, column in zip(self._curvature.parameters, columns)
        ]


def to_kfac_operator(curvature: KroneckerFactors, model: nn.Module) -> Any:
    """Return curvlinops' ``KFACLinearOperator`` with the given Kronecker factors.

    The operator supports trace, determinant, norm and `KFACInverseLinearOperator`. It acts on the
    parameters in the order of ``curvature.parameters``, on weight and bias jointly. Its ``B`` is
    that of the block times the block's scale. Its loss and data are placeholders.

    Args:
        curvature: Kronecker products without channel groups, of layers that curvlinops supports.
        model: The model.

    Raises:
        ImportError: If the version of curvlinops is another one than 3.
        ValueError: If a block is not such a product, or curvlinops does not support its layer.
    """
    if not hasattr(KFACLinearOperator, "_SUPPORTED_MODULES"):
        raise ImportError(
            "`to_kfac_operator` needs version 3 of curvlinops, got another one: "
            'pip install "curvlinops-for-pytorch<4". `CurvatureOperator` takes any version.'
        )
    parameters = _parameters(curvature, model)
    _check_convertible(curvature, model)
    operator = KFACLinearOperator(
        model,
        nn.MSELoss(),
        [parameters[name] for name in curvature.parameters],
        [(torch.zeros(1), torch.zeros(1))],
        check_deterministic=False,
        separate_weight_and_bias=False,
        num_per_example_loss_terms=1,
        num_data=1,
    )
    state = operator.state_dict()
    state["input_covariances"] = {name: dense(block.A)[0] for name, block in curvature.items()}
    scaled = {name: dense(block.B)[0] * block.scale for name, block in curvature.items()}
    state["gradient_covariances"] = scaled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading "overwrites" the parameters with themselves
        operator.load_state_dict(state)
    return operator


def _parameters(curvature: KroneckerFactors, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by name, which must have all that the curvature is of.

    Raises:
        TypeError: If one of the two is something else.
        ValueError: If the model lacks a parameter.
    """
    if not isinstance(curvature, KroneckerFactors):
        raise TypeError(f"`curvature` must be KroneckerFactors, got {described(curvature)}.")
    check_module(model, "to_kfac_operator(curvature, model)")
    parameters = dict(model.named_parameters())
    if missing := [name for name in curvature.parameters if name not in parameters]:
        raise ValueError(
            f"`model` must be the one that the curvature is of, got one without {missing}."
        )
    return parameters


def _check_convertible(curvature: Mapping[str, Any], model: nn.Module) -> None:
    """Raise a ``ValueError`` if curvlinops cannot represent a block."""
    for name, block in curvature.items():
        if not isinstance(block, KroneckerBlock) or len(block.A) > 1:
            raise ValueError(
                f"The block of '{name}' must be a Kronecker product without channel groups, got "
                f"{type(block).__name__} of {block.layout.shape}. `CurvatureOperator` takes any "
                "block."
            )
        module = model.get_submodule(name)
        if not isinstance(module, KFACLinearOperator._SUPPORTED_MODULES):
            raise ValueError(
                f"Layer '{name}' must be a type that curvlinops supports, got "
                f"{type(module).__name__}. `CurvatureOperator` takes any layer."
            )
