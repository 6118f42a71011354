"""Which files of a folder in the hub's layout hold a network's weights."""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from medsynth.errors import UserError
from medsynth.files import parse_json

CONFIG = "config.json"
# (name without suffix, suffix) in the order of preference: safetensors run no code, pickles are read as weights only.
_FORMATS = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)
# Full precision first; another is read where there is no more.
_VARIANTS = (None, "fp16", "bf16")
_SINGLE_FILES = (".safetensors", ".ckpt")


class WeightFiles(NamedTuple):
    """What `from_pretrained` is to read.

    names: files, the index of shards first, where there is one. safetensors: else pickles. variant: in which precision
    they were saved, None for the full one.
    """

    names: tuple[str, ...]
    safetensors: bool
    variant: str | None


def weight_files(folder: Path) -> WeightFiles | None:
    """The files that hold the weights of the network in `folder`; None where there are none.

    Raises:
        UserError: an index cannot be read.
    """
    names = {path.name for path in folder.glob("*") if path.is_file()}
    return choose(names, lambda name: (folder / name).read_text(encoding="utf-8"), str(folder))


def choose(names: Collection[str], read: Callable[[str], str], where: str) -> WeightFiles | None:
    """The same of a listing. read: gives the text of a file; where: names the folder in an error."""
    for variant in _VARIANTS:
        dotted = f".{variant}" if variant else ""
        for stem, suffix in _FORMATS:
            whole, index = f"{stem}{dotted}.{suffix}", f"{stem}.{suffix}.index{dotted}.json"
            safe = suffix == "safetensors"
            # diffusers reads the shards where there are both, transformers the whole file.
            sharded_first = stem == "diffusion_pytorch_model"
            if index in names and (sharded_first or whole not in names):
                return WeightFiles((index, *_shards(read, index, where)), safe, variant)
            if whole in names:
                return WeightFiles((whole,), safe, variant)
    return None


def incomplete(folder: Path, parts: Iterable[str]) -> str | None:
    """What a folder with these parts ("." for itself) lacks to be read, None where it is all there."""
    for part in parts:
        if not (folder / part).is_dir():
            return f"no folder {part}"
        if not (folder / part / CONFIG).is_file():
            continue  # no network: a tokenizer, a scheduler
        found = weight_files(folder / part)
        if found is None:
            return f"no weights in {part}: neither safetensors nor .bin" if part != "." else "no weights"
        for name in found.names:
            if not (folder / part / name).is_file():
                return f"no {PurePosixPath(part, name)}, which {found.names[0]} names"
    return None


def single_file(path: Path) -> Path | None:
    """The checkpoint in one file that `path` is, or that lies at the top of the folder `path`; None for neither."""
    if path.is_file():
        return path
    found = sorted(file for file in path.glob("*") if file.suffix in _SINGLE_FILES and file.is_file())
    return found[0] if found else None


def instead_of(file: Path) -> str:
    """What to do where a pipeline's folder is due and this file is named, as the end of a sentence."""
    try:
        names = list(safe_open(file, "pt").keys()) if file.suffix == ".safetensors" else None
    except (OSError, SafetensorError) as error:
        return f"cannot be read ({error}); fetch it anew"
    if names is not None and any("lora" in name for name in names):
        return (
            "is a low-rank update alone; name the pipeline that it was made for, or a run's export/merged, which "
            "model.export_merged=true writes"
        )
    if names is not None and any(name.startswith("conditioner.embedders.1.") for name in names):
        return "is a Stable Diffusion XL; name a text-to-image Stable Diffusion 1.x or 2.x"
    if names is not None and not any(name.startswith("model.diffusion_model.") for name in names):
        return "is no Stable Diffusion in one file; name the folder of a whole pipeline"
    made = str(file.with_suffix(""))
    return (
        "is a checkpoint in one file; convert it where there is internet, and name the folder that this makes: python "
        '-c "from diffusers import StableDiffusionPipeline as P; '
        f'P.from_single_file({str(file)!r}).save_pretrained({made!r})"'
    )


def _shards(read: Callable[[str], str], index: str, where: str) -> list[str]:
    try:
        shards = sorted(set(parse_json(read(index))["weight_map"].values()))
        if not all(PurePosixPath(name).name == name for name in shards):
            raise ValueError("it names files of other folders")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}/{index} is no index of weights ({error}); copy or fetch that folder anew") from None
    return shards
