"""Which pictures train, which validate, and which do neither: whole groups of them, and none on two sides."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor

from datamodules.batches import Sample
from datamodules.files.pictures import Pictures
from datamodules.files.tables import Table, has_value
from datamodules.files.walk import listed
from datamodules.stream import derive_seed
from medsynth.errors import UserError

Progress = Callable[[int, int], None]
Groups = Mapping[str, str]
"""The group of each picture, by its name."""

_PIECE = 4096  # bytes that are compared before a whole file is read
_BLOCK = 64  # files that a thread is given at once: to look at one alone takes less than to hand it over
_MANY = 1024  # files from which on their reading is worth a progress bar


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture (the name that its `Pictures` opens it by), one of its prompts, and other wordings of that prompt.

    is_prior: a class picture of a prior-preservation loss. label: class index, or None where there are no classes.
    """

    picture: str
    prompt: str
    paraphrases: tuple[str, ...] = ()
    is_prior: bool = False
    label: int | None = None

    def sample(self, picture: Tensor | None, caption: str, control: Tensor | None) -> Sample:
        """The pair as it is shown this time."""
        return Sample(picture, caption, control, self.is_prior, self.label, derive_seed("picture", self.picture))


def picture_names(pairs: Iterable[Pair]) -> list[str]:
    """The pictures of the pairs, sorted, each once."""
    return sorted({pair.picture for pair in pairs})


@dataclass(frozen=True)
class Contents:
    """What `check` found.

    train, val: pairs by split. pictures: what opens them. summary: counts by plain names. evaluation: prompts that
    evaluation asks for instead of those of `val`. classes: the name of each label, where pairs have labels. test: names
    of the pictures that do neither. groups: of all these pictures, where `data.group` is set. notes: lines on what
    lies in the folder and is not read. mask_levels: grey values of all masks, where there are some, all were read, and
    the values are few.
    """

    train: list[Pair]
    val: list[Pair]
    pictures: Pictures
    summary: dict[str, int]
    evaluation: list[str] | None = None
    classes: list[str] | None = None
    test: list[str] = field(default_factory=list)
    groups: Groups | None = None
    notes: list[str] = field(default_factory=list)
    mask_levels: list[int] | None = None

    def sides(self) -> dict[str, list[str]]:
        """The pictures that train, validate and do neither, class pictures of a prior aside; of those that train and
        validate both, the training."""
        train, val = (picture_names(p for p in pairs if not p.is_prior) for pairs in (self.train, self.val))
        known = set(train)
        return {"train": train, "validation": [name for name in val if name not in known], "test": self.test}

    def compare_sides(self, on_duplicates: str, on_progress: Progress | None) -> None:
        """Count the groups of each side in `summary`, and name the pictures that are the same on two in `notes`.

        Raises:
            UserError: a group is on two sides; pictures are the same on two and `on_duplicates` is "fail".
        """
        sides, groups = self.sides(), self.groups
        if groups is not None:
            require_whole_groups(groups, sides)
            counts = {side: len({groups[name] for name in names}) for side, names in sides.items()}
            self.summary["groups"] = sum(counts.values())
            self.summary.update({f"{side} groups": count for side, count in counts.items() if sides[side]})
        if same := same_pictures(sides, self.pictures, on_progress):
            if on_duplicates == "fail":
                raise UserError(f"data.on_duplicates=fail: {told(same)}; remove one, or join them by data.group")
            self.notes.append(told(same))

    def pictures_fingerprint(self) -> str:
        """SHA-256 of the file name, without folders, and the bytes, counted, of the pictures that train and that
        validate."""
        content = {
            side: sorted((name.rpartition("/")[2], self.pictures.length(name)) for name in names)
            for side, names in self.sides().items()
            if side != "test"
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_groups(
    setting: str, tables: Iterable[Table], look: Callable[[Any], tuple[str, Mapping[str, Any]]]
) -> dict[str, str]:
    """The group of each picture that the rows of the tables name, as `data.group` says; rows without one are rejected.

    Args:
        setting: a column, or a regular expression of a picture's name whose groups, else whole match, are the group.
        look: gives a row's picture and its columns.

    Raises:
        UserError: `setting` is no column, and no regular expression that matches any name.
    """
    rows = [(table, place, *look(row)) for table in tables for place, row in table.rows.items()]
    if any(setting in columns for *_, columns in rows):
        found, fault = [_from_column(setting, columns) for *_, columns in rows], f"has no {setting} for data.group"
    else:
        known = ", ".join(sorted({column for *_, columns in rows for column in columns}))
        try:
            pattern = re.compile(setting)
        except re.error as error:
            raise UserError(
                f"data.group={setting} is no column ({known}) and no regular expression ({error})"
            ) from None
        found, fault = [_from_name(pattern, name) for _, _, name, _ in rows], f"data.group={setting} is not in its name"
        if rows and not any(found):
            raise UserError(
                f"data.group={setting} is no column ({known}) and, as a regular expression, is in no picture's name, "
                f"such as {rows[0][2]}"
            )
    groups: dict[str, str] = {}
    for (table, place, name, _), group in zip(rows, found, strict=True):
        if not group:
            table.reject(place, fault)
        elif groups.setdefault(name, group) != group:
            table.reject(place, f"{name} has {setting} {group} here and {groups[name]} in another row")
    return groups


def _from_column(column: str, columns: Mapping[str, Any]) -> str:
    value = columns.get(column)
    if value is None or isinstance(value, str):
        return value if value and has_value(value) else ""
    return json.dumps(value)


def _from_name(pattern: re.Pattern[str], name: str) -> str:
    match = pattern.search(name)
    if not match or None in match.groups():
        return ""
    return "/".join(match.groups()) or match[0]


def hold_out(
    names: Collection[str], count: int, seed: int, groups: Groups | None = None, decided: dict[str, bool] | None = None
) -> set[str]:
    """About `count` of the pictures, drawn by seed.

    A picture's rank comes from its name alone, so that one picture more or less leaves nearly all others where they
    were. With groups, theirs do: each is held out that still fits, and one more where that comes nearer to `count`;
    one at least, and never all.

    decided: the groups of which is known already whether they are held out; gets those of these pictures.

    Raises:
        UserError: all pictures are one group.
    """
    if groups is None:
        return set(sorted(names, key=lambda name: derive_seed(seed, "split", name))[:count])
    decided = {} if decided is None else decided
    members: dict[str, list[str]] = {}
    for name in sorted(names):
        members.setdefault(groups[name], []).append(name)
    if count and len(members) == 1 and not decided:
        raise UserError(f"data.group: all {len(names)} pictures are of the group {groups[name]}: none can be held out")
    held = {group for group in members if decided.get(group)}
    taken, skipped = sum(len(members[group]) for group in held), []
    for group in sorted(members.keys() - decided.keys(), key=lambda group: derive_seed(seed, "split", group)):
        if taken + len(members[group]) <= count:
            held.add(group)
            taken += len(members[group])
        else:
            skipped.append(group)
    if skipped and len(members) - len(held) > 1 and count:
        smallest = min(skipped, key=lambda group: len(members[group]))
        if not held or taken + len(members[smallest]) - count < count - taken:
            held.add(smallest)
    decided.update({group: group in held for group in members})
    return {name for group in held for name in members[group]}


def require_whole_groups(groups: Groups, sides: Mapping[str, Collection[str]]) -> None:
    """Refuse a given split that parts a group; sides: the pictures that train, validate, do neither."""
    first: dict[str, tuple[str, str]] = {}
    parted: dict[str, str] = {}
    for side, names in sides.items():
        for name in names:
            before, other = first.setdefault(groups[name], (side, name))
            if before != side:
                parted.setdefault(groups[name], f"{other} ({before}) and {name} ({side})")
    if parted:
        group, where = next(iter(parted.items()))
        more = f", and {len(parted) - 1} groups more" * (len(parted) > 1)
        raise UserError(
            f"data.group: the folders of the split part the group {group}, {where}{more}: move its pictures into one"
        )


def same_pictures(
    sides: Mapping[str, Collection[str]], pictures: Pictures, on_progress: Progress | None = None
) -> list[tuple[str, ...]]:
    """Pictures of the same bytes on more than one side, as `name (side)`, each set of them once.

    Only files of one length on two sides are opened; pieces of them are compared before any is read whole.
    """
    side_of = {name: side for side, names in sides.items() for name in names}

    def shared(key: Callable[[str], Any], names: Iterable[str]) -> list[list[str]]:
        """The names whose keys are the same, where these are on more than one side."""
        alike: dict[Any, list[str]] = {}
        names = list(names)
        blocks = [names[first : first + _BLOCK] for first in range(0, len(names), _BLOCK)]
        values = chain.from_iterable(pool.map(lambda block: [key(name) for name in block], blocks))
        for name, value in zip(names, values, strict=True):
            alike.setdefault(value, []).append(name)
        return [found for found in alike.values() if len({side_of[name] for name in found}) > 1]

    def pieces(name: str) -> tuple[int, bytes]:
        length = pictures.length(name)
        return length, b"".join(pictures.read(name, length * i // 4, _PIECE) for i in range(1, 4))

    def digest(name: str) -> bytes:
        return hashlib.sha256(pictures.read(name)).digest()

    found: list[tuple[str, ...]] = []
    with ThreadPoolExecutor() as pool:
        suspects = [name for alike in shared(pictures.length, side_of) for name in alike]
        first = shared(pieces, suspects)
        total, done = sum(map(len, first)), 0
        for alike in first:
            found += [tuple(f"{name} ({side_of[name]})" for name in same) for same in shared(digest, alike)]
            done += len(alike)
            if on_progress and total >= _MANY:
                on_progress(done, total)
    return found


def told(found: Sequence[tuple[str, ...]]) -> str:
    """The line that says which pictures are the same on two sides."""
    which = listed(" = ".join(same[:2]) for same in found)
    return (
        f"{len(found)} picture{'s are' if len(found) > 1 else ' is'} on two sides of the split, byte for byte: {which}"
    )
