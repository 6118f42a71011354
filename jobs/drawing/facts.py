"""What a picture is made by, whole: weights, step, sampler and its values, as text fields."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from callbacks.durable import STATE, read_manifest
from jobs.run.folder import find_checkpoint, load_run
from lightning_modules.base import GenerativeModule
from medsynth.errors import UserError


def load_with_facts(run_dir: Path, checkpoint: str) -> tuple[GenerativeModule, DictConfig, dict[str, str]]:
    """`load_run`, and by what text fields its weights are known.

    Raises:
        UserError: as `load_run`; or the run put another checkpoint into that place meanwhile.
    """
    path = find_checkpoint(run_dir, checkpoint)
    manifest = read_manifest(path)
    module, config = load_run(run_dir, checkpoint)
    if find_checkpoint(run_dir, checkpoint) != path or read_manifest(path) != manifest:
        raise UserError(f"{path}: the run saved another one while it was read; call again")
    saved = {name: file["sha256"] for name, file in manifest["files"].items() if name != STATE}
    facts = {
        "method": config.method,
        "weights": _digest_of(saved),
        "frozen_weights": _frozen_digest(module),
        "model": _digest_of(_model(config)),
        "checkpoint_step": str(manifest["global_step"]),
        "precision": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})),
        "resolution": str(config.data.resolution),
    }
    return module, config, facts


def sampling_facts(module: GenerativeModule, steps: int | None, guidance: float | None) -> dict[str, str]:
    """By what sampler, steps and guidance it draws where these are asked for; None is the run's own.

    Raises:
        UserError: the method has no such thing.
    """
    resolved = module.sampling(steps, guidance)
    for option, given in {"steps": steps, "guidance": guidance}.items():
        if given is not None and option not in resolved:
            raise UserError(f"--{option}: {type(module).__name__} draws without {option}; leave it out")
    return {key: str(value) for key, value in resolved.items()}


def _model(config: DictConfig) -> dict[Any, Any]:
    """The run's `model` section, but for how it learns, which no picture depends on."""
    model = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(model, dict), "a section holds keys"
    return {key: value for key, value in model.items() if key != "optim"}


def _digest_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _frozen_digest(module: GenerativeModule) -> str:
    """Of all weights and buffers that no checkpoint holds, whatever they were loaded from."""
    saved = module.saved_names()
    frozen = {name: value for name, value in module.state_dict().items() if name not in saved}
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
        return _digest_of(dict(zip(frozen, pool.map(_tensor_digest, frozen.values()), strict=True)))


def _tensor_digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest() + f" {tensor.dtype} {tuple(tensor.shape)}"
