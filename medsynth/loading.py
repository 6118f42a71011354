"""What a loaded network did not find in its files, in one line."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Names that wrappers leave in saved weights: what stands in the name, who put it there.
_WRAPPERS = {
    "_orig_mod.": "a compiled network saves them",
    "module.": "a network under DataParallel or DDP saves them",
}
# transformers takes a name with a slash for a repository of compiled code.
_KERNEL = re.compile(r'"_?attn_implementation\w*"\s*:\s*"([^"]*/[^"]*)"')
_LAYERS = re.compile(r'"(\w*(?:layers|blocks)\w*)"\s*:\s*(\d{5,})')
_RENAME = (
    'python -c "from safetensors.torch import load_file, save_file; f = {file!r}; '
    "save_file({{k.replace({word!r}, ''): v.clone() for k, v in load_file(f).items()}}, f, dict(format='pt'))\""
)


def one_line(error: BaseException) -> str:
    """What an error says first, on one line: libraries put tables and advice below."""
    if "Weights only load failed" in str(error):  # torch goes on to advise to run it
        return "it holds more than weights, which could run code when it is read: use a safetensors file"
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def misfit(report: Mapping[str, Iterable[Any]], file: str) -> str | None:
    """Why the weights of a file are not those of the network, as the end of a sentence; None where they are.

    report: of names, "missing_keys" and "unexpected_keys"; and "mismatched_keys", (name, shape in the file, the
    network's own). file: where the weights lie, for the command that mends their names.
    """
    missing, unexpected = (sorted(report[key]) for key in ("missing_keys", "unexpected_keys"))
    for word, why in _WRAPPERS.items():
        named = [name for name in unexpected if word in name]
        if missing and named:
            command = _RENAME.format(file=file, word=word)
            return f"has {len(named)} weights named {word}…, as {why}; take that off their names: {command}"
    if any(".base_layer." in name for name in unexpected):
        return (
            f"was saved with an adapter in it and lacks {len(missing)} weights, the first is {missing[0]}; start the "
            "run that exported it once more, which exports it anew"
        )
    if missing:
        return f"lacks {len(missing)} of its weights, the first is {missing[0]}; copy or fetch that folder anew"
    if unexpected:
        return (
            f"has {len(unexpected)} weights that the network of its config.json has not, the first is {unexpected[0]}; "
            "its files are not of one network"
        )
    for name, given, due in sorted(report.get("mismatched_keys", ()), key=str):
        return f"has {name} of shape {tuple(given)}, its config.json makes it {tuple(due)}; they are not of one network"
    return None


def unfit_config(folder: Path) -> str | None:
    """What a network's config.json asks for that is not done here, as the end of a sentence; None for nothing: a
    program that is fetched to compute attention, or layers that would take the memory of any machine."""
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    if kernel := _KERNEL.search(text):
        return f"asks for the program {kernel[1]}; take attn_implementation out of it"
    if layers := _LAYERS.search(text):
        return f"says {layers[1]}={layers[2]}, which no network has; copy or fetch that folder anew"
    return None
