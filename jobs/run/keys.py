"""Every key of a run with its type, value and meaning, read from the config dataclasses and their docstrings."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any, NamedTuple

_NARROWEST = 30  # column of meanings, characters


class Key(NamedTuple):
    """One setting: its full name, its type as written, its value in this run, and what it means."""

    name: str
    type: str
    value: Any
    meaning: str


def describe(settings: Any, prefix: str = "") -> list[Key]:
    """Every key below a config dataclass object, depth first."""
    meanings = _meanings(type(settings))
    keys = []
    for field in fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            keys += describe(value, f"{name}.")
        else:
            keys.append(Key(name, _type_name(field.type), value, meanings[field.name]))
    return keys


def as_json(keys: Sequence[Key]) -> str:
    """A list of objects with name, type, value and meaning."""
    return json.dumps([key._asdict() for key in keys], indent=1, ensure_ascii=False, default=str)


def as_table(keys: Sequence[Key], width: int | None) -> Iterator[str]:
    """The lines of a table with a heading. `width`: characters a line, into which the meanings, and nothing else, are
    wrapped where there is room for them; None for one line a key."""
    rows: list[tuple[str, ...]] = [Key._fields]
    rows += [(key.name, key.type, str(key.value).replace("\n", "\\n"), key.meaning) for key in keys]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    left = sum(widths) + 2 * len(widths)
    for row in rows:
        start = "  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=False))
        lines = [row[3]] if width is None else textwrap.wrap(row[3], max(_NARROWEST, width - left))
        yield f"{start}  {lines[0]}"
        yield from (" " * left + line for line in lines[1:])


def _type_name(annotation: Any) -> str:
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    return text.replace("typing.", "")


def _meanings(config_class: type) -> dict[str, str]:
    """Field -> the docstring that follows it, base classes' fields included."""
    found: dict[str, str] = {}
    for owner in reversed([c for c in config_class.__mro__ if is_dataclass(c)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for node, following in pairwise(definition.body):
            match node, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found
