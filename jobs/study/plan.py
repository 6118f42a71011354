"""The runs of a study: where each lies, and the config it trains once what it builds on is known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from jobs.run.checks import check_logged, check_monitor
from jobs.run.config import load_arguments, load_config
from jobs.run.registry import nearest
from jobs.study.read import Point, Stage, Study, resolve
from medsynth.errors import UserError

CONFIG_FILE = "config.yaml"
EXPORT = "export"
# How a run is made, and not what it is: another value makes no other weights.
_HOW = ("hardware.", "tracking.", "preemption.", "run_dir", "data.root", "data.workers", "evaluation.cache")


class Run(NamedTuple):
    """One run of a stage."""

    stage: Stage
    point: Point
    run_dir: Path
    label: str
    """STAGE/NAME, or what of it there is: what `--only` takes."""


def runs_of(study: Study, stage: Stage) -> list[Run]:
    """The runs of a stage, in the order of the file."""
    home = study.folder / stage.name if study.staged else study.folder
    before = f"{stage.name}/" if study.staged else ""
    return [
        Run(stage, point, home / point.name if point.name else home, f"{before}{point.name}".rstrip("/"))
        for point in stage.points
    ]


def all_runs(study: Study) -> list[Run]:
    """Of all stages."""
    return [run for stage in study.stages for run in runs_of(study, stage)]


def arguments_of(study: Study, run: Run, best: Mapping[str, DictConfig]) -> list[str]:
    """What `medsynth train` is given for a run: files and settings.

    best: the config of the best run of each stage that is known; a reference to another stays as it stands.
    """

    def said(stage: str, what: str) -> str:
        return lookup(best[stage], stage, what) if stage in best else f"${{best.{stage}.{what}}}"

    common = [resolve(setting, said) for setting in run.stage.settings]
    own = [value.setting() for value in run.point.values]
    tracked = {"tracking.parent": str(study.folder), "tracking.run_name": run.label}
    given = {setting.partition("=")[0] for setting in (*common, *own)}
    extra = [f"{key}={value}" for key, value in tracked.items() if key not in given]
    return [*study.under, *run.stage.files, *common, *extra, *own, f"run_dir={run.run_dir}", *study.arguments]


def lookup(config: DictConfig, stage: str, what: str) -> str:
    """What `${best.STAGE.WHAT}` stands for, where `config` is that of the stage's best run.

    Raises:
        UserError: the run has no such key.
    """
    if what == EXPORT:
        return str(Path(config.run_dir) / EXPORT)
    try:
        value = OmegaConf.select(config, what, throw_on_missing=True, default=_NONE)
    except Exception:  # of a key that cannot be one
        value = _NONE
    if value is _NONE:
        keys = ["run_dir", EXPORT, *_flat(OmegaConf.to_container(config))]
        raise UserError(f"${{best.{stage}.{what}}}: its runs have no key {what}{nearest(what, keys)}")
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


_NONE = object()


def load_run_config(study: Study, run: Run, best: Mapping[str, DictConfig]) -> DictConfig:
    """The config of a run whose references are all in `best`.

    Raises:
        UserError: as `jobs.run.config.load_config`; or the run will log nothing by the name that the best is chosen by.
    """
    try:
        config = load_arguments(arguments_of(study, run, best))
        check_monitor(config)
        if run.stage.choose is not None:
            check_logged(config, "choose.metric", run.stage.choose.metric)
        return config
    except UserError as error:
        where = f"stage {run.stage.name}: " if study.staged else ""
        raise UserError(f"{where}{error}") from None


def check_all(study: Study) -> dict[str, DictConfig]:
    """Load the config of every run, with each stage's first run as its best; the configs by label.

    Raises:
        UserError: one cannot be, as `load_run_config` says.
    """
    stand_ins: dict[str, DictConfig] = {}
    found = {}
    for stage in study.stages:
        for run in runs_of(study, stage):
            found[run.label] = load_run_config(study, run, stand_ins)
            stand_ins.setdefault(stage.name, found[run.label])
    return found


def refuse_contradiction(run: Run, config: DictConfig) -> None:
    """Raise UserError where the run has begun with another config than the study now says."""
    path = run.run_dir / CONFIG_FILE
    if not path.is_file():
        return
    before, now = (_flat(OmegaConf.to_container(each, resolve=True)) for each in (load_config([path]), config))
    for key in sorted(before.keys() | now.keys()):
        if not key.startswith(_HOW) and before.get(key) != now.get(key):
            raise UserError(
                f"{run.run_dir} was trained with {key}={before.get(key)}, and {key}={now.get(key)} is asked for; put "
                "that back, or choose another folder"
            )


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
