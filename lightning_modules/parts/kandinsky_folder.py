"""A pipeline of Kandinsky in diffusers' layout, whichever it is: its parts, and how its scheduler bounds a picture."""

from typing import Any, ClassVar

from lightning_modules.parts.diffusers_folder import DiffusersFolder
from medsynth.errors import UserError


class KandinskyFolder(DiffusersFolder):
    """What the folders of all share."""

    parts: ClassVar[tuple[str, ...]]
    """The folders within."""
    what: ClassVar[str]
    """What the folder must be."""
    prediction: ClassVar[str]
    """What its network has learned to predict."""
    adapter_file: ClassVar[str]
    """The file by which an export of low-rank updates alone is known."""
    noise = "Kandinsky's kind"

    def check_layout(self) -> None:
        """Raise UserError unless all parts are there, of the right classes, and learned what is predicted here."""
        folder = self.path
        missing = [part for part in self.parts if not (folder / part).is_dir()]
        if missing and (instead := self.instead()):
            raise UserError(f"{self.key}: {folder} {instead}")
        if missing:
            raise UserError(
                f"{self.key}: {folder} has no folder {missing[0]}; it must be {self.what} in diffusers' layout "
                f"({', '.join(self.parts)})"
            )
        self.check_classes()
        prediction = self.scheduler.config.prediction_type
        if prediction != self.prediction:
            raise self.fault("scheduler", f"says prediction_type={prediction}, not {self.prediction}")

    def instead(self) -> str | None:
        """What a folder that lacks a part is, and what to name, as the end of a sentence; None if not known."""
        if (self.path / self.adapter_file).is_file():
            return (
                "is a low-rank update alone; name that run's export/merged, which model.export_merged=true writes, or "
                "the pipeline that it was made for"
            )
        if (self.path / "export").is_dir():
            inner = self.path / "export"
            return f"is a run; name its export, {inner / 'merged' if (inner / 'merged').is_dir() else inner}"
        return None

    @property
    def clipping(self) -> dict[str, Any]:
        """How its scheduler holds an estimated z_0 within bounds, in the words of diffusers' schedulers."""
        names = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
        described = self.scheduler.config
        return {name: described[name] for name in names if described.get(name) is not None}
