"""Options of the commands that look at an experiment's runs."""

import click

from jobs.tracking.server import DEFAULT_EXPERIMENT

experiment = click.option(
    "--experiment", metavar="NAME", default=DEFAULT_EXPERIMENT, show_default=True, help="MLflow experiment."
)
tracking_uri = click.option(
    "--tracking-uri",
    metavar="URI",
    show_default="$MLFLOW_TRACKING_URI, else sqlite:///mlruns.db",
    help="MLflow server (http://…) or database.",
)
