"""What a score of pictures is a score by: two numbers compare only where all of this is the same."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metrics.extractors import FeatureExtractor

_PACKAGES = ("torch", "torchvision", "torchmetrics", "torch-fidelity", "numpy", "scipy")


def _versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}


@dataclass(frozen=True)
class Protocol:
    """How pictures were read, brought before a network, counted and compared.

    Two are equal where all but `versions` is; other versions of the libraries move a score by rounding.
    """

    extractor: str
    """The network whose features are compared, as it names the scores."""
    weights: str
    """Kind and SHA-256 of its weights."""
    resize: str
    """How a picture comes to the network's input size."""
    antialias: bool
    """Whether it is filtered first where it shrinks."""
    input_range: str
    """What the network is given of a pixel x in 0 … 255."""
    resolution: int | None
    """Side of the squares that pictures are made first, pixels; None: they are taken as they lie."""
    square: str
    """How they become squares: crop or pad."""
    sixteen_bit: str
    """How pictures of more than 8 bits are shown."""
    window: tuple[float, ...] | None
    """Centre and width of the values shown, where there is one."""
    reading: int
    """Raised whenever the same files become other pictures."""
    reference: str
    """The real pictures: train, val or all of a data set, or folder."""
    split_seed: int | None
    """What has drawn the split; None where all pictures are taken."""
    real: int
    fake: int
    """Pictures of each side."""
    bank: int
    """Pictures of a side, at most, that kernel distance, precision and recall look at."""
    quantisation: str
    """What generated pictures are made before they are scored."""
    subsets: str
    """Subsets of the kernel distance, and their seed."""
    versions: Mapping[str, str] = field(default_factory=_versions, compare=False, hash=False)

    @property
    def digest(self) -> str:
        """8 hexadecimal digits of all that must be equal."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()[:8]

    def facts(self) -> dict[str, Any]:
        """All that must be equal, as JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items() if name != "versions"}

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return self.facts() | {"versions": dict(self.versions), "digest": self.digest}

    def differences(self, other: "Protocol") -> list[str]:
        """Each fact that is not the same: "resolution 64, not 32", this one's first."""
        ours, theirs = self.facts(), other.facts()
        return [f"{name} {_said(ours[name])}, not {_said(theirs[name])}" for name in ours if ours[name] != theirs[name]]

    def __str__(self) -> str:
        """A line for people."""
        weights = self.weights.rpartition("-")[2][:8]
        size = f"at {self.resolution}×{self.resolution} ({self.square})" if self.resolution else "of their own sizes"
        split = f" of seed {self.split_seed}" if self.split_seed is not None else ""
        shown = "" if self.sixteen_bit == "full" else f", 16 bits by {self.sixteen_bit} {self.window or ''}".rstrip()
        return (
            f"{self.extractor}, weights {weights}, {self.resize}, antialiasing {'on' if self.antialias else 'off'}, "
            f"{self.input_range}; {self.fake} generated against {self.real} real ({self.reference}{split}) {size}"
            f"{shown}, {self.quantisation}; {self.bank} a side in the bank, {self.subsets}; reading {self.reading}"
        )


def read_protocol(said: Mapping[str, Any]) -> Protocol:
    """The protocol that `as_dict` has written.

    Raises:
        ValueError: a fact is missing, or there are others: it is of another version.
    """
    known = {each.name for each in fields(Protocol)} - {"versions"}
    given = {name: value for name, value in said.items() if name not in ("versions", "digest")}
    if given.keys() != known:
        raise ValueError(f"no protocol of this version: {', '.join(sorted(given.keys() ^ known))}")
    given["window"] = None if given["window"] is None else tuple(given["window"])
    return Protocol(**given, versions=dict(said.get("versions", {})))


def protocol_of(extractor: "FeatureExtractor", reading: Mapping[str, Any], **counted: Any) -> Protocol:
    """The protocol of an extractor, of how pictures are read (`resolution` … `reading`), and of what is compared."""
    from metrics.images import QUANTISATION  # here: who only compares protocols needs no torch
    from metrics.kernel import SUBSETS

    return Protocol(
        quantisation=QUANTISATION,
        subsets=SUBSETS,
        extractor=extractor.name,
        weights=extractor.identity,
        resize=extractor.resize,
        antialias=extractor.antialias,
        input_range=extractor.input_range,
        **reading,
        **counted,
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
