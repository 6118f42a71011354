"""What a call asks for: prompts, classes, what a run validates with, or controls of the user's own."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from datamodules.base import ImageDataModule
from datamodules.batches import Conditions
from datamodules.files.tables import Table, drop_bad_rows, read_table
from datamodules.files.walk import is_hidden, listed
from jobs.drawing.request import Request
from jobs.run.config import instantiate
from jobs.run.folder import build_source, class_names, mask_levels, require_same_classes
from jobs.run.registry import data_class, nearest
from lightning_modules.base import GenerativeModule
from medsynth.errors import UserError

_NAME_COLUMNS = ("Filename", "Control")
_NEGATIVE = "Negative"


@dataclass(frozen=True)
class Asked:
    """What each picture is to show.

    names: of the files, without suffix. texts: each in words, as text fields. rows: row numbers -> their `Conditions`,
    which are read by the batch. steering: which kinds of `controls`, in the order of their channels, steer. data: whose
    controls these are.
    """

    names: list[str]
    texts: list[dict[str, str]]
    rows: Callable[[list[int]], Conditions]
    controls: list[str] = field(default_factory=list)
    steering: list[str] = field(default_factory=list)
    data: ImageDataModule | None = None

    def with_negatives(self, given: list[str]) -> "Asked":
        """The same, led away from those prompts, of which "" is none."""
        if not any(given):
            return self
        texts = [
            text | ({"negative_prompt": away} if away else {}) for text, away in zip(self.texts, given, strict=True)
        ]
        rows = self.rows
        return replace(
            self, texts=texts, rows=lambda numbers: replace(rows(numbers), negatives=[given[i] for i in numbers])
        )

    def control_pictures(self, conditions: Conditions) -> dict[str, np.ndarray]:
        """What steers the one row of conditions, as pictures by kind."""
        if self.data is None or conditions.control is None:
            return {}
        pictures = self.data.control_pictures(conditions.control[0])
        return {kind: pixels for kind, pixels in pictures.items() if kind in self.steering}


def ask(request: Request, run_dir: Path, config: DictConfig, module: GenerativeModule, guidance: float | None) -> Asked:
    """What the request asks a run's method for; `module` need not be built.

    Raises:
        UserError: the method cannot draw for it; a file, a row, a class or a control is missing or not sound.
    """
    who = f"{run_dir}: {config.method}"
    _require(request, module, who)
    if request.controls is not None:
        asked, negatives = _own_controls(request, request.controls, run_dir, config, module)
    elif request.validation is not None:
        asked, negatives = _validation(request.validation, run_dir, config, module), []
    elif request.per_class is not None:
        asked, negatives = _each_class(run_dir, request.per_class), []
    elif request.labels is not None:
        asked, negatives = _classes(run_dir, request.labels, request.count or 1), []
    elif request.of_nothing:
        asked, negatives = _of_nothing(request.count or 1), []
    else:
        asked, negatives = _prompts(request)
    negatives = [away or request.negative or "" for away in negatives or [""] * len(asked.names)]
    if any(negatives):
        _require_negatives(module, guidance, who, "--negative" if request.negative else f"the column {_NEGATIVE}")
    return asked.with_negatives(negatives)


def _require(request: Request, module: GenerativeModule, who: str) -> None:
    """Raise UserError unless the method draws for conditions of that kind, or for some where it is to validate."""
    kinds, steered = module.supports.conditions, module.steered_by()
    drawn = f"{who} draws for {', '.join(sorted(kinds))}"
    if module.supports.unconditional:
        if not request.of_nothing:
            raise UserError(f"{who} draws for no conditions: give --count N and nothing else that says what to draw")
        return
    if not kinds:
        raise UserError(f"{who} draws no pictures for prompts")
    if request.of_nothing:
        raise UserError(f"--count: {drawn}: say which")
    if request.validation is not None:
        return
    if request.controls is not None and not steered:
        raise UserError(f"--controls: {drawn}, not for control")
    if request.controls is None and steered:
        raise UserError(f"{who} is steered by {', '.join(steered)}: give --controls FOLDER, or --validation COUNT")
    kind = "captions" if request.labels is None and request.per_class is None else "labels"
    if request.controls is None and kind not in kinds:
        raise UserError(f"{drawn}, not for {kind}")


def _require_negatives(module: GenerativeModule, guidance: float | None, who: str, given: str) -> None:
    if not module.supports.negatives:
        raise UserError(f"{given}: {who} is led away from no words; leave it out")
    if module.sampling(guidance=guidance).get("guidance") == 1:
        raise UserError(f"{given}: with guidance 1 nothing is led away from; give another --guidance")


def _numbered(count: int) -> list[str]:
    return [f"{i:06d}" for i in range(count)]


def _prompts(request: Request) -> tuple[Asked, list[str]]:
    if request.prompts is None:
        captions, negatives = [request.prompt or ""] * (request.count or 1), []
    else:
        rows = list(_read(request.prompts, ("Prompt", _NEGATIVE)).rows.values())
        captions, negatives = [row["Prompt"] for row in rows], [row.get(_NEGATIVE, "") for row in rows]
    return _words(captions), negatives


def _of_nothing(count: int) -> Asked:
    return Asked(_numbered(count), [{}] * count, lambda rows: Conditions([""] * len(rows)))


def _words(captions: list[str]) -> Asked:
    texts = [{"prompt": text} for text in captions]
    return Asked(_numbered(len(captions)), texts, lambda rows: Conditions([captions[i] for i in rows]))


def _read(path: Path, columns: tuple[str, ...]) -> Table:
    """The rows of a prompts file; its columns that are none of these are named."""
    table = read_table(path, ("Prompt",), "--prompts")
    drop_bad_rows([table], "fail")
    unused = [column for column in next(iter(table.rows.values())) if column not in columns]
    if unused:
        click.echo(f"{path}: not used: {', '.join(unused)}; columns are {', '.join(columns)}")
    return table


def _classes(run_dir: Path, labels: str, count: int) -> Asked:
    """`count` pictures of each class, named as the run's split names them or by number."""
    names = class_names(run_dir)
    numbers = {name: number for number, name in enumerate(names)} | {str(i): i for i in range(len(names))}
    asked = []
    for given in (word.strip() for word in labels.split(",")):
        if given not in numbers:
            raise UserError(f"--labels: there is no class {given}{nearest(given, names)}")
        asked += [numbers[given]] * count
    return _labelled(_numbered(len(asked)), names, asked)


def _each_class(run_dir: Path, count: int) -> Asked:
    """`count` pictures of every class of the run, in a folder each; more of them leave the first as they are."""
    names = class_names(run_dir)
    odd = [is_hidden(name) or Path(name).name != name for name in names]  # of a table, it may say anything
    folders = [f"class-{label}" if odd[label] else name for label, name in enumerate(names)]
    files = [f"{folder}/{number}" for number in _numbered(count) for folder in folders]
    return _labelled(files, names, list(range(len(names))) * count)


def _labelled(files: list[str], names: list[str], labels: list[int]) -> Asked:
    texts = [{"label": names[label]} for label in labels]
    return Asked(files, texts, lambda rows: Conditions(labels=torch.tensor([labels[i] for i in rows])))


def _validation(count: int, run_dir: Path, config: DictConfig, module: GenerativeModule) -> Asked:
    """The first rows of evaluation's order, with the controls that are theirs."""
    data, _ = build_source(config)
    if count > (most := data.evaluation_length()):
        click.echo(f"the run validates with {most}, fewer than {count}: they come again, with other noise")
    kinds = module.supports.conditions
    classes = class_names(run_dir) if "labels" in kinds else []
    if classes:
        require_same_classes(data, run_dir)
    texts = [_said(data.evaluation_conditions([i]), kinds, classes) for i in range(count)]
    return Asked(_numbered(count), texts, data.evaluation_conditions, *_steering(config, module, data))


def _said(conditions: Conditions, kinds: frozenset[str], classes: list[str]) -> dict[str, str]:
    """One row of conditions in words: what of it a method of those kinds draws for."""
    text = {}
    if "captions" in kinds and conditions.captions:
        text["prompt"] = conditions.captions[0]
    if "labels" in kinds and conditions.labels is not None:
        text["label"] = classes[int(conditions.labels[0])]
    if "control" in kinds and conditions.control is not None:
        text["control_sha256"] = _digest(conditions.control[0])
    return text


def _digest(control: Tensor) -> str:
    """Of what the network is told, to 16 bits: another machine's last digit is no other control."""
    return hashlib.sha256((control * 65535).round().int().numpy().tobytes()).hexdigest()


def _steering(config: DictConfig, module: GenerativeModule, data: ImageDataModule) -> tuple[Any, ...]:
    steering = module.steered_by()
    return (list(config.data.controls), steering, data) if steering else ([], [], None)


def _own_controls(
    request: Request, folder: Path, run_dir: Path, config: DictConfig, module: GenerativeModule
) -> tuple[Asked, list[str]]:
    """A picture for each control of a folder, named after it."""
    data = data_class(config.data.name)(instantiate(config, "data"), config.seed)
    own = data.own_controls(folder, module.steered_by(), mask_levels(run_dir))
    if unused := [name for name in own.unused if request.prompts is None or not _same(folder / name, request.prompts)]:
        click.echo(f"{folder}: not used: {listed(unused)}")
    words = _words_of_controls(request, own.names, "captions" in module.supports.conditions)
    texts = []
    for name in _tracked(own.names, "controls"):
        paths = "; ".join(path.as_posix() for path in own.paths(name)).encode(errors="replace").decode()
        said = {"prompt": words[name][0]} if words else {}
        texts.append(said | {"control": paths, "control_sha256": _digest(own.steering(name))})

    def rows(numbers: list[int]) -> Conditions:
        names = [own.names[i] for i in numbers]
        captions = [words[name][0] for name in names] if words else None
        return Conditions(captions, control=torch.stack([own.steering(name) for name in names]))

    negatives = [words[name][1] for name in own.names] if words else []
    return Asked(own.names, texts, rows, *_steering(config, module, data)), negatives


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _words_of_controls(request: Request, names: list[str], worded: bool) -> dict[str, tuple[str, str]]:
    """Prompt and negative prompt of each control, by its name; nothing where the method takes no words."""
    if not worded:
        if request.prompts is not None or request.prompt is not None:
            raise UserError("--prompts and --prompt: this method draws for controls alone; leave them out")
        return {}
    words = {} if request.prompts is None else _prompts_by_name(request.prompts, names)
    if missing := [name for name in names if name not in words]:
        if request.prompt is None:
            where = "give --prompts FILE or --prompt TEXT"
            if request.prompts is not None:
                where = f"give {request.prompts} rows of them, or --prompt TEXT for those without"
            raise UserError(f"--controls: {len(missing)} controls have no prompt: {listed(missing)}; {where}")
        words |= dict.fromkeys(missing, (request.prompt, ""))
    return words


def _prompts_by_name(path: Path, names: list[str]) -> dict[str, tuple[str, str]]:
    table = _read(path, (*_NAME_COLUMNS, "Prompt", _NEGATIVE))
    columns = [column for column in _NAME_COLUMNS if column in next(iter(table.rows.values()))]
    if len(columns) != 1:
        raise UserError(f"{path}: give it one column {' or '.join(_NAME_COLUMNS)}: which control each prompt is for")
    found: dict[str, tuple[str, str]] = {}
    places: dict[str, int] = {}
    strange, known = [], set(names)
    for line, row in table.rows.items():
        name = _control_called(row[columns[0]], known)
        if name is None:
            strange.append(f"{row[columns[0]]} (row {line})")
        elif name in places:
            raise UserError(f"{path}: rows {places[name]} and {line} are both of {name}; --seeds N draws N of each")
        else:
            places[name], found[name] = line, (row["Prompt"], row.get(_NEGATIVE, ""))
    if strange:
        click.echo(f"{path}: {len(strange)} of its rows are of no control: {listed(strange)}")
    return found


def _control_called(given: str, known: set[str]) -> str | None:
    """The control of that file name, with or without its suffix."""
    return next((name for name in (given, Path(given).with_suffix("").as_posix()) if name in known), None)


def _tracked(items: list[str], title: str) -> Any:
    from rich.progress import track

    return track(items, title, transient=True)
