"""Every key of a run with its type, value and meaning, read from the config dataclasses and their docstrings."""

import ast
import inspect
import textwrap
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any, NamedTuple


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


def _type_name(annotation: Any) -> str:
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    return text.replace("typing.", "")


def _meanings(config_class: type) -> dict[str, str]:
    """Field -> the docstring that follows it, base classes' fields included."""
    found: dict[str, str] = {}
    for owner in reversed([c for c in config_class.__mro__ if is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        for node, following in pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
                found[node.target.id] = " ".join(following.value.value.split())
    return found
