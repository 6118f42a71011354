"""One picture with its caption, class and facts, and how the layouts write these."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.files.detection import EXTRA_FILE
from datamodules.files.tables import has_value, no_value, strict_object
from medsynth.errors import UserError

COLUMNS = ("file_name", "text", "label")
"""The columns of metadata.csv that are no facts."""


@dataclass(slots=True)
class Entry:
    """One picture with its caption.

    name: of the picture's file relative to the data set's root, or of its shard and member.
    key: its own name, without folder of the split and without suffix, which every layout keeps.
    text: the caption. label: the class's name, or "". facts: further facts as the text of a JSON object, or "".
    """

    name: str
    key: str
    text: str = ""
    label: str = ""
    facts: str = ""

    def columns(self) -> dict[str, Any]:
        """The class, as `label`, and the facts, by name."""
        return {"label": self.label} | json.loads(self.facts or "{}")


def class_name(label: Any) -> str:
    """A class as text; a number becomes some.

    Raises:
        ValueError: it is neither, as null is.
    """
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ValueError(f"its label is {json.dumps(label)}: write the class as text, or leave label out")
    return str(label)


def read_extras(folder: Path) -> dict[str, dict[str, Any]]:
    """What `extra.jsonl` in `folder` knows of single pictures, by their paths."""
    path, extras = folder / EXTRA_FILE, {}
    if not path.is_file():
        return extras
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            extra = strict_object(line.decode())
            safe_key(extra.get("key", ""))
            words = [extra.get(name, "") for name in ("text", "label")]
            if not all(isinstance(word, str) for word in words) or not isinstance(extra.get("facts", {}), dict):
                raise ValueError
            name = extra.pop("file_name")
            repeated = name in extras
            extras[name] = extra
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{path}: line {number} is no JSON object of file_name, text, label, facts, key") from None
        if repeated:
            raise UserError(f"{path}: line {number}: {name} has a line already: remove one of them")
    return extras


NOT_UTF8 = "its name is not UTF-8: rename it, as convmv does"


def is_utf8(name: str) -> bool:
    """Whether the name of a file or folder is text, which a caption, a table or a shard can hold."""
    return name.encode("utf-8", "replace") == name.encode("utf-8", "surrogateescape")


def safe_key(key: str) -> str:
    """The key; ValueError where it leads out of the folder."""
    if key.startswith("/") or ".." in PurePosixPath(key).parts:
        raise ValueError(f"its key {key} leads out of the folder")
    return key


def decode(text: bytes) -> str:
    """A caption from the bytes of its file."""
    return tidy(text.decode("utf-8-sig"))


def tidy(text: str) -> str:
    """A caption as every layout can hold it: nothing around it, and one kind of line ends."""
    return "\n".join(text.strip().splitlines())


def dump(facts: dict[str, Any]) -> str:
    """Facts as `Entry` has them."""
    return json.dumps(facts, ensure_ascii=False) if facts else ""


def to_fact(column: str, cell: str) -> Any:
    """`from_cell`; raises ValueError where the cell says nothing. JSON's null does: the fact is known to be none."""
    if not has_value(cell) and cell != "null":
        raise ValueError(no_value(column, cell))
    return from_cell(cell)


def from_cell(cell: str) -> Any:
    """A cell of metadata.csv: a number or list where the cell is exactly how JSON writes one, else text."""
    try:
        value = json.loads(cell, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return cell
    return value if json.dumps(value, ensure_ascii=False) == cell else cell


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
