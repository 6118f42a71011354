"""Latents and text that frozen encoders have computed once (`medsynth encode`), instead of pictures and captions.

    FOLDER/plan.json                               what shards are made of: encoders, data, seed, transform; comes first
    FOLDER/variant-00-000000-<SHA256>.safetensors  the first rows of the training samples, as pass 0 shows them
    FOLDER/validation-000000-<SHA256>.safetensors  of the validation samples
    FOLDER/text-000000-<SHA256>.safetensors        of the captions; none where the text encoder learns
    FOLDER/manifest.json                           the plan, the rows of each part, and file and bytes of each shard;
                                                   comes last: a folder without it is not finished

Each shard but the last of a part has `shard_rows` rows, and its name ends in the SHA-256 of its bytes. One of n samples
holds `moments`, float32 (m, 2C, …), posterior means and log-variances, where the method is told them
`image_embeddings`, float32 (m, D), of the same pictures, and `row`, int64 (n,), which of the m each sample has: samples
that look the same share one. One of n captions holds `embeddings`, float32 (n, L, D), and `mask`, bool (n, L), True on
real tokens; where the method reads these alone instead `tokens`, (sum of all lengths, D) in the type that the method
says, one caption after the other, and `ends`, int64 (n,), where each ends. The metadata entry `medsynth` is JSON:
`plan`, the plan's digest, and `captions`.

Variant k is the sample as pass k shows it; pass p of training reads variant p mod K. Noise, and the sample drawn from
the posterior, are anew each pass; for the first K passes all is as it would be without a cache.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medsynth.errors import UserError
from medsynth.files import parse_json, read_object, sha256_of, sync

PLAN_FILE, MANIFEST_FILE = "plan.json", "manifest.json"
VALIDATION, TEXT = "validation", "text"
_AFRESH = "encode into another folder, or remove this one first"


def variant_part(variant: int) -> str:
    """Name of the part that holds the training samples as pass `variant` shows them."""
    return f"variant-{variant:02d}"


def variant_of(part: str) -> int:
    """The pass whose samples a part holds; see `variant_part`."""
    return int(part.rpartition("-")[2])


@dataclass(frozen=True)
class Shard:
    """Some consecutive rows of one part, the `number`-th such."""

    part: str
    number: int
    rows: range

    @property
    def name(self) -> str:
        return f"{self.part}-{self.number:06d}"


def cut(part: str, length: int, shard_rows: int) -> list[Shard]:
    """A part of `length` rows as shards of `shard_rows`."""
    starts = range(0, length, shard_rows)
    return [Shard(part, i, range(first, min(first + shard_rows, length))) for i, first in enumerate(starts)]


class CacheWriter:
    """Writes a cache from any number of processes, each its own shards; what is whole already is kept."""

    def __init__(self, folder: Path, plan: dict[str, Any]):
        """plan: `datamodules.cached.identity`, "shard_rows", and whatever else all shards must have in common.

        Raises:
            UserError: the folder holds shards of another plan; they are never taken over.
        """
        self.folder, self.plan = folder, plan
        try:
            found = read_object(folder / PLAN_FILE)
        except (OSError, ValueError):
            return
        if reason := _difference(found, plan):
            raise UserError(f"--out: {folder} holds another cache: {reason}; {_AFRESH}")

    def begin(self) -> None:
        """Write the plan; for one process, before any writes a shard."""
        self._write(PLAN_FILE, _json(self.plan))

    def finished_rows(self, shards: Sequence[Shard]) -> int:
        """Rows of those of the shards that are there, unverified."""
        found = self._files()
        return sum(len(shard.rows) for shard in shards if shard.name in found)

    def keeps(self, shard: Shard) -> bool:
        """Whether the shard is there, whole and of this plan; one that is not is removed."""
        path = self._files().get(shard.name)
        if path is None:
            return False
        try:
            whole = path.stem.endswith(sha256_of(path)) and _metadata(path)["plan"] == _digest(self.plan)
        except (SafetensorError, ValueError, KeyError, TypeError):  # whole, and yet no shard
            whole = False
        if not whole:
            path.unlink()
        return whole

    def write(self, shard: Shard, tensors: dict[str, Tensor], **notes: Any) -> None:
        """Write a shard, under its name only once it is on the disk. notes: further metadata, as JSON values."""
        # One entry, since safetensors writes several in any order.
        metadata = {"medsynth": json.dumps({"plan": _digest(self.plan), **notes})}
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
        digest = hashlib.sha256(content).hexdigest()
        self._write(f"{shard.name}-{digest}.safetensors", content, f".{shard.name}")

    def finish(self, rows: dict[str, int]) -> None:
        """Write the manifest; for one process, when all have written. rows: of each part, by name."""
        found, shard_rows = self._files(), self.plan["shard_rows"]
        shards = [shard for part, length in rows.items() for shard in cut(part, length, shard_rows)]
        files = {shard.name: found[shard.name] for shard in shards}
        listed = {name: {"file": path.name, "bytes": path.stat().st_size} for name, path in files.items()}
        manifest = {**self.plan, "rows": rows, "shards": listed}
        self._write(MANIFEST_FILE, _json({**manifest, "sha256": _digest(manifest)}))

    def _files(self) -> dict[str, Path]:
        return {path.stem.rpartition("-")[0]: path for path in sorted(self.folder.glob("*-*.safetensors"))}

    def _write(self, name: str, content: bytes, beside: str = "") -> None:
        temporary = self.folder / (beside or f".{name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / name)
            sync(self.folder)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # where there is no room for it, its beginning takes none
            mend = "mend that and run the same command again"
            raise UserError(f"--out: {temporary} cannot be written: {error.strerror}; {mend}") from None


class Cache:
    """A finished cache, as its manifest describes it."""

    def __init__(self, folder: Path):
        """Read the manifest, and look whether each shard is there in its full length.

        Raises:
            UserError: the folder holds no finished cache, or not all of it.
        """
        self.folder, self.manifest = folder, _read_manifest(folder)
        self.rows: dict[str, int] = self.manifest["rows"]
        shards = self.manifest["shards"]
        self._paths = {name: folder / entry["file"] for name, entry in shards.items()}
        for path, entry in zip(self._paths.values(), shards.values(), strict=True):
            if not path.is_file():
                raise self._damaged(f"{path.name} is missing")
            if (found := path.stat().st_size) != entry["bytes"]:
                raise self._damaged(f"{path.name} has {found} bytes, and {entry['bytes']} were written")

    @property
    def variants(self) -> int:
        """K, the variants of each training sample."""
        return sum(part not in (VALIDATION, TEXT) for part in self.rows)

    def part(self, name: str) -> "ShardedRows":
        """The rows of one part."""
        shard_rows = self.manifest["shard_rows"]
        paths = [self._paths[shard.name] for shard in cut(name, self.rows[name], shard_rows)]
        return ShardedRows(paths, shard_rows)

    def text(self) -> "CachedText | None":
        """Embeddings by caption; None where the cache has none."""
        if TEXT not in self.rows:
            return None
        try:
            return CachedText(self.part(TEXT))
        except (SafetensorError, ValueError, KeyError) as error:
            raise self._damaged(f"a shard of the text cannot be read ({error})") from None

    def require(self, wanted: dict[str, Any]) -> None:
        """Raise UserError with the reason unless the cache is one of `wanted`, see `datamodules.cached.identity`.

        Text is not compared where the one who asks has none: its text encoder learns.
        """
        compared = {key: value for key, value in wanted.items() if (key, value) != ("text", None)}
        if reason := _difference(self.manifest, compared):
            raise UserError(f"data.latents: {self.folder} is stale: {reason}; {_AFRESH}")

    def verify(self, rank: int, world_size: int) -> None:
        """Compare every byte with its SHA-256; each process reads its share, and all raise the UserError of one."""
        share = list(self._paths.values())[rank::world_size]
        faults: list[str | None] = [None] * world_size
        faults[rank] = self._first_fault(share, silent=rank > 0)
        if world_size > 1:
            torch.distributed.all_gather_object(faults, faults[rank])
        if fault := next(filter(None, faults), None):
            raise self._damaged(fault)

    def _first_fault(self, paths: list[Path], silent: bool) -> str | None:
        with Progress(transient=True, disable=silent) as progress, ThreadPoolExecutor() as pool:
            faults = progress.track(pool.map(_fault, paths), len(paths), description="verifying latents")
            return next(filter(None, faults), None)

    def _damaged(self, what: str) -> UserError:
        mend = f"`medsynth encode CONFIG --out {self.folder} --variants {self.variants}` makes only that anew"
        return UserError(f"data.latents: {self.folder} is damaged: {what}; {mend}")


class ShardedRows:
    """Rows of one part, read from memory-mapped shards as they are asked for; opened anew where it is unpickled."""

    def __init__(self, paths: list[Path], shard_rows: int):
        self.paths, self.shard_rows = paths, shard_rows
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def read(self, index: int, *names: str) -> list[Tensor]:
        """Row `index` of the tensors of these names."""
        shard, place = self._find(index)
        return [shard.get_slice(name)[place] for name in names]

    def encoded(self, index: int) -> dict[str, Tensor]:
        """What encoders made of sample `index`: `moments` and, where the cache has them, `image_embeddings`."""
        shard, place = self._find(index)
        row = int(shard.get_slice("row")[place])
        return {name: shard.get_slice(name)[row] for name in shard.keys() if name != "row"}  # noqa: SIM118

    def tokens(self, index: int) -> Tensor | None:
        """Tokens (length, D) of caption `index`; None where captions are not kept at their own lengths."""
        shard, place = self._find(index)
        if "ends" not in shard.keys():  # noqa: SIM118
            return None
        ends = shard.get_slice("ends")
        return shard.get_slice("tokens")[int(ends[place - 1]) if place else 0 : int(ends[place])]

    def _find(self, index: int) -> tuple[Any, int]:
        number, place = divmod(index, self.shard_rows)
        if number not in self._open:
            self._open[number] = safe_open(self.paths[number], "pt")
        return self._open[number], place


class CachedText:
    """Captions to what the frozen text encoder made of them."""

    def __init__(self, rows: ShardedRows):
        self._rows = rows
        captions = (caption for path in rows.paths for caption in _metadata(path)["captions"])
        self._places = {caption: place for place, caption in enumerate(captions)}

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (n, L, D) as they are kept, and bool (n, L) masks, on the CPU; of texts at their own lengths L is
        the longest's, and zeros follow the others.

        Raises:
            UserError: a caption was not encoded.
        """
        self.require(captions)
        places = [self._places[caption] for caption in captions]
        tokens = [self._rows.tokens(place) for place in places]
        own = [text for text in tokens if text is not None]
        if len(own) == len(places) > 0:
            lengths = torch.tensor([[len(text)] for text in own])
            return pad_sequence(own, batch_first=True), torch.arange(int(lengths.max())) < lengths
        embeddings, masks = zip(*(self._rows.read(place, "embeddings", "mask") for place in places), strict=True)
        return torch.stack(embeddings), torch.stack(masks)

    def require(self, captions: list[str]) -> None:
        """Raise UserError unless all were encoded."""
        if absent := [caption for caption in captions if caption not in self._places]:
            raise UserError(
                f"data.latents: the cache has no text of the caption {absent[0]!r}; {_AFRESH}, or leave data.latents "
                "out; `medsynth sample` takes any prompt"
            )


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_object(folder / MANIFEST_FILE)
    except (OSError, ValueError):
        manifest = {}
    if manifest.pop("sha256", None) != _digest(manifest):
        found = "a damaged manifest" if (folder / MANIFEST_FILE).exists() else "no finished latents"
        raise UserError(f"data.latents: {folder} holds {found}; run `medsynth encode CONFIG --out {folder}`")
    return manifest


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first key in which the two differ, in words."""
    changed = {"encoder": "the picture encoder has", "text": "the text encoder has", "data": "pictures or prompts have"}
    changed["image"] = "the image encoder has"
    for key in wanted:
        if key in found and found[key] == wanted[key]:
            continue
        if key == "image" and key not in found:
            return "it holds no image embeddings"
        return f"{changed[key]} changed" if key in changed else f"{key} was {found.get(key)} and is {wanted[key]}"
    return None


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as shard:
        return parse_json((shard.metadata() or {})["medsynth"])


def _json(entries: dict[str, Any]) -> bytes:
    return (json.dumps(entries, indent=2) + "\n").encode()


def _digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _fault(path: Path) -> str | None:
    try:
        whole = path.stem.endswith(sha256_of(path))
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if whole else f"{path.name} is not what was written (its SHA-256 differs)"
