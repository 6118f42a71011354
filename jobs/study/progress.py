"""How far a study is, and the config of each run once what it builds on is known."""

from collections.abc import Collection, Mapping

import click
from omegaconf import DictConfig

from jobs.run.registry import nearest
from jobs.study.choose import choose
from jobs.study.plan import Run, all_runs, check_all, load_run_config, refuse_contradiction, runs_of
from jobs.study.read import Stage, Study
from jobs.study.record import Record, State, mlflow_of, read_record, refuse_another_study
from medsynth.errors import UserError


class Progress:
    """How far a study is: of each run its record, of each stage its best."""

    def __init__(self, study: Study, skip_failed: bool = False, only: Collection[str] = ()):
        """skip_failed: leave failed runs out of the choice. only: labels of stages or of runs, which alone are meant.

        All is checked now.

        Raises:
            UserError: a run cannot be what its stage says, has begun as another, or is another study's; `only` names
                none.
        """
        self.study, self.skip_failed, self.only = study, skip_failed, frozenset(only)
        known = {name for run in all_runs(study) for name in (run.label, run.stage.name)}
        for name in sorted(self.only - known):
            raise UserError(f"--only {name}: there is no such run{nearest(name, known)}")
        self.configs = check_all(study)
        refuse_another_study(study, all_runs(study))
        self.client = mlflow_of(next(iter(self.configs.values())).tracking.uri)
        self._best: dict[str, DictConfig] = {}

    def records(self) -> dict[str, Record]:
        """Of all runs, by label."""
        return {run.label: read_record(run, self.client) for run in all_runs(self.study)}

    def best_labels(self) -> dict[str, str]:
        """The best run of each stage that has one by now, without a word where one has none."""
        records, found = self.records(), {}
        for stage in self.study.stages:
            try:
                best = choose(stage, runs_of(self.study, stage), records, self.skip_failed)
            except UserError:
                continue
            if best is not None:
                found[stage.name] = best.label
        return found

    def best(self, stage: Stage) -> DictConfig:
        """The config of a stage's best run.

        Raises:
            UserError: it is not known.
        """
        if stage.name not in self._best:
            run = self.chosen(stage)
            assert run is not None, "a stage that others refer to has one, as its file was read"
            self._best[stage.name] = self.config(run)
        return self._best[stage.name]

    def finish(self, stage: Stage) -> None:
        """Choose the best of a stage whose runs have ended, and say which it is.

        Raises:
            UserError: runs failed or have not ended, or none has a score.
        """
        run = self.chosen(stage)
        if run is not None:
            click.echo(f"best of {stage.name}: {run.run_dir}")

    def chosen(self, stage: Stage) -> Run | None:
        """The best run of a stage; None of several runs of which the file asks for no best.

        Raises:
            UserError: as `finish`.
        """
        runs = runs_of(self.study, stage)
        records = {run.label: read_record(run, self.client) for run in runs}
        waiting = [label for label, record in records.items() if record.state in (State.WAITING, State.BEGUN)]
        if waiting:
            raise UserError(f"the best of stage {stage.name} is not known yet: {', '.join(waiting)} not done")
        return choose(stage, runs, records, self.skip_failed)

    def config(self, run: Run) -> DictConfig:
        """The config of a run whose earlier stages are known; refused where it has begun with another one."""
        needs = {name: self.best(self.study.stage(name)) for name in sorted(run.stage.needs)}
        config = load_run_config(self.study, run, needs)
        refuse_contradiction(run, config)
        return config

    def to_train(self, stage: Stage, records: Mapping[str, Record]) -> list[Run]:
        """The runs of a stage that are not done, nor left out because they failed; records: of all runs, by label."""
        left_out = {State.DONE, *([State.FAILED] if self.skip_failed else [])}
        return [run for run in runs_of(self.study, stage) if records[run.label].state not in left_out]

    def meant(self, run: Run) -> bool:
        """Whether `only` is silent or names the run or its stage."""
        return not self.only or bool({run.label, run.stage.name} & self.only)
