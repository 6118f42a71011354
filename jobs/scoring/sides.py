"""The two sides of a score, real and generated pictures, read by one protocol."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from datamodules.base import ImageDataModule, SizedDataset
from jobs.scoring.copies import Search
from jobs.scoring.folders import Reading, ScoredFolder, Sizes, said_of_sizes, same_bytes, side_of
from jobs.scoring.run import open_run
from medsynth.errors import UserError
from metrics.extractors import FeatureExtractor, build_extractor
from metrics.protocol import Protocol, protocol_of
from metrics.suite import MAX_BANK

SETTING = "give --weights PATH or --extractor random"


@dataclass
class Sides:
    """Pictures of both sides, what looks at them, and by what their scores will be scores."""

    real: SizedDataset
    fake: ScoredFolder
    extractor: FeatureExtractor
    protocol: Protocol
    notes: list[str] = field(default_factory=list)
    """What is to be said before the work."""
    sizes: dict[str, Sizes] = field(default_factory=dict)
    """Of the sides that lie in folders, as they lie."""
    data: ImageDataModule | None = None
    """That of the run whose protocol it is."""


def open_sides(
    like: Path | None, real: Path | None, fake: Path, reading: Reading, features: Mapping[str, str | None]
) -> Sides:
    """Both sides as the options have them, or `like` a run, whose real pictures are those without `real`.

    features: of the extractor, `extractor`, `weights` and `resize`, None where one was not given.

    Raises:
        UserError: folders, pictures, weights or the run are not what they should be.
    """
    if like is not None:
        return _like_a_run(like, real, fake)
    assert real is not None
    reals, fakes = ScoredFolder(real, reading), ScoredFolder(fake, reading)
    name = features["extractor"] or "inception"
    network = build_extractor(name, features["weights"], SETTING, features["resize"] or "tensorflow")
    real_sizes, fake_sizes = reals.sizes(), fakes.sizes()
    if network.name != "clef":  # the organisers take pictures as they lie
        reading.resolution = reading.resolution or side_of(fake_sizes)
    counted = {"reference": "folder", "split_seed": None, "real": len(reals), "fake": len(fakes), "bank": MAX_BANK}
    protocol = protocol_of(network, reading.facts(), **counted)
    shared = same_bytes(reals, fakes)
    alike = [f"{shared} of {len(fakes)} generated pictures are byte for byte among the real ones"] if shared else []
    notes = [
        *reals.notes,
        *fakes.notes,
        *alike,
        *said_of_sizes(real_sizes, fake_sizes, reading.resolution, reading.square),
    ]
    return Sides(reals, fakes, network, protocol, notes, {"real_sizes": real_sizes, "fake_sizes": fake_sizes})


def _like_a_run(like: Path, real: Path | None, fake: Path) -> Sides:
    run = open_run(like)
    read = run.protocol
    reading = Reading(
        read.resolution, read.square, read.sixteen_bit, (read.window[0], read.window[1]) if read.window else None
    )
    fakes = ScoredFolder(fake, reading)
    sizes = {"fake_sizes": fakes.sizes()}
    reals: SizedDataset = run.data.reference_set(run.scoring.config.reference)
    counted = {"reference": read.reference, "split_seed": read.split_seed}
    notes = list(fakes.notes)
    if real is not None:
        reals = folder = ScoredFolder(real, reading)
        sizes["real_sizes"] = folder.sizes()
        counted = {"reference": "folder", "split_seed": None}
        notes += folder.notes
    counts = {"real": len(reals), "fake": len(fakes), "bank": MAX_BANK}
    protocol = protocol_of(run.scoring.extractor, run.data.reading(), **counted, **counts)
    if changed := protocol.differences(read):
        notes.append(f"not comparable with the scores that {like} has logged: {'; '.join(changed)}")
    return Sides(reals, fakes, run.scoring.extractor, protocol, notes, sizes, run.data)


def search_of(sides: Sides, train: Path | None, held_out: Path | None, sheet: Path | None) -> Search:
    """What copies are told by: two folders, or the split of the run.

    Raises:
        UserError: there is no such folder, or a picture lies in both.
    """
    if train is None or held_out is None:
        assert sides.data is not None  # where no folders are named
        return Search(sides.data.reference_set("train"), sides.data.reference_set("val"), sheet)
    training, held = (ScoredFolder(folder, sides.fake.reading) for folder in (train, held_out))
    if common := same_bytes(training, held):
        raise UserError(
            f"{common} of {len(held)} pictures of {held_out} are byte for byte in {train}, too: hold out others"
        )
    return Search(training, held, sheet)
