"""Every key of a run with its type, range, value and meaning, read from the config dataclasses and their docstrings."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Optional

from omegaconf import DictConfig, OmegaConf

from medsynth.ranges import Range, range_of

_NARROWEST = 30  # column of meanings, characters


class Key(NamedTuple):
    """One setting: its full name, its type as written, what it may be, its value in this run, and what it means."""

    name: str
    type: str
    range: str
    value: Any
    meaning: str


class Place(NamedTuple):
    """Where a key of a merged config stands: its full name, its field, and what that may be."""

    name: str
    field: Field[Any]
    range: Range | None


def places(config: DictConfig, prefix: str = "") -> Iterator[Place]:
    """Every key of a structured config, depth first."""
    owner: Any = OmegaConf.get_type(config)
    for field in fields(owner):
        name, child = f"{prefix}{field.name}", config._get_node(field.name)
        if isinstance(child, DictConfig) and is_dataclass(OmegaConf.get_type(child)):
            yield from places(child, f"{name}.")
        else:
            yield Place(name, field, range_of(owner, field.name))


def text_keys(config: DictConfig) -> dict[str, bool]:
    """The keys of a structured config that are text, and whether each may be null; `KEY.*` for a mapping to text."""
    kinds = {place.name: place.field.type for place in places(config)}
    found = {name: kind == Optional[str] for name, kind in kinds.items() if kind in (str, Optional[str])}
    return found | {f"{name}.*": False for name, kind in kinds.items() if kind == dict[str, str]}


def describe(settings: Any, prefix: str = "") -> list[Key]:
    """Every key below a config dataclass object, depth first."""
    meanings = _meanings(type(settings))
    keys = []
    for field in fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            keys += describe(value, f"{name}.")
        else:
            allowed = range_of(type(settings), field.name)
            keys.append(Key(name, type_name(field.type), str(allowed or ""), value, meanings[field.name]))
    return keys


def as_json(keys: Sequence[Key]) -> str:
    """A list of objects with name, type, range, value and meaning."""
    return json.dumps([key._asdict() for key in keys], indent=1, ensure_ascii=False, default=str)


def as_table(keys: Sequence[Key], width: int | None) -> Iterator[str]:
    """The lines of a table with a heading. `width`: characters a line, into which the meanings, and nothing else, are
    wrapped where there is room for them; None for one line a key."""
    rows: list[tuple[str, ...]] = [Key._fields]
    rows += [(*key[:3], str(key.value).replace("\n", "\\n"), key.meaning) for key in keys]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    left = sum(widths) + 2 * len(widths)
    for row in rows:
        start = "  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=False))
        lines = [row[4]] if width is None else textwrap.wrap(row[4], max(_NARROWEST, width - left))
        yield f"{start}  {lines[0]}"
        yield from (" " * left + line for line in lines[1:])


def type_name(annotation: Any) -> str:
    """A type as it is written."""
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
