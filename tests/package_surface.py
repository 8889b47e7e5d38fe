"""The public surface as text, written from the source alone.

Signatures are spelled as the source spells them, so that the text depends neither on the version
of Python nor on that of torch. It says nothing of the file that defines a name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence

from package_source import files, imported_names, segment, tree

WIDTH = 100
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def public_names(module: str) -> list[str]:
    """The names of ``__all__``, or of all that the file defines without an underscore."""
    names = []
    for statement in tree(module).body:
        for name in _bound(statement):
            if name == "__all__" and isinstance(statement, ast.Assign):
                return sorted(ast.literal_eval(statement.value))
            names.append(name)
    return sorted({name for name in names if not name.startswith("_")})


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement of a file or a class defines."""
    if isinstance(statement, (ast.ClassDef, *Function)):
        return [statement.name]
    if isinstance(statement, ast.AnnAssign):
        return [target.id for target in (statement.target,) if isinstance(target, ast.Name)]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return []


def definitions(module: str, name: str) -> tuple[str, list[ast.stmt]]:
    """The file that defines a name, and its statements there; none if the name is a file's.

    Imports are followed through the package; a name from elsewhere has no statement either.
    """
    found = [statement for statement in tree(module).body if name in _bound(statement)]
    if found:
        return module, found
    for origin, inner, alias in imported_names(module):
        if alias == name and origin in files():
            file = f"{origin}.{inner}"
            home = (file, []) if origin == module else definitions(origin, inner)
            return home if home[1] or file not in files() else (file, [])
    return module, []


def surface(rooms: Iterable[str]) -> list[str]:
    """The lines of all rooms; a name that an earlier room has refers to that."""
    lines: list[str] = []
    homes: dict[tuple[str, str], str] = {}
    for room in rooms:
        lines += ["", room]
        for name in public_names(room):
            module, statements = definitions(room, name)
            home = homes.setdefault((module, name), room)
            if not statements:
                lines.append(f"    {name}: module")
            elif home != room:
                lines.append(f"    {name}: see {home}")
            else:
                for statement in statements:
                    lines += [f"    {line}" for line in _described(module, statement)]
    return lines[1:]


def _described(module: str, statement: ast.stmt) -> Iterator[str]:
    """Yield the lines of one definition."""
    if isinstance(statement, Function):
        yield from _wrapped(*_called_as(module, statement))
    elif isinstance(statement, ast.ClassDef):
        bases = ", ".join(_text(module, base) for base in statement.bases)
        yield f"class {statement.name}({bases})" if bases else f"class {statement.name}"
        yield from (f"    {line}" for line in _members(module, statement))
    else:
        text = _text(module, statement)
        yield text if len(text) < WIDTH else text.partition(" = ")[0]


def _members(module: str, given: ast.ClassDef) -> Iterator[str]:
    """Yield fields, attributes and methods of a class, inherited ones of the package included."""
    fields: dict[str, str] = {}
    methods: dict[str, list[str]] = {}
    for origin, owner in reversed(list(_bases(module, given))):
        own: dict[str, list[str]] = {}
        for statement in owner.body:
            if isinstance(statement, Function):
                if statement.name == "__init__":
                    fields.update((n, f"{n}: attribute") for n in _attributes(statement))
                if _is_member(statement.name):
                    lines = _wrapped(*_signature(origin, statement, bound=True))
                    own.setdefault(statement.name, []).extend(lines)
            else:
                public = [n for n in _bound(statement) if _is_member(n)]
                fields.update((n, _text(origin, statement)) for n in public)
        methods.update(own)
    yield from fields.values()
    for name in sorted(methods):
        yield from methods[name]


def _bases(module: str, given: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield a class and its bases in the package, the nearest first."""
    yield module, given
    for base in given.bases:
        if isinstance(base, ast.Name):
            origin, statements = definitions(module, base.id)
            for statement in statements:
                if isinstance(statement, ast.ClassDef):
                    yield from _bases(origin, statement)


def _is_member(name: str) -> bool:
    """Return whether a name in a class is public; special methods are, but for one."""
    special = name.startswith("__") and name.endswith("__") and name != "__post_init__"
    return special or not name.startswith("_")


def _attributes(init: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The public attributes that ``__init__`` sets."""
    return [
        node.attr
        for node in ast.walk(init)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and not node.attr.startswith("_")
    ]


def _called_as(
    module: str, function: ast.FunctionDef | ast.AsyncFunctionDef
) -> tuple[str, list[str], str]:
    """The signature of a function, that of an operation from the function it is bound to."""
    for mark in function.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "bound":
            origin, statements = definitions(module, ast.unparse(mark.args[0]))
            (signature,) = (s for s in statements if isinstance(s, Function))
            return function.name, _signature(origin, signature)[1], " -> Bound"
    return _signature(module, function)


def _signature(
    module: str, function: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool = False
) -> tuple[str, list[str], str]:
    """The name, the parameters and the rest of a signature; ``self`` is left out."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + given.defaults
    parameters = [_parameter(module, a, d) for a, d in zip(plain, defaults)]
    if given.posonlyargs:
        parameters.insert(len(given.posonlyargs), "/")
    if given.vararg:
        parameters.append("*" + _parameter(module, given.vararg, None))
    elif given.kwonlyargs:
        parameters.append("*")
    parameters += [_parameter(module, a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults)]
    if given.kwarg:
        parameters.append("**" + _parameter(module, given.kwarg, None))
    marks = [_text(module, decorator) for decorator in function.decorator_list]
    kinds = [m for m in marks if m in {"property", "staticmethod", "classmethod", "overload"}]
    if bound and "staticmethod" not in kinds:
        del parameters[0]
    result = f" -> {_text(module, function.returns)}" if function.returns else ""
    return " ".join([*kinds, function.name]), parameters, result


def _parameter(module: str, argument: ast.arg, default: ast.expr | None) -> str:
    """One parameter, as the source spells it."""
    text = argument.arg
    if argument.annotation is not None:
        text += f": {_text(module, argument.annotation)}"
    if default is not None:
        text += f"{' = ' if argument.annotation else '='}{_text(module, default)}"
    return text


def _wrapped(name: str, parameters: Sequence[str], result: str) -> list[str]:
    """A signature on one line, or with a line per parameter."""
    if name.startswith("property"):
        return [f"{name}{result}"]
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) < WIDTH:
        return [line]
    return [f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){result}"]


def _text(module: str, node: ast.expr | ast.stmt) -> str:
    """The source of a node on one line, however it is wrapped."""
    text = " ".join(segment(module, node).split())
    return re.sub(r",? ([\])}])", r"\1", re.sub(r"([\[({]) ", r"\1", text))
