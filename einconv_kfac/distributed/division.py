"""How a model may be divided among workers."""

from __future__ import annotations

from typing import Any

from torch import nn

from einconv_kfac.distributed.stored import is_divided
from einconv_kfac.torch_versions import is_fully_sharded, parameter_groups

REMEDY = (
    "Call `fully_shard` on the layers and then on the model itself, with a mesh of one dimension, "
    "or use torch.nn.parallel.DistributedDataParallel."
)


def check_rows(model: nn.Module) -> None:
    """Raise a ``ValueError`` unless `fully_shard` divides all parameters of a model by rows.

    Args:
        model: The model, some parameter of which is a DTensor.
    """
    from torch.distributed.tensor import Shard  # noqa: PLC0415

    if not is_fully_sharded(model):
        name = next(n for n, p in model.named_parameters() if is_divided(p))
        raise ValueError(
            f"The parameters of a model must be whole tensors, got a DTensor for '{name}' though "
            f"`fully_shard` was not called on the {type(model).__name__} itself. {REMEDY}"
        )
    meshes = set()
    for name, parameter in model.named_parameters():
        own: Any = parameter
        if not is_divided(parameter):
            if parameter.requires_grad:
                raise ValueError(
                    f"`fully_shard` must divide all parameters that are trained, got '{name}', "
                    f"which each worker has for itself. Leave out `ignored_params`."
                )
            continue
        if own.device_mesh.ndim != 1 or tuple(own.placements) != (Shard(0),):
            raise ValueError(
                f"`fully_shard` must divide the rows of parameters among all workers, got "
                f"{tuple(own.placements)} on a mesh of {tuple(own.device_mesh.shape)} for "
                f"'{name}' (hybrid sharding or tensor parallelism). {REMEDY}"
            )
        meshes.add(own.device_mesh)
    if len(meshes) > 1:
        raise ValueError(f"`fully_shard` must have one mesh, got {len(meshes)}. {REMEDY}")
    for name, module in model.named_modules():
        _check_policies(name, module)


def _check_policies(name: str, module: Any) -> None:
    """Raise a ``ValueError`` if a part of a model is computed or kept in another way than stored.

    Args:
        name: Its name.
        module: The part.
    """
    if not is_fully_sharded(module):
        return
    state = module._get_fsdp_state()
    policy = getattr(state, "_mp_policy", None)
    dtypes = [getattr(policy, own, None) for own in ("param_dtype", "reduce_dtype", "output_dtype")]
    if any(dtype is not None for dtype in dtypes):
        raise ValueError(
            f"`model` must be divided without `mp_policy`, got one for '{name}', which replaces "
            "parameters during calls. Use torch.autocast."
        )
    for group in parameter_groups(module):
        if getattr(group, "_use_post_forward_mesh", False):
            raise ValueError(
                f"`reshard_after_forward` must be True or False, got a number for '{name}'."
            )
        if any(getattr(own, "offload_to_cpu", False) for own in getattr(group, "fsdp_params", ())):
            raise ValueError(
                f"`model` must be divided without `offload_policy`, got one for '{name}'. Leave "
                "it out: parameters and their updates are on one device."
            )
