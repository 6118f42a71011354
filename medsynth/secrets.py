"""Passwords and tokens in addresses and in the environment, which no line, file or tag is to show."""

import os
import re

_HIDDEN = "***"
_PASSWORD = re.compile(r"(://[^\s/:@]*:)(?!\*\*\*@)([^\s/]+)(?=@)")
_SIGNED = re.compile(
    r"([?&][\w.-]*(?:token|signature|sig|secret|password|passwd|pwd|credential|api_?key)=)(?!\*\*\*)[^&\s#'\"]+", re.I
)
_HEADER = re.compile(r"(authorization\W+(?:basic|bearer)\s+)(?!\*\*\*)[^\s'\"]+", re.I)
_VARIABLE = re.compile(r"TOKEN$|PASSWORD$|SECRET|API_KEY$")
_SHORTEST = 6  # characters; a shorter value of the environment would be found within words


def has_secret(text: str) -> bool:
    """Whether an address in a text holds a password (`://name:password@`) or a token (`?token=`)."""
    return bool(_PASSWORD.search(text) or _SIGNED.search(text))


def without_secrets(text: str, environment: bool = True) -> str:
    """The text with *** in the place of passwords and tokens: those in addresses, and what the environment names so."""
    for name, value in os.environ.items() if environment else ():
        if len(value) >= _SHORTEST and _VARIABLE.search(name):
            text = text.replace(value, _HIDDEN)
    for pattern in (_PASSWORD, _SIGNED, _HEADER):
        text = pattern.sub(rf"\1{_HIDDEN}", text)
    return text
