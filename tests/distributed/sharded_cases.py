"""Scripts that train models which `fully_shard` divides, and the same models on one worker."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from optim_cases import conv_net, image_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module
from worker_training import all_weights, sharded

from einconv_kfac import KFAC, KFACPreconditioner, kronecker_factors

EXACT = {"fisher": "exact"}
MODES: dict[str, dict[str, Any]] = {
    "automatic": EXACT,
    "fixed": {**EXACT, "lr": 0.05, "adaptive": False},
}
Found = dict[str, Any]


class Script:
    """A training script on one of several workers, each with a part of the batch.

    Args:
        options: Of the optimizer.
        rank: The worker's number.
        size: The number of workers; one has the whole model.
        prepare: Changes the model before the optimizer is made.
    """

    def __init__(
        self,
        options: dict[str, Any],
        rank: int,
        size: int,
        prepare: Callable[[Script], None] = lambda _: None,
    ) -> None:
        self.rank, self.size, self.loss_fn = rank, size, nn.CrossEntropyLoss()
        self.module = conv_net()
        self.model = self.module if size == 1 else sharded(self.module)
        prepare(self)
        self.opt = KFAC(self.model, self.loss_fn, **options)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The worker's part of a batch."""
        x, y = image_batch(12, number)
        return x.chunk(self.size)[self.rank], y.chunk(self.size)[self.rank]

    def backward(self, number: int, scale: float = 1.0) -> None:
        """Backpropagate the loss of a batch."""
        x, y = self.batch(number)
        (self.loss_fn(self.model(x), y) * scale).backward()

    def evaluate(self) -> None:
        """Call the model without gradients."""
        with torch.no_grad():
            self.model(self.batch(0)[0])

    def steps(self, count: int = 4, first: int = 0) -> None:
        """Take steps."""
        for number in range(first, first + count):
            self.opt.zero_grad()
            self.backward(number)
            self.opt.step()


def evaluations(options: dict[str, Any], rank: int, size: int) -> Script:
    """The model is evaluated before the optimizer is made, and between steps."""
    script = Script(options, rank, size, Script.evaluate)
    for number in range(3):
        script.opt.zero_grad()
        script.evaluate()
        script.backward(number)
        script.evaluate()
        script.opt.step()
        script.evaluate()
    return script


def zeroed(options: dict[str, Any], rank: int, size: int) -> Script:
    """Gradients are overwritten with zeros, those of a batch without a step among them."""
    script = Script(options, rank, size)
    for number in range(3):
        script.opt.zero_grad(set_to_none=False)
        script.backward(10 + number)
        script.opt.zero_grad(set_to_none=False)
        script.backward(number)
        script.opt.step()
    return script


def accumulated(options: dict[str, Any], rank: int, size: int) -> Script:
    """Gradients of two batches are added up, each averaged over workers."""
    script = Script(options, rank, size)
    for number in range(3):
        script.opt.zero_grad()
        script.backward(number, 0.5)
        script.backward(10 + number, 0.5)
        script.opt.step()
    return script


def frozen(options: dict[str, Any], rank: int, size: int) -> Script:
    """One layer is frozen, and trained later."""

    def freeze(script: Script) -> None:
        script.module[0].requires_grad_(requires_grad=False)

    script = Script({**options, "params": None}, rank, size, freeze)
    script.steps(2)
    return script


def with_another_optimizer(options: dict[str, Any], rank: int, size: int) -> Script:
    """Another optimizer moves parameters between the backward pass and the step."""
    script = Script(options, rank, size)
    others = torch.optim.SGD(script.module[0].parameters(), 0.5)
    own = [p for layer in script.module[1:] for p in layer.parameters()]
    script.opt.remove_hooks()
    script.opt = KFAC(script.model, script.loss_fn, params=own, **options)
    for number in range(3):
        script.opt.zero_grad()
        others.zero_grad()
        script.backward(number)
        others.step()
        script.opt.step()
    return script


def clipped(options: dict[str, Any], rank: int, size: int) -> Script:
    """Gradients are clipped."""
    script = Script(options, rank, size)
    for number in range(3):
        script.opt.zero_grad()
        script.backward(number)
        nn.utils.clip_grad_norm_(script.module.parameters(), 0.1)
        script.opt.step()
    return script


def discarded(options: dict[str, Any], rank: int, size: int) -> Script:
    """A step is left out, and one is skipped since numbers are not finite."""
    script = Script(options, rank, size)
    script.steps(2)
    script.opt.zero_grad()
    script.backward(7)
    script.opt.discard()
    script.opt.zero_grad()
    script.backward(8, float("nan"))
    script.opt.step()
    script.steps(2, 2)
    return script


SCRIPTS = (evaluations, zeroed, accumulated, frozen, with_another_optimizer, clipped, discarded)


def played(rank: int, size: int) -> dict[str, Any]:
    """Parameters and statistics at the end of each script, by name and mode."""
    found: dict[str, Any] = {}
    for script in SCRIPTS:
        for mode, options in MODES.items():
            end = script(options, rank, size)
            layers = end.opt.layer_statistics()
            found[f"{script.__name__}, {mode}"] = {
                "weights": all_weights(end.module),
                "statistics": end.opt.statistics(),
                "layers": {
                    name: {k: v for k, v in own.items() if not k.endswith("seconds")}
                    for name, own in layers.items()
                },
            }
            end.opt.remove_hooks()
    return found


def rows_of_states(rank: int, size: int) -> dict[str, Any]:
    """Of each parameter: its rows on this worker, and those of its momentum."""
    script = Script(MODES["fixed"], rank, size)
    script.steps(2)
    return {
        name: [(isinstance(t, DTensor), t.to_local().shape) for t in (p, *_momenta(script, p))]
        for name, p in script.module.named_parameters()
    }


def _momenta(script: Script, parameter: Any) -> list[Any]:
    """The tensors in the state of a parameter."""
    return [value for value in script.opt.state[parameter].values() if isinstance(value, Tensor)]


def failing(rank: int, size: int, options: dict[str, Any], target: str) -> dict[str, Any]:
    """A function of the package fails once on one worker, in the second step."""
    script, found = Script(options, rank, size), Found()
    script.steps(1)
    script.opt.zero_grad()
    script.backward(1)
    before = all_weights(script.module)
    error = mock.patch(target, side_effect=RuntimeError("out of memory"))
    try:
        with error if rank == 1 else warnings.catch_warnings():
            script.opt.step()
    except RuntimeError as caught:
        found["error"] = str(caught)
    found["unchanged"] = torch.equal(before, all_weights(script.module))
    script.steps(2, 2)
    found["weights"] = all_weights(script.module)
    return found


FAILURES = {
    "before anything is gathered": (MODES["fixed"], "einconv_kfac.optim.step.runner.norms"),
    "in an update of factors": (
        MODES["fixed"],
        "einconv_kfac.optim.factors.curvature.RunningCurvature.update_",
    ),
    "in a replay": (MODES["automatic"], "einconv_kfac.optim.replay.replay.Replay.expansion"),
}


def _divided(model: nn.Module, *shape: int, layers: bool = True, **options: Any) -> nn.Module:
    """A model that `fully_shard` divides on a mesh of a shape."""
    names = tuple(f"axis {index}" for index in range(len(shape)))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if layers:
        fully_shard(model[0], mesh=mesh, **options)  # type: ignore[index]
    return fully_shard(model, mesh=mesh, **options)


def _by_layers(size: int) -> nn.Module:
    model = conv_net()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (size,)))
    return model


def _tensor_parallel(size: int) -> nn.Module:
    return distribute_module(conv_net(), init_device_mesh("cpu", (size,)))


def _ignored(size: int) -> nn.Module:
    model = conv_net()
    return _divided(model, size, layers=False, ignored_params=set(model[0].parameters()))


REFUSED: dict[str, Callable[[int], nn.Module]] = {
    "layers alone": _by_layers,
    "tensor parallel": _tensor_parallel,
    "ignored": _ignored,
    "hybrid": lambda size: _divided(conv_net(), size, 1),
    "columns": lambda size: _divided(
        nn.Sequential(nn.Linear(4, 6)).double(),
        size,
        layers=False,
        shard_placement_fn=lambda p: Shard(p.ndim - 1),
    ),
    "low precision": lambda size: _divided(
        conv_net(), size, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    ),
    "other outputs": lambda size: _divided(
        conv_net(), size, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float32)
    ),
    "offloaded": lambda size: _divided(
        conv_net(), size, offload_policy=CPUOffloadPolicy(pin_memory=False)
    ),
}


def refusals(rank: int, size: int) -> dict[str, str]:
    """The errors for models that are divided in another way."""
    found = {}
    for name, model in REFUSED.items():
        found[name] = _error(lambda model=model: KFAC(model(size), nn.CrossEntropyLoss()))
    loss_fn = nn.CrossEntropyLoss()
    found["preconditioner"] = _error(lambda: KFACPreconditioner(sharded(conv_net()), loss_fn))
    data = [image_batch()]
    found["factors"] = _error(lambda: kronecker_factors(sharded(conv_net()), loss_fn, data))
    return found


def _error(call: Callable[[], object]) -> str:
    """The text of an error; empty if there is none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def results(rank: int, size: int) -> dict[str, Any]:
    """What a worker finds."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"scripts": played(rank, size)}
    if size > 1:
        found["rows"] = rows_of_states(rank, size)
        found["failures"] = {name: failing(rank, size, *own) for name, own in FAILURES.items()}
        found["refused"] = refusals(rank, size)
    return found
