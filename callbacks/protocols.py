"""By what the scores of a run are scores: RUN/protocol.json, and the MLflow tag of the same notes.

A run that is resumed with another protocol has scores of both: each note says after which step it holds.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsynth.files import parse_json
from metrics.protocol import Protocol, read_protocol

PROTOCOLS = "protocol.json"
PROTOCOL_TAG = "protocol"
_MOST_OF_A_TAG = 8000
"""Characters that MLflow keeps."""


@dataclass(frozen=True)
class Note:
    """The protocol of scores that were logged after step `after`, or from the start where it is the first."""

    after: int
    protocol: Protocol

    def as_dict(self) -> dict[str, Any]:
        return {"after": self.after, "protocol": self.protocol.as_dict()}


def noted_after(notes: Sequence[Note], step: int, protocol: Protocol) -> list[Note]:
    """The notes of a run that goes on at `step` with that protocol."""
    if notes and notes[-1].protocol == protocol:
        return list(notes)
    return [*notes, Note(step if notes else 0, protocol)]


def at_step(notes: Sequence[Note], step: int) -> Protocol | None:
    """The protocol of what was logged at a step; None without notes. Of a step logged twice the first value stands."""
    held = [note for note in notes if note.after < step] or [note for note in notes[:1] if note.after == 0]
    return held[-1].protocol if held else None


def read_notes(path: Path) -> list[Note]:
    """The notes in a run's file; none where there are none, or they are of another version."""
    try:
        return parse_notes(path.read_bytes())
    except OSError:
        return []


def parse_notes(text: str | bytes) -> list[Note]:
    """The notes of a text; none where it holds none, or they are of another version."""
    try:
        return [Note(int(each["after"]), read_protocol(each["protocol"])) for each in parse_json(text)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def as_tag(notes: Sequence[Note]) -> str:
    """The notes as JSON without the versions, which are tags of their own; of very many the newest that a tag holds."""
    said = [{"after": note.after, "protocol": note.protocol.facts()} for note in notes]
    while len(text := json.dumps(said)) > _MOST_OF_A_TAG and len(said) > 1:
        said = said[1:]
    return text
