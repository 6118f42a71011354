"""A pipeline's folder in diffusers' layout, whichever pipeline it is: what its files say, and its networks."""

import inspect
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch

from lightning_modules.parts.hub_layout import weight_files
from lightning_modules.parts.pretrained import load_network
from lightning_modules.parts.weights import Weights
from medsynth.errors import UserError
from medsynth.files import read_object
from medsynth.loading import one_line

_COPIED = {".json", ".txt", ".model", ".safetensors"}


class DiffusersFolder:
    """The folder of `weights`; whatever is asked of it raises UserError where its files do not say it.

    A subclass names its networks of diffusers, by part, what else may stand in the folder's place, and how its
    scheduler adds noise.
    """

    networks: ClassVar[dict[str, type]]
    mend: ClassVar[str]
    """What to name instead, as the end of a sentence."""
    noise: ClassVar[str]
    """Whose betas its scheduler knows."""

    def __init__(self, weights: Weights):
        self.weights, self.key = weights, weights.key

    @cached_property
    def path(self) -> Path:
        return self.weights.require()

    def config(self, part: str) -> dict[str, Any]:
        """What the config of a network says, and the library's default of what it leaves out."""
        parameters = inspect.signature(self.networks[part].__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        return defaults | self.json(f"{part}/config.json")

    @cached_property
    def scheduler(self) -> Any:
        """Its scheduler, as diffusers makes it of its own class: what the file leaves out is that class's default."""
        described = self.json("scheduler/scheduler_config.json")
        name = str(described.get("_class_name", "DDIMScheduler"))
        kind = getattr(diffusers, name, None)
        if kind is None or "beta_schedule" not in inspect.signature(kind.__init__).parameters:
            raise self.fault("scheduler", f"is of the class {name}, which knows no betas of {self.noise}")
        try:
            return kind.from_config(described)
        except Exception as error:  # any kind, of values that the class does not take
            raise self.fault("scheduler", f"cannot be read: {one_line(error)}") from error

    def load(self, part: str, dtype: torch.dtype = torch.float32) -> Any:
        """A network, held in `dtype`."""
        return load_network(self.networks[part], self.path / part, self.key, dtype=dtype)

    def can_copy(self, part: str) -> bool:
        """Whether others read its own files of a part: not where they are in half precision or in pickles."""
        found = weight_files(self.path / part)
        return found is None or (found.variant is None and found.safetensors)

    def copy(self, part: str, directory: Path) -> None:
        """Put its own files of a part in the place of those that a pipeline wrote into `directory`: the same network,
        and the same digest, by which a cache of what it computes is known.

        Where others cannot or should not read them, what was written stays.
        """
        if not self.can_copy(part):
            return
        shutil.rmtree(directory / part, ignore_errors=True)
        (directory / part).mkdir(parents=True)
        for file in (self.path / part).iterdir():
            if file.suffix in _COPIED:
                shutil.copyfile(file, directory / part / file.name)

    def check_classes(self) -> None:
        """Raise UserError where a config says that its network is of another class."""
        for part, network in self.networks.items():
            given = self.json(f"{part}/config.json").get("_class_name")
            if given not in (None, network.__name__):
                raise self.fault(part, f"is a {given}, not a {network.__name__}")

    def json(self, name: str) -> dict[str, Any]:
        """What a file of the folder says."""
        path = self.path / name
        try:
            return read_object(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.key}: {path} cannot be read: {error}") from None

    def fault(self, part: str, what: str) -> UserError:
        """The error that a part is not what it should be."""
        return UserError(f"{self.key}: {self.path / part} {what}; {self.mend}")
