"""Yes-or-no questions about a colonoscopy phantom, answered by its truth, and by a prompt as far as it says."""

import re
from collections.abc import Mapping
from typing import Any

QUESTIONS = ("a polyp", "several polyps", "a box", "text", "an instrument")

_POLYP, _SEVERAL, _BOX, _TEXT, _INSTRUMENT = QUESTIONS
_SAID: list[tuple[str, dict[str, bool]]] = [
    ("not containing (a polyp|an abnormality)|with no (polyps|findings)", {_POLYP: False, _SEVERAL: False}),
    ("with 1 (polyp|finding)", {_POLYP: True, _SEVERAL: False}),
    (r"with \d+ (polyps|findings)", {_POLYP: True, _SEVERAL: True}),
    ("containing (a polyp|an abnormality)|with (a polyp|polyps|an abnormality)", {_POLYP: True}),
    ("not containing a green/black box artefact", {_BOX: False}),
    ("containing a green/black box artefact", {_BOX: True}),
    ("not containing text", {_TEXT: False}),
    ("containing text", {_TEXT: True}),
    ("not containing an instrument|with no instruments", {_INSTRUMENT: False}),
    ("containing an instrument|with an an instrument", {_INSTRUMENT: True}),
]
"""What prompts begin with, and what they say by it; the first that fits counts."""


def answers(truth: Mapping[str, Any]) -> dict[str, bool]:
    """The answer to each of `QUESTIONS`, of `ColonoscopyScene.truth()`."""
    count = truth["polyps"]
    found = (count > 0, count > 1, bool(truth["box"]), truth["text"], bool(truth["instrument_cells"]))
    return dict(zip(QUESTIONS, found, strict=True))


def asked(prompt: str) -> dict[str, bool]:
    """The answers that a picture of `prompt`, one of a phantom's, must have; the questions that it leaves open are not
    there.

    Raises:
        ValueError: the prompt is none of a phantom's.
    """
    said = prompt.removeprefix("Generate an image ")
    for pattern, follows in _SAID:
        if re.match(rf"({pattern})\b", said):
            return follows
    raise ValueError(f"no phantom has this prompt: {prompt}")
