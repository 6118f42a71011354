"""The file of a study: stages, the runs of each, and which of an earlier stage's a later one builds on.

    config: FILE                     what all runs begin with; a list of files is merged in order
    folder: runs/NAME                where all of it lies; by default runs/ and the name of the file
    set: {KEY: VALUE, …}             settings of all runs
    report: [eval/fid, …]            metrics of the table
    stages:
      NAME:
        config: …, set: …            of this stage, the first in the other's place, the second over it; `set` may refer
                                     to an earlier stage: ${best.STAGE.run_dir}, ${best.STAGE.export}, ${best.STAGE.KEY}
        grid: {KEY: [VALUE, …], …}   a run for each point of the product …
        list: [{KEY: VALUE, …}, …]   … times each of these; `name` beside the keys names it
        choose: {metric: eval/fid, mode: min}
        paper: [{KEY: VALUE, METRIC: VALUE, …}, …]

Without `stages` the file is of one stage, whose keys stand at the top. Nothing here brings torch.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from jobs.run.registry import nearest
from jobs.run.sources import is_setting, read_file
from medsynth.errors import UserError

_STUDY_KEYS = ("config", "folder", "set", "report", "stages")
_STAGE_KEYS = ("config", "set", "grid", "list", "choose", "paper")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TAKEN = ("tracking", "submit")  # of the study's own folder
_MENTION = re.compile(r"\$\{best\b[^}]*\}?")
_REFERENCE = re.compile(r"\$\{best\.([^.}]+)\.([^}]+)\}")
_LONGEST_NAME = 200


class Value(NamedTuple):
    """One value of one key: as it is written in the file, where text is text, and as YAML reads it."""

    key: str
    written: Any
    read: Any

    def setting(self) -> str:
        """KEY=VALUE of a command line."""
        return f"{self.key}={_text(self.written)}"


class Point(NamedTuple):
    """What one run of a stage has of its own, and its name in the stage, "" where it is the only one."""

    name: str
    values: tuple[Value, ...] = ()


class Choose(NamedTuple):
    """By what the best run of a stage is chosen, and whether the lowest ("min") or the highest ("max") is."""

    metric: str
    mode: str


@dataclass(frozen=True)
class Stage:
    """Runs that can go at once."""

    name: str
    files: tuple[str, ...]
    settings: tuple[str, ...]
    """KEY=VALUE of all its runs, references unresolved."""
    points: tuple[Point, ...]
    choose: Choose | None = None
    paper: tuple[Mapping[str, Any], ...] = ()
    needs: frozenset[str] = frozenset()
    """The stages whose best it refers to."""

    @property
    def swept(self) -> tuple[str, ...]:
        """The keys by which its runs differ, in the order of the file."""
        return tuple(dict.fromkeys(value.key for point in self.points for value in point.values))


@dataclass(frozen=True)
class Study:
    """A whole file."""

    path: Path
    folder: Path
    stages: tuple[Stage, ...]
    staged: bool
    """Whether it has `stages`; where not, its one stage has no folder of its own."""
    report: tuple[str, ...] = ()
    arguments: tuple[str, ...] = field(default=())
    """Further files and settings, of the command line: they hold for all runs."""
    under: tuple[str, ...] = field(default=())
    """Files that lie under the configs of all runs."""

    @property
    def name(self) -> str:
        return self.path.stem

    def stage(self, name: str) -> Stage:
        """Raises UserError with the nearest name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UserError(f"{self.path} has no stage {name}{nearest(name, [stage.name for stage in self.stages])}")


def read_study(
    path: Path, arguments: Sequence[str] = (), folder: Path | None = None, under: Sequence[str] = ()
) -> Study:
    """The study of a file.

    arguments: config files and settings that hold for all runs. folder: in the place of the file's own. under: files
    that lie under the configs of all runs.

    Raises:
        UserError: there is no such file, it is no study, or what its stages refer to is not there.
    """
    if not path.is_file():
        raise UserError(f"there is no sweep {path}")
    try:
        written, read = read_file(path), OmegaConf.load(path)
    except UserError:
        raise
    except Exception as error:  # what only the typed reading refuses
        raise UserError(f"{path} is no sweep: {str(error).splitlines()[0]}") from None
    whole = _mapping(path, "it", OmegaConf.to_container(written))
    typed = _mapping(path, "it", OmegaConf.to_container(read))
    staged = "stages" in whole
    _known(path, "it", whole, _STUDY_KEYS if staged else (*_STUDY_KEYS[:-1], *_STAGE_KEYS))
    if staged:
        stages = _read_stages(path, whole, typed)
    else:
        if not {"grid", "list"} & whole.keys():
            raise UserError(f"{path} is no sweep: it has `config: FILE` and `grid: {{KEY: [VALUE, …]}}`, or `stages`")
        own = {key: whole[key] for key in _STAGE_KEYS if key in whole}
        stages = (_read_stage(path, path.stem, {"config": whole.get("config")}, own, typed),)
    _check_references(path, stages)
    report = whole.get("report") or []
    if not isinstance(report, list) or not all(isinstance(key, str) for key in report):
        raise UserError(f"{path}: `report` is a list of metrics, [eval/fid, eval/recall]")
    given = folder or Path(str(whole.get("folder") or f"runs/{path.stem}"))
    study = Study(path, given.expanduser(), stages, staged, tuple(report), tuple(arguments), tuple(under))
    _check_arguments(study)
    return study


def references(text: str) -> Iterator[tuple[str, str]]:
    """Stage and what of its best, for each `${best.STAGE.WHAT}` of a setting.

    Raises:
        UserError: one is not of that form.
    """
    for mention in _MENTION.findall(text):
        match = _REFERENCE.fullmatch(mention)
        if match is None:
            raise UserError(f"{text}: {mention} names nothing; write ${{best.STAGE.run_dir}}, .export or a key")
        yield match[1], match[2]


def resolve(text: str, lookup: Any) -> str:
    """`text` with what `lookup(stage, what)` says in the place of each reference."""
    return _REFERENCE.sub(lambda match: lookup(match[1], match[2]), text)


def _read_stages(path: Path, whole: dict[str, Any], typed: dict[str, Any]) -> tuple[Stage, ...]:
    stages = _mapping(path, "`stages`", whole["stages"])
    if not stages:
        raise UserError(f"{path}: `stages` has none")
    shared, found = {"config": whole.get("config"), "set": whole.get("set") or {}}, []
    as_read = {str(name): own for name, own in typed["stages"].items()}
    for name, own in stages.items():
        if not _NAME.fullmatch(name) or name in _TAKEN or name not in as_read:  # YAML takes no, yes, 0x1 for others
            raise UserError(f"{path}: stage {name}: a name is of letters, digits, - and _, and not tracking or submit")
        settings = _mapping(path, f"stage {name}", {} if own is None else own)
        _known(path, f"stage {name}", settings, _STAGE_KEYS)
        found.append(_read_stage(path, name, shared, settings, as_read[name] or {}))
    return tuple(found)


def _read_stage(
    path: Path, name: str, shared: Mapping[str, Any], own: dict[str, Any], typed: Mapping[str, Any]
) -> Stage:
    """typed: the same as `own` as YAML reads it."""
    files, inline = _read_config(path, name, own.get("config") or shared.get("config"))
    common = {**_mapping(path, "`set`", shared.get("set") or {}), **_mapping(path, "`set`", own.get("set") or {})}
    settings = [*inline, *(f"{key}={_text(value)}" for key, value in common.items())]
    points = _read_points(path, name, own, typed)
    needs = {stage for setting in settings for stage, _ in _of(path, name, setting)}
    paper = typed.get("paper") or []
    if not isinstance(paper, list) or not all(isinstance(row, dict) for row in paper):
        raise UserError(f"{path}: stage {name}: `paper` is a list of rows, [{{KEY: VALUE, METRIC: VALUE}}]")
    choose = _read_choose(path, name, own.get("choose"))
    return Stage(name, files, tuple(settings), points, choose, tuple(paper), frozenset(needs))


def _read_config(path: Path, stage: str, config: Any) -> tuple[tuple[str, ...], list[str]]:
    """Config files, and of a config that stands in the file itself its sections as settings."""
    if isinstance(config, dict):
        return (), [f"{key}={_text(value)}" for key, value in config.items()]
    files = [config] if isinstance(config, str) else config
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise UserError(f"{path} is no sweep: stage {stage} has no `config: FILE`")
    return tuple(files), []


def _read_points(path: Path, stage: str, own: dict[str, Any], typed: Mapping[str, Any]) -> tuple[Point, ...]:
    grid, rows = own.get("grid") or {}, own.get("list")
    if not {"grid", "list"} & own.keys():
        return (Point(""),)
    try:
        axes = [[Value(key, *both) for both in _pairs(grid[key], typed["grid"][key])] for key in grid]
        listed = [_read_row(row, read) for row, read in _pairs(rows, typed["list"])] if rows is not None else [("", ())]
        assert all(axes) and listed and (axes or rows)
    except Exception:  # another shape: all mean the same to the user
        form = "`grid: {KEY: [VALUE, …]}` and `list: [{KEY: VALUE}, …]`"
        raise UserError(f"{path} is no sweep: stage {stage} is not of the form {form}") from None
    points = {}
    for (given, row), values in product(listed, product(*axes)):
        varied = (*row, *values)
        _refuse_repeated(path, stage, [value.key for value in varied])
        name = "_".join(filter(None, [given or _named(row), _named(values)]))
        if name in points or not name:
            raise UserError(f"{path}: two of its runs would have one run_dir, {name}; give each value once")
        if len(name) > _LONGEST_NAME or name in (".", ".."):
            raise UserError(f"{path}: stage {stage}: {name[:40]} cannot name a folder; give `name` in a `list`")
        points[name] = Point(name, varied)
    for value in (value for point in points.values() for value in point.values):
        if _MENTION.search(value.setting()):
            raise UserError(f"{path}: stage {stage}: {value.setting()}: a reference stands in `set`")
    return tuple(points.values())


def _pairs(written: Any, read: Any) -> list[tuple[Any, Any]]:
    assert isinstance(written, list)
    return list(zip(written, read, strict=True))


def _read_row(written: Mapping[str, Any], read: Mapping[str, Any]) -> tuple[str, tuple[Value, ...]]:
    """A run of a `list`: its own name or "", and its values."""
    values = tuple(Value(key, written[key], read[key]) for key in written if key != "name")
    assert values or "name" in written
    return _folder(str(written.get("name", ""))), values


def _named(values: Sequence[Value]) -> str:
    """rank-4: the last word of each key, and its value."""
    return "_".join(_folder(f"{value.key.rpartition('.')[2]}-{value.read}") for value in values)


def _folder(name: str) -> str:
    return name.replace("/", "-").replace("\n", " ")


def _refuse_repeated(path: Path, stage: str, keys: list[str]) -> None:
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{path}: stage {stage}: {key} stands both in `grid` and in `list`")
        if key == "run_dir":
            raise UserError(f"{path}: stage {stage}: run_dir: each run has its own below the study's; leave it out")


def _read_choose(path: Path, stage: str, choose: Any) -> Choose | None:
    if choose is None:
        return None
    where = f"{path}: stage {stage}: choose"
    if not isinstance(choose, dict) or not isinstance(choose.get("metric"), str):
        raise UserError(f"{where}: give {{metric: eval/fid, mode: min}}")
    _known(path, f"stage {stage}: choose", choose, Choose._fields)
    if choose.get("mode") not in ("min", "max"):
        raise UserError(f"{where}: mode={choose.get('mode')}: use min or max")
    return Choose(choose["metric"], choose["mode"])


def _check_references(path: Path, stages: Sequence[Stage]) -> None:
    known = {stage.name: stage for stage in stages}
    for stage in stages:
        for name in sorted(stage.needs - known.keys()):
            raise UserError(f"{path}: stage {stage.name} refers to a stage {name}{nearest(name, known)}")
    try:
        list(TopologicalSorter({stage.name: stage.needs for stage in stages}).static_order())
    except CycleError as circle:
        raise UserError(f"{path}: stages refer to each other in a circle: {' → '.join(circle.args[1])}") from None
    before: set[str] = set()
    for stage in stages:
        for name in sorted(stage.needs):
            if name not in before:
                raise UserError(f"{path}: stage {stage.name} refers to {name}, which comes after it; put that before")
            if len(known[name].points) > 1 and known[name].choose is None:
                raise UserError(
                    f"{path}: stage {stage.name} refers to the best of {name}, which has {len(known[name].points)} "
                    "runs and no `choose: {metric: eval/fid, mode: min}`"
                )
        before.add(stage.name)


def _check_arguments(study: Study) -> None:
    """Refuse settings that would make different runs the same."""
    given = [argument.partition("=") for argument in study.arguments if is_setting(argument)]
    settings = {key: value for key, _, value in given}
    if "run_dir" in settings:
        place = f"{study.folder}/…"
        raise UserError(f"run_dir={settings['run_dir']}: each run of a sweep has its own, {place}; leave it out")
    for argument in study.arguments:
        if _MENTION.search(argument):
            raise UserError(f"{argument}: a reference stands in the file, in `set` of a stage")
    for stage in study.stages:
        for key in set(stage.swept) & settings.keys():
            raise UserError(f"{key}={settings[key]}: the runs of {stage.name} differ by it; leave it out")


def _of(path: Path, stage: str, setting: str) -> list[tuple[str, str]]:
    try:
        return list(references(setting))
    except UserError as error:
        raise UserError(f"{path}: stage {stage}: {error}") from None


def _mapping(path: Path, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path} is no sweep: {what} is to be a mapping, KEY: VALUE")
    return {str(key): each for key, each in value.items()}


def _known(path: Path, what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{path}: {what} has no key {key}{nearest(key, known)}")


def _text(written: Any) -> str:
    return written if isinstance(written, str) else json.dumps(written, ensure_ascii=False)
