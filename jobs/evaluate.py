"""`medsynth evaluate`: score a run, or a folder of pictures against a folder of real ones."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from medsynth.errors import UserError

if TYPE_CHECKING:
    from jobs.scoring.claims import Claims
    from jobs.scoring.folders import Reading
    from jobs.scoring.gates import Gate
    from metrics.protocol import Protocol

_READING = ("resolution", "square", "sixteen_bit", "window", "extractor", "weights", "resize")
"""Options that a run decides where one is named."""


class _Wanted(NamedTuple):
    """What is asked for beside the scores, and on what."""

    intervals: bool
    by: str | None
    gates: "list[Gate]"
    search: tuple[Path | None, Path | None, Path | None] | None
    """Of copies: folders of training and of held-out pictures, and the sheet."""
    device: str
    batch_size: int
    workers: int


@click.command()
@click.argument("run_dir", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@click.option("--like", metavar="RUN", type=click.Path(path_type=Path), help="Score by the protocol of this run.")
@click.option("--real", type=click.Path(path_type=Path), help="Folder of real pictures, searched in depth.")
@click.option("--fake", type=click.Path(path_type=Path), help="Folder of generated pictures, likewise.")
@click.option("--extractor", help="inception, random (needs no weights), clef or transformers. [default: inception]")
@click.option("--weights", help="Its weights: a file or a model's folder. [default: torch-fidelity's download]")
@click.option(
    "--resize", type=click.Choice(["tensorflow", "clean"]), help="To Inception's input. [default: tensorflow]"
)
@click.option(
    "--resolution", type=click.IntRange(1),
    help="Make pictures squares of this many pixels first, as training's references are. [default: the generated "
    "pictures' size, where they are squares of one size]",
)  # fmt: skip
@click.option(
    "--square", type=click.Choice(["crop", "pad"]),
    help="How they become squares: data.square of the data set; canine_hip's is pad. [default: crop]",
)  # fmt: skip
@click.option(
    "--sixteen-bit", type=click.Choice(["full", "range", "window"]),
    help="How pictures of more than 8 bits are shown: data.sixteen_bit of the data set; chest_xray's is window. "
    "[default: full]",
)  # fmt: skip
@click.option("--window", type=(float, float), metavar="CENTRE WIDTH", help="As data.window. [default: none]")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Pictures at once.")
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True, help="Processes that read pictures.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="File for the scores and by what they are scores, .json or .csv."
)
@click.option(
    "--checkpoint", type=click.Choice(["best", "last"]), default="best", show_default=True, help="RUN's weights."
)
@click.option(
    "--by",
    metavar="COLUMN",
    help="Score each group too that this column of a CSV file beside both sides has; `folder`: each class folder.",
)
@click.option("--memorisation", is_flag=True, help="Look for copies of training pictures among those of --fake.")
@click.option("--train", type=click.Path(path_type=Path), help="Folder of the pictures that were trained on.")
@click.option("--held-out", type=click.Path(path_type=Path), help="Folder of real pictures that were not.")
@click.option("--copies", type=click.Path(path_type=Path), help="PNG file for a sheet of what is nearest to a copy.")
@click.option(
    "--gate", "gates", metavar="SCORE<NUMBER", multiple=True,
    help="End with exit code 3 unless it is so, as memorisation<0.01; repeatable; also <=, > and >=.",
)  # fmt: skip
@click.option("--intervals/--no-intervals", default=True, show_default=True, help="Intervals of 95 %, by a jackknife.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …")
def main(
    run_dir: Path | None, like: Path | None, real: Path | None, fake: Path | None, batch_size: int, workers: int,
    out: Path | None, checkpoint: str, by: str | None, intervals: bool, device: str, gates: tuple[str, ...],
    **given: Any,
) -> None:  # fmt: skip
    """Score generated pictures against real ones: FID, KID, Inception Score, precision, recall, F1.

    RUN is the directory of a training run: the pictures that its training scored are drawn again and scored by the same
    protocol, which gives the number that training logged at that step. --like RUN scores the pictures of --fake by that
    protocol, against the run's real pictures or those of --real. With neither, --real and --fake are folders of any
    size: pictures stream through, of any mode and size, DICOM files too; both sides are brought to the size of the
    generated pictures, as training does it; a line says so.

    --memorisation looks for copies of training pictures among those of --fake, by the split of --like RUN or by --train
    and --held-out; --gate makes a score the condition of exit code 0.
    """
    _check_request(run_dir, like, real, fake, given)
    if by is not None and (real is None or fake is None):
        raise UserError(f"--by {by} goes with --real FOLDER --fake FOLDER, each with a CSV file in it or beside it")
    search = _search(run_dir, like, fake, given, gates)
    from jobs.scoring.claims import as_values
    from jobs.scoring.gates import hold_gates, read_gates
    from jobs.scoring.report import check_out, print_scores, write_report

    wanted = _Wanted(intervals, by, read_gates(gates), search, device, batch_size, workers)
    check_out(out)
    if run_dir is not None:
        claims, protocol, facts = _of_run(run_dir, checkpoint, wanted)
    else:
        assert fake is not None
        claims, protocol, facts = _of_folders(like, real, fake, given, wanted)
    print_scores(claims, protocol)
    report = {"scores": claims.scores, "intervals": as_values(claims.intervals), "groups": claims.groups}
    report |= {"notes": claims.notes, "protocol": protocol.as_dict()}
    write_report(report | _in_short(protocol) | facts, out)
    hold_gates(wanted.gates, claims.scores)


def _check_request(
    run_dir: Path | None, like: Path | None, real: Path | None, fake: Path | None, given: dict[str, Any]
) -> None:
    """Refuse options that contradict each other."""
    if run_dir is not None and (like or real or fake):
        raise UserError(
            "RUN draws and scores its own pictures; for pictures that are there give --like RUN --fake FOLDER"
        )
    if run_dir is None and (fake is None or (real is None and like is None)):
        raise UserError("give RUN, or --real FOLDER --fake FOLDER, or --like RUN --fake FOLDER")
    decided = [f"--{name.replace('_', '-')}" for name in _READING if given[name] is not None]
    if decided and (run_dir or like):
        raise UserError(f"{', '.join(decided)}: the protocol is the run's; leave it out")


def _search(
    run_dir: Path | None, like: Path | None, fake: Path | None, given: dict[str, Any], gates: tuple[str, ...]
) -> tuple[Path | None, Path | None, Path | None] | None:
    """What copies are looked for by, see `_Wanted`; None where they are not."""
    train, held_out, sheet = given["train"], given["held_out"], given["copies"]
    named = any(gate.strip().startswith(("memorisation", "authenticity")) for gate in gates)
    if not (given["memorisation"] or named or train or held_out or sheet):
        return None
    if run_dir is not None or fake is None:
        raise UserError(
            "copies are looked for in --fake FOLDER: draw with `medsynth sample RUN`, then --like RUN --fake"
        )
    if (train is None) != (held_out is None) or (train is None and like is None):
        raise UserError("copies are told by --train FOLDER and --held-out FOLDER, or by the split of --like RUN")
    return train, held_out, sheet


def _in_short(protocol: "Protocol") -> dict[str, Any]:
    """What reports had before they had the whole protocol, by the names of then."""
    said = {name: getattr(protocol, name) for name in ("resolution", "square", "sixteen_bit", "window")}
    counts = {"real_pictures": protocol.real, "fake_pictures": protocol.fake}
    return {**counts, "extractor": protocol.weights, **said}


def _of_run(run_dir: Path, checkpoint: str, wanted: _Wanted) -> "tuple[Claims, Protocol, dict[str, Any]]":
    """Scores of a run's own pictures, their protocol, and what else the report has."""
    from callbacks.durable import read_manifest
    from jobs.run.folder import find_checkpoint, pick_device
    from jobs.scoring.gates import check_gates
    from jobs.scoring.run import names_of, open_run, score_run

    place = pick_device(wanted.device)
    run = open_run(run_dir)
    check_gates(wanted.gates, names_of(run))
    step = read_manifest(find_checkpoint(run_dir, checkpoint))["global_step"]
    click.echo(f"{run_dir}: weights of step {step}")
    return score_run(run, checkpoint, place, wanted.intervals), run.protocol, {"run": str(run_dir), "step": step}


def _of_folders(
    like: Path | None, real: Path | None, fake: Path, given: dict[str, Any], wanted: _Wanted
) -> "tuple[Claims, Protocol, dict[str, Any]]":
    """Scores of pictures that are there, likewise."""
    from jobs.run.folder import pick_device
    from jobs.scoring.claims import add_groups, claim
    from jobs.scoring.copies import SCORES, add_copies, check_sheet
    from jobs.scoring.folders import described, stream
    from jobs.scoring.gates import check_gates
    from jobs.scoring.groups import groups_of_both
    from jobs.scoring.sides import open_sides, search_of
    from metrics.suite import GenerationMetrics, all_names

    features = {key: given[key] for key in ("extractor", "weights", "resize")}
    sides = open_sides(like, real, fake, _reading(given), features)
    groups = groups_of_both(sides.real, sides.fake, wanted.by) if wanted.by else None
    check_sheet(wanted.search[2] if wanted.search else None)
    search = search_of(sides, *wanted.search) if wanted.search else None
    check_gates(wanted.gates, [*all_names(sides.extractor), *(SCORES if search else ())])
    keep = wanted.intervals or groups is not None
    metrics = GenerationMetrics(sides.extractor, len(sides.real), len(sides.fake), keep_logits=keep)
    metrics = metrics.to(pick_device(wanted.device))
    for line in sides.notes:
        click.echo(line)
    stream(sides.real, metrics.update_real, "real", wanted.batch_size, wanted.workers)
    stream(sides.fake, metrics.update_fake, "generated", wanted.batch_size, wanted.workers)
    claims = claim(metrics, wanted.intervals)
    if groups:
        add_groups(claims, metrics, *groups)
    if search:
        add_copies(claims, search, sides.fake, sides.extractor, wanted.batch_size, wanted.workers)
    return claims, sides.protocol, {name: described(sizes) for name, sizes in sides.sizes.items()}


def _reading(given: dict[str, Any]) -> "Reading":
    from datamodules.files.pictures import check_window
    from jobs.scoring.folders import Reading

    check_window(given["window"], used=True)
    return Reading(given["resolution"], given["square"] or "crop", given["sixteen_bit"] or "full", given["window"])


if __name__ == "__main__":
    from jobs.cli import run

    run("evaluate")
