"""Features of any vision model of transformers, out of a local folder: CLIP, DINOv2, RadDINO, ViT …"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsynth.errors import UserError
from medsynth.files import read_object, sha256_of
from medsynth.loading import one_line

_PROCESSOR = "preprocessor_config.json"
_HALF = "clip_vision_model"


def folder_digest(folder: Path) -> str:
    """SHA-256 over the weights and configs of a model's folder.

    Raises:
        UserError: it has none.
    """
    files = [folder / "config.json", folder / _PROCESSOR, *sorted(folder.glob("*.safetensors"))]
    absent = [file.name for file in files[:2] if not file.is_file()]
    if len(files) == 2:
        absent.append("*.safetensors")
    if absent:
        raise UserError(f"{folder} is no folder of a vision model: it has no {absent[0]}")
    return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()


def model_type(folder: Path) -> str:
    """The kind of model in a folder, as its config names it, in letters, digits and "-".

    Raises:
        UserError: the config cannot be read.
    """
    kind = _config(folder)["model_type"].removesuffix("_vision_model")
    return "".join(letter if letter.isalnum() else "-" for letter in kind)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_object(folder / "config.json")
        return config | {"model_type": str(config["model_type"])}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}/config.json names no model_type: {one_line(error)}") from None


def load(folder: Path) -> tuple[Any, Any]:
    """The model, float32, and what brings pictures to its input.

    Raises:
        UserError: the folder is not whole, or its weights are not all that the model has, and finite.
    """
    from transformers import AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

    # Of CLIP's visual half transformers would leave the projection out, without which there is no embedding.
    kind = CLIPVisionModelWithProjection if _config(folder)["model_type"] == _HALF else AutoModel
    try:
        processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, use_fast=True, trust_remote_code=False
        )
        model, told = kind.from_pretrained(  # pyrefly: ignore[not-iterable]  # with what it has to tell, it is a pair
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever transformers makes of a foreign folder
        raise UserError(f"{folder} is no vision model that transformers reads: {one_line(error)}") from error
    if lacking := sorted(told["missing_keys"]):
        raise UserError(f"{folder} lacks {len(lacking)} weights of its model, {lacking[0]} the first")
    if wrong := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
        raise UserError(f"{folder} has {wrong[0]} with numbers that are not finite")
    return model.requires_grad_(False), processor


def features(model: Any, pixels: Tensor) -> Tensor:
    """Of the model's input (n, 3, H, W): the projected embedding where it has one (CLIP), else the pooled output, else
    the class token; float32 (n, dim)."""
    if hasattr(model, "get_image_features"):
        found = model.get_image_features(pixel_values=pixels)
        return (found if isinstance(found, Tensor) else found.pooler_output).float()
    found = model(pixel_values=pixels)
    embedded = getattr(found, "image_embeds", None)
    embedded = getattr(found, "pooler_output", None) if embedded is None else embedded
    return (found.last_hidden_state[:, 0] if embedded is None else embedded).float()


def described(processor: Any) -> tuple[str, bool, str]:
    """How pictures come to the input: resize, antialiasing, range; in the words of a protocol."""
    said = processor.to_dict()
    size = {key: value for key, value in (said.get("size") or {}).items() if value is not None}
    crop = {key: value for key, value in (said.get("crop_size") or {}).items() if value is not None}
    resize = f"resample {said.get('resample')} to {size}" if said.get("do_resize") else "no resize"
    cropped = f", centre {crop}" if said.get("do_center_crop") else ""
    scaled = f"x · {said.get('rescale_factor')}" if said.get("do_rescale") else "x"
    mean, deviation = (list(said.get(key) or ()) for key in ("image_mean", "image_std"))
    normed = f" by mean {mean}, deviation {deviation}" if said.get("do_normalize") else ""
    return resize + cropped, True, scaled + normed
