"""`medsynth compare`: the runs of an experiment beside the papers' own figures, as a table and as one HTML page."""

from pathlib import Path

import click

from jobs.report import options
from medsynth.files import naming_unwritten, write_whole


@click.command()
@options.experiment
@options.tracking_uri
@click.option(
    "--runs", metavar="RUN", multiple=True, show_default="all", help="Only this run, by name or id; repeatable."
)
@click.option(
    "--metric", metavar="KEY", show_default="the first column", help="Metric to sort by, for instance eval/fid."
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    default="compare.html",
    show_default=True,
    help="Page with table, curves and pictures; one file that needs no other.",
)
@click.option("--no-html", is_flag=True, help="Print the table only.")
def main(
    experiment: str, tracking_uri: str | None, runs: tuple[str, ...], metric: str | None, html: Path, no_html: bool
) -> None:
    """Compare the runs of an experiment with each other and with the papers' own figures."""
    from jobs.report.runs import connect, find_experiment, load_runs
    from jobs.report.table import compare, paper_figures, print_table
    from jobs.tracking.server import public_uri, resolve_uri

    uri = resolve_uri(tracking_uri)
    client = connect(uri)
    found = load_runs(client, find_experiment(client, experiment), experiment, runs, training=not no_html)
    comparison = compare(experiment, found, paper_figures(), metric)
    print_table(comparison)
    if not no_html:
        from jobs.report.page import render_page

        page = render_page(comparison, found, client, public_uri(uri))
        with naming_unwritten(f"--html {html}", "choose another file"):
            html.parent.mkdir(parents=True, exist_ok=True)
            write_whole(html, page)
        click.echo(f"page: {html}")


if __name__ == "__main__":
    from jobs.cli import run

    run("compare")
