"""An extension of griffe: examples as code, and the signatures that a decorator makes."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> (?:.*\n?)(?:\1\S.*\n?)*", re.M)


def fenced(text: str) -> str:
    """Return a docstring with a fence around each example."""

    def fence(match: re.Match[str]) -> str:
        indent, block = match.group(1), match.group().rstrip("\n")
        return f"{indent}```pycon\n{block}\n{indent}```\n"

    return EXAMPLE.sub(fence, text)


def spelled(annotation: Any) -> str | None:
    """Return an annotation as the source spells it."""
    if annotation is inspect.Parameter.empty:
        return None
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", None)


def as_called(obj: Any) -> None:
    """Give an expression the signature and docstring that `einconv_kfac.expressions.call` makes."""
    function = getattr(import_module(obj.module.path), obj.name)
    signature = inspect.signature(function)
    obj.parameters = griffe.Parameters(
        *(
            griffe.Parameter(
                given.name,
                annotation=spelled(given.annotation),
                kind=griffe.ParameterKind.positional_or_keyword,
                default=None if given.default is given.empty else repr(given.default),
            )
            for given in signature.parameters.values()
        )
    )
    obj.returns = spelled(signature.return_annotation)
    obj.docstring.value = inspect.getdoc(function) or ""


class Docstrings(griffe.Extension):
    """Fences examples, which stand outside of sections here, and corrects signatures."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of an object after it was read."""
        if obj.is_function and obj.name == "einsum_expression":
            as_called(obj)
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
