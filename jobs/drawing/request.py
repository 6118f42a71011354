"""What the command line asks for; refused without torch where its options contradict each other."""

from dataclasses import dataclass
from pathlib import Path

from medsynth.errors import UserError


@dataclass(frozen=True)
class Request:
    """The options of the command that say what to draw; None where one was not given."""

    prompts: Path | None = None
    prompt: str | None = None
    labels: str | None = None
    per_class: int | None = None
    validation: int | None = None
    controls: Path | None = None
    negative: str | None = None
    count: int | None = None
    out: Path | None = None

    def __post_init__(self):
        ways = {"--labels": self.labels, "--per-class": self.per_class}
        ways |= {"--validation": self.validation, "--controls": self.controls}
        words = {"--prompts": self.prompts, "--prompt": self.prompt}
        given = [name for name, value in ways.items() if value is not None]
        said = [name for name, value in words.items() if value is not None]
        # Controls have prompts: those of a file, and one for the others.
        if len(given) > 1 or (given != ["--controls"] and len(given + said) != 1 and not self.of_nothing):
            raise UserError(
                "give one of --prompts FILE, --prompt TEXT, --labels NAMES, --per-class COUNT and --validation COUNT, "
                "or --controls FOLDER with --prompts or --prompt"
            )
        counted = self.labels or self.prompt is not None or self.of_nothing
        if self.count is not None and (self.controls or not counted):
            raise UserError("--count goes with --prompt or --labels; --seeds N draws N of each")
        if self.controls and self.out and self.controls.resolve() in (self.out.resolve(), *self.out.resolve().parents):
            raise UserError(f"--out: {self.out} lies in --controls, where pictures are controls; choose another")

    @property
    def of_nothing(self) -> bool:
        """Whether there is a number of pictures alone, of nothing in particular."""
        ways = (self.prompts, self.prompt, self.labels, self.per_class, self.validation, self.controls)
        return self.count is not None and all(way is None for way in ways)
