"""The command `medsynth`; each subcommand is the module of the same name in this package.

Nothing heavy is imported before a subcommand runs, so that `--help` is instant.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable

import click

from medsynth import __version__
from medsynth.errors import UserError, naming_lost_workers
from medsynth.exit_codes import INTERRUPTED, USER_ERROR
from medsynth.process import settle
from medsynth.secrets import without_secrets

COMMANDS = {
    "train": "Train a method from config files.",
    "submit": "Train on Slurm, on Kubernetes, or here in the background.",
    "sweep": "Train the runs of a study, stage by stage.",
    "sample": "Draw pictures for prompts, classes, or controls of your own.",
    "evaluate": "Score a folder of pictures against a folder of real ones.",
    "compare": "Compare the runs of an experiment, and the papers' own figures.",
    "ui": "Show the runs as charts in MLflow.",
    "prepare": "Make phantom data, or fetch pretrained weights.",
    "encode": "Compute a data set's latents once.",
    "track": "Send to MLflow what a run could not send.",
}


def _command(name: str) -> click.Command:
    return importlib.import_module(f"jobs.{name}").main


class _LazyGroup(click.Group):
    """Imports a subcommand's module only when it is called or asked for its options."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from jobs.run.registry import nearest

            raise click.UsageError(f"there is no command {args[0]}{nearest(args[0], COMMANDS)}") from error


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="medsynth")
def main() -> None:
    """Train, launch, score and compare generators of medical images."""


def run(command: str | None = None) -> None:
    """Run `medsynth`, or one subcommand of it."""
    if command is None:
        run_command(lambda: main, "medsynth")
    else:
        run_command(lambda: _command(command), f"medsynth {command}")


def _wait_briefly() -> None:
    """Have OpenMP's threads spin for microseconds, not milliseconds, until there is work again.

    While they spin they take the processor from whoever works; threads that sleep at once wake up too late. It is read
    when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _shown(message: str) -> str:
    """A message without passwords, and without what a terminal would obey in the name of a file."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in without_secrets(message))


def run_command(command: click.Command | Callable[[], click.Command], name: str) -> None:
    """Run a click command, or what gives one. A user's mistake is one line on standard error and exit code 2; Ctrl-C
    ends it with 130, without a traceback."""
    _wait_briefly()
    try:
        settle()
        found = command if isinstance(command, click.Command) else command()
        with naming_lost_workers():
            found.main(prog_name=name, standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(USER_ERROR)
    except (click.exceptions.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more ends it even where leaving takes long
        click.echo("medsynth: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except UserError as error:
        click.echo(f"medsynth: {_shown(str(error))}", err=True)
        sys.exit(error.exit_code)
    finally:
        for number in (signal.SIGUSR1, signal.SIGTERM):  # srun sends one to all once the first has left
            signal.signal(number, signal.SIG_IGN)
