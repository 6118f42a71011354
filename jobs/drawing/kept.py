"""Pictures that are kept: PNG files that say what made them, their folder, and its list, `manifest.csv`."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from datamodules.files.control_folder import FOLDERS
from datamodules.files.walk import PictureFolder
from jobs.drawing.listed import COLUMNS, MANIFEST, first_line
from medsynth import __version__
from medsynth.errors import UserError
from medsynth.files import naming_unwritten, put_whole

FACTS = (
    *("kind", "method", "weights", "frozen_weights", "model", "checkpoint_step", "precision", "resolution"),
    *("sampler", "steps", "guidance", "prompt", "negative_prompt", "label", "control_sha256"),
    *("seed", "row", "variant", "noise_seed"),
)
"""Text fields that tell pictures apart; `control` says where a control lay, which its digest does not depend on."""
_MORE = tuple(fact for fact in FACTS if fact not in ("kind", *COLUMNS))
_SHOWN = 48  # characters of a fact in a message


@dataclass(frozen=True)
class Picture:
    """One that a call makes: where, by which text fields, of which row, from which seed of its noise."""

    path: Path
    texts: dict[str, str]
    row: int
    noise_seed: int


def is_kept(path: Path, texts: Mapping[str, str]) -> bool:
    """Whether the picture of those text fields is there whole; not where it is damaged, so that it is made again.

    Raises:
        UserError: it was made of something else, which is named.
    """
    found = _read(path)
    if found is None:
        return False
    info, size = found
    if "synthetic" not in info and "kind" not in info:
        raise UserError(f"{path} is no picture of this command; choose another --out, or remove it")
    if "method" in info and "weights" not in info:
        raise UserError(
            f"{path} was made by an earlier version, which did not say by which weights; choose another --out, or "
            "remove it"
        )
    differing = [key for key in FACTS if info.get(key) != texts.get(key)]
    if differing:
        was = [f"{key} {_short(info.get(key))}, not {_short(texts.get(key))}" for key in differing[:3]]
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise UserError(f"{path} was made with {'; '.join(was)}{more}; choose another --out, or remove it")
    side = int(texts["resolution"])
    if size != (side, side):
        raise UserError(f"{path} is {size[0]}x{size[1]}, not {side}x{side}; choose another --out, or remove it")
    return True


def _read(path: Path) -> tuple[dict[str, Any], tuple[int, int]] | None:
    """Text fields and size of a sound PNG; None where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; choose another --out") from None
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()  # every part's checksum, to the end of the file
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            return {str(key): value for key, value in image.info.items()}, image.size
    except Exception:  # Pillow answers damaged bytes with errors of almost any kind
        return None


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return repr(value if len(value) <= _SHOWN else f"{value[: _SHOWN - 1]}…")


def write_picture(path: Path, pixels: np.ndarray, texts: Mapping[str, str]) -> None:
    """Write uint8 or uint16 pixels (H, W) or (H, W, 3) with text fields: whole or not at all, and on the disk.

    Raises:
        UserError: it cannot be written.
    """
    info, content = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_itxt(key, text)
    info.add_itxt("Software", f"medsynth {__version__}")
    Image.fromarray(pixels).save(content, format="PNG", pnginfo=info)
    _put(path, content.getvalue())


def _put(path: Path, content: bytes) -> None:
    with naming_unwritten(path, "choose another --out, or make room"):
        path.parent.mkdir(parents=True, exist_ok=True)
        put_whole(path, content)


def control_path(out: Path, kind: str, picture: Path) -> Path:
    """Where what steered a picture lies: of one name with it, in a folder of its kind."""
    return out / FOLDERS[kind][0] / picture.relative_to(out)


def control_texts(kind: str, texts: Mapping[str, str]) -> dict[str, str]:
    """Text fields of what steered the picture of those."""
    return {"kind": kind} | {key: texts[key] for key in ("control", "control_sha256", "resolution") if key in texts}


def refuse_strangers(out: Path, expected: Sequence[Path]) -> None:
    """Raise UserError where the folder holds pictures that this call does not make, or cannot be one of pictures."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; choose another")
    if len(known := set(expected)) < len(expected):
        twice = next(path for path in expected if expected.count(path) > 1)
        raise UserError(f"--out: two pictures would be {twice}; give one of the controls another name")
    for path in (out / name for name in PictureFolder(out).names()):
        if path not in known:
            raise UserError(f"{path} is of another call or not of this command; choose another --out, or remove it")
    manifest, header = out / MANIFEST, ",".join(COLUMNS)
    # One that was cut short is written anew.
    if manifest.exists() and not header.startswith(first_line(manifest)[: len(header)]):
        raise UserError(f"{manifest} is no list of this command's; choose another --out, or remove it")


def write_manifest(out: Path, pictures: Sequence[Picture], kinds: Sequence[str]) -> None:
    """List these pictures, which are there: the file, what it shows, what steered it as it was seen, what made it."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow([*COLUMNS, *kinds, *_MORE])
    for picture in pictures:
        steered = [control_path(out, kind, picture.path).relative_to(out).as_posix() for kind in kinds]
        said = {"file": picture.path.relative_to(out).as_posix()} | picture.texts
        rows.writerow([*(said.get(key, "") for key in COLUMNS), *steered, *(said.get(key, "") for key in _MORE)])
    _put(out / MANIFEST, table.getvalue().encode("utf-8", "surrogateescape"))
