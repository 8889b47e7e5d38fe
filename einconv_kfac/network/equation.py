"""Einsum equations, written and parsed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from string import ascii_letters


def equation(operands: Sequence[Sequence[str]], output: Sequence[str]) -> str:
    """Write index names as an equation for ``torch.einsum``.

    Raises:
        ValueError: If there are more indices than the 52 letters that ``torch.einsum`` takes.

    >>> equation([("n", "ci"), ("co", "ci")], ("n", "co"))
    'ab,cb->ac'
    """
    names = list(dict.fromkeys(index for indices in operands for index in indices))
    if len(names) > len(ascii_letters):
        raise ValueError(
            f"an einsum equation must have at most {len(ascii_letters)} indices, got "
            f"{len(names)}; the functions of `einconv_kfac.functionals` contract pairwise "
            "and have no such limit."
        )
    letters: dict[str, str] = dict(zip(names, ascii_letters))
    left = ",".join(_spelled(indices, letters) for indices in operands)
    return f"{left}->{_spelled(output, letters)}"


def parse_equation(text: str) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Read the indices of the operands and of the output from an equation.

    Raises:
        ValueError: If the equation is not explicit, has anything but letters as indices, or has
            an index twice in the output.
    """
    left, arrow, right = text.replace(" ", "").partition("->")
    operands = [tuple(indices) for indices in left.split(",")]
    letters = set("".join(left.split(",")) + right)
    if not arrow or not letters <= set(ascii_letters):
        raise ValueError(f"`equation` must be like 'ij,jk->ik', got {text!r}.")
    if len(set(right)) != len(right):
        raise ValueError(f"`equation` must have an output index once, got {text!r}.")
    return operands, tuple(right)


def _spelled(indices: Iterable[str], letters: dict[str, str]) -> str:
    """Return the letters of the indices."""
    return "".join(letters[index] for index in indices)
