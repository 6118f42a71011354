"""Reading tables: whatever a table is written like, its rows and the numbers of its bad rows come back."""

from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.files.tables import read_table

REQUIRED = ("Filename", "Prompt")
SPACES = st.sampled_from(["", " ", "\t", "  ", "\u00a0"])
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12)
CELLS = st.lists(WORDS, min_size=1, max_size=3).map("\n".join)  # now and then of several lines
NAMES = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6).filter(lambda name: name not in REQUIRED)


@dataclass
class Written:
    """A file's bytes, and what reading them has to give: rows and kinds of fault by the line where each begins."""

    required: tuple[str, ...]
    content: bytes = b""
    rows: dict[int, dict[str, str]] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)


def quoted(cell: str, separator: str, always: bool) -> str:
    if always or any(character in cell for character in (separator, '"', "\n")):
        return '"' + cell.replace('"', '""') + '"'
    return cell


@st.composite
def tables(draw: st.DrawFn, required: tuple[str, ...]) -> Written:
    columns = draw(st.permutations([*required, *draw(st.lists(NAMES, max_size=3, unique=True))]))
    separator = draw(st.sampled_from(";,")) if len(columns) > 1 else ";"  # of one column's header it is the default
    end, mark = draw(st.sampled_from(["\n", "\r\n", "\r"])), draw(st.booleans())
    lines, written = [separator.join(draw(SPACES) + column + draw(SPACES) for column in columns)], Written(required)
    kinds = draw(st.lists(st.sampled_from(["good", "good", "blank", "empty", "short", "long"]), max_size=12))
    for kind in [*kinds, "good"]:
        line = 1 + "\n".join(lines).count("\n") + 1
        if kind == "blank":
            lines.append(draw(SPACES))
            continue
        cells = {column: draw(CELLS) for column in columns}
        for column in required:
            if not cells[column].strip():
                cells[column] = "x"
        fields = list(cells.values())
        if kind == "good":
            written.rows[line] = {column: cell.strip() for column, cell in cells.items()}
        elif kind == "empty":
            missing = draw(st.lists(st.sampled_from(required), min_size=1, unique=True))
            fields = [draw(SPACES) if column in missing else cell for column, cell in cells.items()]
            written.faults[line] = "empty " + " and ".join(column for column in required if column in missing)
        else:
            short = kind == "short" and len(fields) > 1
            fields = fields[: draw(st.integers(1, len(fields) - 1))] if short else [*fields, "x"]
            written.faults[line] = f"{len(fields)} instead of {len(columns)} fields"
        always = draw(st.booleans()) or len(fields) == 1  # a lone field of spaces is a blank line
        lines.append(separator.join(quoted(cell, separator, always) for cell in fields))
    text = "\n".join(lines) + "\n" * draw(st.booleans())
    written.content = b"\xef\xbb\xbf" * mark + text.replace("\n", end).encode()
    return written


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([REQUIRED, REQUIRED[1:]]).flatmap(tables))
def test_every_row_comes_back_and_every_bad_one_by_its_line(tmp_path_factory, written):
    path: Path = tmp_path_factory.getbasetemp() / "table.csv"
    path.write_bytes(written.content)
    table = read_table(path, written.required, "data.csv")
    assert table.rows == written.rows
    assert table.faults.keys() == written.faults.keys()
    assert all(table.faults[line].startswith(fault) for line, fault in written.faults.items())
