"""What to write where a loss, or operations between a model's output and it, are not known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

REMEDIES = {
    "Relu": (
        "write `x.clamp(min=0)` in place of `relu(x)`, which does not keep its input (that of a "
        "layer of torch is known)"
    ),
    "LinalgSvd": "return a penalty of parameters from the model's `forward`, beside its output",
    "CopySlices": (
        "make a new tensor in place of changing a part of one in place (an activation after "
        "InstanceNorm: inplace=False)"
    ),
}
"""What can be written in place of operations that do not keep their input."""

SELECTIVE = "selective activation checkpoint"
"""What torch's message names where the graph of selectively checkpointed code is read twice."""
KNOWN_DERIVATIVES = (
    "outside, those by tensors that the model is called with are known, if `torch.autograd.grad` "
    "takes them with one vector at a time, without `is_grads_batched` and `torch.func`"
)
"""Which derivatives of a model are evaluated again."""
LINEAR = "derivatives of linear layers"
"""How derivatives are named that no operation of the graph names."""
TRANSFORMS = "calls inside of torch.func"
"""How calls are named that are not recorded."""
NO_LOSS = (
    "`step` needs the loss it steps on, but saw none whose gradient is in `.grad`. Compute it as "
    "`loss_fn(model(x), y)` with the module given here, outside of compiled functions, or write "
    "`loss = optimizer.observe(loss)` before `loss.backward()`; gradients by torch.func, "
    "autograd.grad or a checkpoint with use_reentrant=True have no recorded loss. A model that is "
    "compiled is compiled first: `model = torch.compile(model)`, then KFAC(model)."
)

OTHER_LOSS = (
    "`step` needs the loss it steps on, but saw only numbers that the model returned, which do not "
    "explain {fraction:.0%} of the slope along the step. Write `loss = optimizer.observe(loss)` "
    "with the whole loss before `loss.backward()`."
)
"""Why numbers that the model returned are not taken for losses."""
OTHER_LAYERS = (
    "`step` needs the loss it steps on, but saw only numbers that the model returned, which do not "
    "depend on calls of {names}, though there is a gradient. Write "
    "`loss = optimizer.observe(loss)` with the whole loss before `loss.backward()`, or name these "
    "layers in `exclude`."
)
"""The same, where layers have a gradient that these numbers do not depend on."""


def refusal_of(unknown: Sequence[str]) -> str:
    """Return the message about operations that cannot be evaluated again.

    Args:
        unknown: Their names.
    """
    known = [REMEDIES[kind] for kind in unknown if kind in REMEDIES]
    derivatives = [kind for kind in unknown if kind.endswith("Backward")]
    if derivatives:
        known.append(
            "compute derivatives of the model in the `forward` of a module that returns them, and "
            f"pass that module ({KNOWN_DERIVATIVES})"
        )
    whole = (
        "compute the loss in a module, call that on the output (on several outputs as one tensor, "
        "by `torch.cat`), and pass it: KFAC(model, it), or let `forward` return the losses of the "
        "examples, `[n]`, and average them outside of it"
    )
    return (
        "The operations between the model's output and the loss must be known when adaptive=True, "
        f"got {', '.join(unknown)}. "
        + _sentence([*known, *([] if derivatives else [whole, "pass adaptive=False"])])
        + "."
    )


@contextmanager
def explained_checkpoints() -> Iterator[None]:
    """Say what to write where torch refuses to read the graph of checkpointed code."""
    try:
        yield
    except RuntimeError as error:
        if SELECTIVE in str(error):
            raise RuntimeError(
                "Layers that are checkpointed must be computed again as a whole, got selective "
                "activation checkpointing, whose graph torch lets nobody read twice. Leave out "
                "`context_fn`: checkpoint(layer, x, use_reentrant=False)."
            ) from error
        if "torch.utils.checkpoint" not in str(error):
            raise
        raise RuntimeError(
            "The loss must be computed outside of `torch.utils.checkpoint`, and layers inside of "
            "it need use_reentrant=False, got a graph that torch lets nobody read twice. "
            "Compute the loss outside of the checkpoint, of the output of the model, or pass "
            "use_reentrant=False where layers are checkpointed (Transformers: "
            "gradient_checkpointing_kwargs={'use_reentrant': False})."
        ) from error


def refusal_of_derivatives(kinds: Sequence[str], layers: Sequence[str]) -> str:
    """Return the message about derivatives of the model outside of it.

    Args:
        kinds: The derivatives of operations.
        layers: The names of layers whose weights they use.
    """
    return (
        "Derivatives of the model must be computed in the `forward` of a module that returns them, "
        f"got {', '.join(kinds)} between model and loss, which use the weights of {list(layers)} "
        "past the calls that factors describe. Pass that module, KFAC(module), and take the loss "
        f"of what it returns ({KNOWN_DERIVATIVES}), or leave the layers out: "
        f"exclude={list(layers)}."
    )


def refusal_between(unknown: Sequence[str]) -> str:
    """Return the message about operations before a call, or a vector, that are not known.

    Args:
        unknown: Their names.
    """
    known = [REMEDIES[kind] for kind in unknown if kind in REMEDIES]
    return (
        "The operations between a call of the model and another one, or a vector that its "
        "derivative is taken with, must be known when adaptive=True, got "
        f"{', '.join(unknown)}. {_sentence([*known, 'move them into the model'])}, or pass "
        "adaptive=False."
    )


def _sentence(remedies: Sequence[str]) -> str:
    """Return remedies as the beginning of a sentence."""
    text = ", or ".join(remedies)
    return text[0].upper() + text[1:]
