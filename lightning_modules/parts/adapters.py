"""LoRA, DoRA and rsLoRA on any network through peft: attach, merge, export."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from medsynth.errors import UserError
from medsynth.ranges import choice, number

KINDS = ("lora", "dora", "rslora")
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""File of an update in diffusers' layout."""
PEFT_FILE = "adapter_model.safetensors"
"""The same in peft's."""
_NAME = "default"


@dataclass(frozen=True)
class AdapterConfig:
    """A low-rank update W + s·B·A of chosen layers, whose own weights stay frozen."""

    rank: int = number(0, least=0)
    """Rank of the update; 0 trains the network whole, without an adapter."""
    alpha: Optional[float] = number(None, above=0)
    """The update is scaled by alpha / rank (rslora: alpha / √rank); by default alpha = rank."""
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Layers that get an update, by the end of their names."""
    dropout: float = number(0.0, least=0, below=1)
    """Probability that an element of an adapted layer's input is dropped on its way through the update."""
    kind: str = choice("lora", KINDS)
    """lora (Hu et al. 2021), dora (Liu et al. 2024: direction and length apart), rslora (Kalajdzievski 2023)."""


def attach(network: nn.Module, config: AdapterConfig, key: str) -> None:
    """Put an update beside each target layer of `network`, in place; only the updates require gradients then.

    key: the config key of the adapter. B starts at zero, so that nothing changes before training. Updates are float32,
    whatever type the network is held in.

    Raises:
        UserError: no layer of that name; or one of a kind that has no low-rank update.
    """
    try:
        inject_adapter_in_model(_lora_config(config), network, _NAME)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, m in network.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"{key}.targets={config.targets}: {str(error).splitlines()[0]} The linear layers here end in: "
            f"{', '.join(linear)}"
        ) from None
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            _widen(layer)


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The updates in peft's names, as diffusers' and transformers' loaders read them."""
    state = get_peft_model_state_dict(network, adapter_name=_NAME)
    # peft leaves the suffix of DoRA's lengths away, and transformers does not find them so.
    named = {f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: v for name, v in state.items()}
    return {name: value.detach().cpu().contiguous() for name, value in named.items()}


def adapter_metadata(config: AdapterConfig) -> dict:
    """What a loader must know beside the weights: rank, alpha, targets, kind."""
    described = _lora_config(config).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in described.items()}


def save_for_diffusers(network: nn.Module, config: AdapterConfig, directory: Path) -> None:
    """Write the updates as `network.load_lora_adapter(directory, weight_name=ADAPTER_FILE, prefix=None)` reads them."""
    # The loader takes rank, alpha and kind from here, and without it alpha for the rank.
    described = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter_metadata(config), sort_keys=True)}
    save_file(adapter_state(network), directory / ADAPTER_FILE, described)


def save_for_peft(network: nn.Module, config: AdapterConfig, directory: Path, source: str) -> None:
    """Write the updates as `PeftModel.from_pretrained(plain network, directory)` reads them.

    source: what the network was loaded from, for a reader's information.
    """
    described = _lora_config(config)
    described.base_model_name_or_path, described.inference_mode = source, True
    described.save_pretrained(str(directory))
    state = {f"base_model.model.{name}": value for name, value in adapter_state(network).items()}
    save_file(state, directory / PEFT_FILE, {"format": "pt"})


def merged(plain: nn.Module, adapted: nn.Module, config: AdapterConfig) -> nn.Module:
    """`plain`, the network as it was before `attach`, float32, with the updates of `adapted` added to its weights."""
    attach(plain, config, "adapter")
    set_peft_model_state_dict(plain, adapter_state(adapted), adapter_name=_NAME)
    for module in plain.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    plain = recurse_remove_peft_layers(plain)
    del plain.peft_config
    return plain


def _widen(layer: Any) -> None:
    """Bring the update of a layer to float32; DoRA's lengths are measured anew, of half precision they were rounded."""
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    weight = layer.get_base_layer().weight
    for vector in getattr(layer, "lora_magnitude_vector", {}).values():
        if weight.dtype != torch.float32:
            lengths = vector.get_weight_norm(weight.float(), torch.zeros((), device=weight.device), 1.0)
            vector.weight.data = lengths.reshape(vector.weight.shape)


def _lora_config(config: AdapterConfig) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,  # pyrefly: ignore[bad-argument-type]  # fractions work, peft says int
        target_modules=list(config.targets),
        lora_dropout=config.dropout,
        use_dora=config.kind == "dora",
        use_rslora=config.kind == "rslora",
    )
