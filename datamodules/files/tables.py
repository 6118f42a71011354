"""CSV files that people write: read row by row, with the number and the fault of every bad row."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsynth.errors import UserError

_SHOWN = 20


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


def read_table(path: Path, columns: Sequence[str], key: str) -> Table:
    """Rows of a CSV file as {column: stripped value}; the separator, `;` or `,`, is the one in the header.

    A row with an empty field in `columns`, or with another number of fields than the header, is among the faults. Blank
    lines and further columns are no fault. `key` is the config key that leads to the file.

    Raises:
        UserError: no such file, not UTF-8 (a byte order mark is allowed), a column missing, no rows, an unclosed quote.
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
        end = reader.line_num
        for fields in reader:
            line, end = end + 1, reader.line_num
            if lines[line - 1].strip():  # a line of spaces looks blank to whoever wrote it
                _add(table, line, header, [field.strip() for field in fields], columns, separator)
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


def _add(table: Table, line: int, header: list[str], fields: list[str], columns: Sequence[str], separator: str) -> None:
    row = dict(zip(header, fields, strict=False))
    if len(fields) != len(header):
        hint = f" (quote a value that holds a {separator})" if len(fields) > len(header) else ""
        table.faults[line] = f"{len(fields)} instead of {len(header)} fields{hint}"
    elif empty := [column for column in columns if not row[column]]:
        table.faults[line] = f"empty {' and '.join(empty)}"
    else:
        table.rows[line] = row


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
