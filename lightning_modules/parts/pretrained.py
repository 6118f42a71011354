"""Networks out of pretrained folders: every weight comes from there, fits and is finite, or nothing is loaded."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from torch import Tensor, nn

from lightning_modules.parts.hub_layout import weight_files
from medsynth.errors import UserError
from medsynth.loading import misfit, one_line, unfit_config

_ADAPTER = "adapter_config.json"
# How diffusers says it, before advice on how to go on with random weights.
_SHAPES = re.compile(r"(\S+) expected shape torch\.Size\((\[.*?\])\), but got torch\.Size\((\[.*?\])\)")


def load_network(
    network: type, folder: Path, key: str, spare: str | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """A network of diffusers or transformers as its folder in the hub's layout holds it, in evaluation mode.

    Full precision is read where it is there, else half; safetensors, else pickles, of which nothing but weights is let
    through; whole or in shards.

    Args:
        network: its class.
        key: the config key that named the folder.
        spare: pattern of the names of weights that the folder may hold in vain.
        dtype: what its weights are held in, from the first on.

    Raises:
        UserError: the folder holds no such network, lacks a weight of it, has others, or one that is not finite.
    """
    found = weight_files(folder)
    if found is None:
        raise UserError(
            f"{key}: {folder} cannot be loaded: it has neither safetensors nor .bin of a network; fetch it with "
            "`medsynth prepare weights CONFIG`, or copy the folder whole"
        )
    if (folder / _ADAPTER).is_file():  # transformers would load the network that this names, from wherever it lies
        raise UserError(f"{key}: {folder} has {_ADAPTER}: an adapter's folder; name a folder of whole networks")
    if reason := unfit_config(folder):
        raise UserError(f"{key}: {folder}/config.json {reason}")
    absent = [name for name in found.names if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{key}: {folder} has no {absent[0]}, which {found.names[0]} names; fetch it with `medsynth prepare "
            "weights CONFIG`, or copy the folder whole"
        )
    options: dict[str, Any] = {"use_safetensors": found.safetensors, "variant": found.variant}
    if issubclass(network, ModelMixin):
        options["torch_dtype"] = dtype
    else:
        options |= {"dtype": dtype, "ignore_mismatched_sizes": True}  # the report below is clearer
    try:
        with _quietly():
            loaded, report = network.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # the library raises of many kinds; all mean that the folder is not what it says
        if shapes := _SHAPES.search(str(error)):
            name, due, given = shapes[1], json.loads(shapes[2]), json.loads(shapes[3])
            found_else = {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": [(name, given, due)]}
            raise UserError(f"{key}: {folder} {misfit(found_else, str(folder))}") from error
        raise UserError(f"{key}: {folder} cannot be loaded: {one_line(error)}") from error
    state = loaded.state_dict()
    kept = {name: [k for k in names if not (spare and re.search(spare, str(k)))] for name, names in report.items()}
    # diffusers believes an index of shards; what they do not hold themselves has no values.
    kept["missing_keys"] = sorted({*kept["missing_keys"], *(name for name, value in state.items() if value.is_meta)})
    if reason := misfit(kept, str(folder / found.names[-1])):
        raise UserError(f"{key}: {folder} {reason}")
    refuse_not_finite(state, f"{key}: {folder}")
    return loaded.eval()


@contextmanager
def _quietly() -> Iterator[None]:
    """No tables of what the libraries miss, of which one line is made here."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    said = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, said, strict=True):
            library.set_verbosity(verbosity)


def fill(network: nn.Module, state: Mapping[str, Tensor], key: str, file: Path) -> None:
    """Put the weights of a file into a network that has them all by the same names and shapes.

    Raises:
        UserError: it has not, or they are not finite; `key` and `file` are named.
    """
    own = network.state_dict()
    shapes = [(name, state[name].shape, own[name].shape) for name in own.keys() & state.keys()]
    report = {
        "missing_keys": own.keys() - state.keys(),
        "unexpected_keys": state.keys() - own.keys(),
        "mismatched_keys": [found for found in shapes if found[1] != found[2]],
    }
    if reason := misfit(report, str(file)):
        raise UserError(f"{key}: {file} {reason}")
    refuse_not_finite(state, f"{key}: {file}")
    network.load_state_dict(state)


def refuse_not_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError where a weight is NaN or infinite. where: begins the line."""
    # A sum is fast and hides neither; only where it is not finite are the values looked at.
    doubted = [name for name, value in state.items() if value.is_floating_point() and not value.sum().isfinite()]
    wrong = [name for name in doubted if not state[name].isfinite().all()]
    if wrong:
        raise UserError(
            f"{where} has {len(wrong)} weights that are not finite numbers (NaN or infinite), the first is "
            f"{min(wrong)}; use an earlier checkpoint of it, or fetch it anew"
        )
