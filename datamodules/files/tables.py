"""Tables that people write, CSV and lines of JSON: read row by row, with the number and the fault of every bad row."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsynth.errors import UserError

_SHOWN = 20
_NO_VALUE = frozenset(
    {
        *("nan", "NaN", "NAN", "-nan", "-NaN", "NA", "N/A", "n/a", "<NA>", "#N/A", "#N/A N/A", "#NA", "NaT"),
        *("None", "NULL", "null"),
    }
)
"""What pandas writes for an empty cell, and reads as one."""


@dataclass
class Table:
    """The good rows of a CSV file and what is wrong with the others, both by line number (the header is line 1).

    It may as well list samples that are no rows: by name, `noun` "sample".
    """

    name: str
    rows: dict[Any, Any] = field(default_factory=dict)
    faults: dict[Any, str] = field(default_factory=dict)
    noun: str = "row"

    def reject(self, place: int | str, why: str) -> None:
        """Move a row to the faults."""
        self.rows.pop(place, None)
        self.faults[place] = why

    def report(self, mend: str = "data.on_bad=skip trains on the rest") -> str:
        """One line for the file, then one for each of the first 20 bad rows."""
        count, row = len(self.faults), "row " * (self.noun == "row")
        lines = [f"{self.name}: {count} bad {self.noun}{'s' * (count > 1)} ({mend})"]
        lines += [f"  {row}{place}: {why}" for place, why in sorted(self.faults.items())[:_SHOWN]]
        return "\n".join(lines + [f"  and {count - _SHOWN} more"] * (count > _SHOWN))


def has_value(cell: str) -> bool:
    """Whether a cell says something: `nan`, `None`, `NA` and their like are what programs write for an empty one."""
    return cell not in _NO_VALUE


def read_table(path: Path, columns: Sequence[str], key: str, optional: Sequence[str] = ()) -> Table:
    """Rows of a CSV file as {column: stripped value}; the separator, `;` or `,`, is the one in the header.

    A row with an empty field in `columns`, with `nan` or its like (`has_value`) there or in the `optional` columns, or
    with another number of fields than the header, is among the faults. Blank lines and further columns are no fault.
    `key` is the config key that leads to the file.

    Raises:
        UserError: no such file, not UTF-8 (a byte order mark is allowed), a column missing or there twice, no rows, an
            unclosed quote.
    """
    text = _read_text(path, key)
    first = text.partition("\n")[0]
    # A lone Prompt column has no separator, and its prompts hold commas.
    separator = "," if "," in first and ";" not in first else ";"
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    table, end, lines = Table(path.name), 0, text.split("\n")
    try:
        header = [column.strip() for column in next(reader, [])]
        if missing := [column for column in columns if column not in header]:
            raise UserError(f"{path}: no column {' or '.join(missing)} in the header {separator.join(header)!r}")
        if twice := [column for column in dict.fromkeys(header) if column and header.count(column) > 1]:
            raise UserError(f"{path}: the header has the column {twice[0]} twice: remove or rename one")
        end = reader.line_num
        for fields in reader:
            line, end = end + 1, reader.line_num
            if lines[line - 1].strip():  # a line of spaces looks blank to whoever wrote it
                _add(table, line, header, [field.strip() for field in fields], separator)
                _check_cells(table, line, columns, optional)
    except csv.Error as error:
        raise UserError(f"{path}: row {end + 1}: {error} (is a quote left open?)") from None
    if not table.rows and not table.faults:
        raise UserError(f"{path} has no rows below its header")
    return table


def _read_text(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{key}: {path} is missing") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: save it again as UTF-8") from None


def _add(table: Table, line: int, header: list[str], fields: list[str], separator: str) -> None:
    if len(fields) != len(header):
        hint = f" (quote a value that holds a {separator})" if len(fields) > len(header) else ""
        table.faults[line] = f"{len(fields)} instead of {len(header)} fields{hint}"
    else:
        table.rows[line] = dict(zip(header, fields, strict=True))


def _check_cells(table: Table, line: int, columns: Sequence[str], optional: Sequence[str]) -> None:
    """Reject a row that says nothing in one of `columns`, or that there is no value in one of either."""
    row = table.rows.get(line, {})
    if row and (empty := [column for column in columns if not row[column]]):
        table.reject(line, f"empty {' and '.join(empty)}")
    for column in (*columns, *optional):
        if not has_value(row.get(column, "")):
            table.reject(line, no_value(column, row[column]))


def no_value(column: str, cell: str) -> str:
    """What is wrong with a cell that does not pass `has_value`."""
    return f"{column} is {cell}, which programs write for an empty cell: give it a value, or leave it empty"


def read_json_lines(path: Path, columns: Sequence[str], key: str) -> Table:
    """Rows of a file of JSON objects, one a line, by line number; `columns` hold text in every good row.

    Raises:
        UserError: no such file, not UTF-8, no rows.
    """
    table = Table(path.name)
    for line, text in enumerate(_read_text(path, key).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = strict_object(text)
        except ValueError as error:
            table.faults[line] = str(error)
            continue
        empty = [column for column in columns if not isinstance(row.get(column), str) or not row[column].strip()]
        if empty:
            table.faults[line] = f"has no text as {' and '.join(empty)}"
        else:
            table.rows[line] = row
    if not table.rows and not table.faults:
        raise UserError(f"{path} has no rows")
    return table


def strict_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object as the standard has it: no NaN or Infinity, no key twice.

    Raises:
        ValueError: the text is none; the message says why and begins as `is` or `has`.
    """
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_refuse_repeats
        )
    except _NotStrictError as error:
        raise ValueError(str(error)) from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")
    return value


class _NotStrictError(Exception):
    pass


def _refuse_constant(name: str) -> None:
    raise _NotStrictError(f"has the number {name}, which JSON does not know: leave the key out")


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise _NotStrictError(f"has the number {digits}, which is too large: leave the key out")
    return value


def _refuse_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _NotStrictError(f"has the key {name} twice: remove one")
        found[name] = value
    return found


def drop_bad_rows(tables: Sequence[Table], on_bad: str) -> int:
    """How many bad rows the tables have, all of them left out.

    Raises:
        UserError: there are some and `on_bad` is "fail" (one message with every file's report), or no good row is left.
    """
    bad = [table for table in tables if table.faults]
    if bad and on_bad == "fail":
        raise UserError("\n".join(table.report() for table in bad))
    for table in bad:
        if not table.rows:
            raise UserError(f"no good {table.noun} is left\n{table.report()}")
    return sum(len(table.faults) for table in bad)
