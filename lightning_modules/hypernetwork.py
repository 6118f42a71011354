"""A hypernetwork on Stable Diffusion (Berezsky et al. 2024, section 8.2), as the Stable Diffusion web UI trains it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_modules.base import STRATEGIES, Supports
from lightning_modules.families.latent_diffusion import Context
from lightning_modules.families.stable_diffusion import Denoising, DenoisingConfig
from lightning_modules.nets.hypernetwork import ACTIVATIONS, INITIALISATIONS, Hypernetwork, context_widths
from lightning_modules.parts.pretrained import refuse_not_finite
from medsynth.errors import UserError
from medsynth.files import read_object
from medsynth.ranges import choice, number, numbers

WEIGHTS_FILE, CONFIG_FILE = "hypernetwork.safetensors", "config.json"
_SHAPE = ("structure", "activation", "activate_output", "layer_norm", "dropout", "initialisation")


@dataclass(frozen=True)
class HypernetworkConfig(DenoisingConfig):
    """What is put on the U-Net. Defaults: the paper, and the web UI where the paper is silent."""

    widths: list[int] = numbers([768, 1024, 320, 640, 1280], least=1)
    """Widths of context that get a pair of networks, for keys and for values; those that the U-Net has not are left
    out."""
    structure: list[float] = numbers([1, 2, 1], count=(2, None), above=0)
    """Sizes of a network's layers, input and output among them, in multiples of the width; 1 at both ends."""
    activation: str = choice("linear", tuple(ACTIVATIONS))
    """Between the layers: linear (none), relu, leakyrelu, elu, swish, tanh, sigmoid, gelu, silu or mish."""
    activate_output: bool = False
    """The activation after the last layer too."""
    layer_norm: bool = False
    """Layer norm after each layer."""
    dropout: list[float] = numbers([], count=(0, None), least=0, below=1)
    """Dropout after each size of `structure`, for instance [0, 0.3, 0, 0] with [1, 2, 2, 1]; 0 at both ends; empty:
    none."""
    initialisation: str = choice("normal", tuple(INITIALISATIONS))
    """Weights at the start: normal (standard deviation 0.01), xavier_normal, xavier_uniform, kaiming_normal or
    kaiming_uniform; biases are 0."""
    multiplier: float = number(1.0, least=0)
    """Strength in sampling: context + multiplier · f(context). Training has 1."""

    def __post_init__(self):
        super().__post_init__()
        structure, dropout = self.structure, self.dropout
        if structure[0] != 1 or structure[-1] != 1:
            raise UserError(f"model.structure={structure}: must begin and end with 1, for instance [1, 2, 1]")
        if small := [width for width in self.widths if width * min(structure) < 1]:
            raise UserError(f"model.structure={structure}: a layer of width {small[0]} would be empty")
        if not dropout:
            return
        if len(dropout) != len(structure) or dropout[0] or dropout[-1]:
            raise UserError(
                f"model.dropout={dropout}: give {len(structure)} probabilities below 1, one for each size of "
                "model.structure, 0 for the first and the last"
            )


class HypernetworkModule(Denoising):
    """Learns the networks on the contexts by the denoising loss; U-Net, autoencoder and text encoder are frozen."""

    Config = HypernetworkConfig
    config: HypernetworkConfig
    supports = Supports(frozenset({"captions"}), STRATEGIES, negatives=True)

    def build(self) -> None:
        super().build()
        seen = context_widths(self.unet)
        widths = [width for width in dict.fromkeys(self.config.widths) if width in seen]
        if not widths:
            raise UserError(
                f"model.widths={self.config.widths}: no attention layer of this U-Net has such a context; there are "
                f"{', '.join(map(str, seen))}"
            )
        self.hypernetwork = Hypernetwork(widths, **{key: getattr(self.config, key) for key in _SHAPE})
        self.hypernetwork.attach(self.unet)

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"hypernetwork": self.hypernetwork}

    def sharded_networks(self) -> list[nn.Module]:
        """Each network on a context: they are called one by one."""
        return self.hypernetwork.networks()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """See `GenerativeModule`; the hypernetwork runs inside the U-Net."""
        self.unet.compile(*args, **kwargs)

    def draw(
        self, context: Context, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        self.hypernetwork.set_multiplier(self.config.multiplier)
        try:
            return super().draw(context, seeds, steps=steps, guidance=guidance)
        finally:
            self.hypernetwork.set_multiplier(1.0)

    def export(self, directory: Path) -> None:
        """Write what `load_hypernetwork` and `web_ui_state` read: `hypernetwork.safetensors` and `config.json`."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {"widths": [int(width) for width in self.hypernetwork]}
        config |= {key: getattr(self.config, key) for key in (*_SHAPE, "multiplier")}
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        state = {name: value.detach().cpu().contiguous() for name, value in self.hypernetwork.state_dict().items()}
        save_file(state, directory / WEIGHTS_FILE)


def load_hypernetwork(unet: nn.Module, directory: Path | str, multiplier: float | None = None) -> Hypernetwork:
    """Put an exported hypernetwork on a diffusers U-Net, in place; pipelines with it then sample as this project does.

    It becomes a part of the U-Net (`unet.hypernetworks`) and moves with it. Several change the context one after the
    other. `set_multiplier` of what is returned changes the strength later; 0 is the plain U-Net.

    multiplier: strength; by default the one that was exported, `model.multiplier` of the run.

    Raises:
        UserError: the folder holds no sound hypernetwork, or one for a U-Net with other widths.
    """
    config, state = _read(Path(directory))
    exported = config.pop("multiplier")
    if strange := sorted(set(config["widths"]) - set(context_widths(unet))):
        raise UserError(
            f"{directory}: a hypernetwork for contexts of width {strange[0]}; those of this U-Net are "
            f"{', '.join(map(str, context_widths(unet)))}"
        )
    parameter = next(unet.parameters())
    network = Hypernetwork(**config)
    network.load_state_dict(state)
    network.requires_grad_(False).eval().to(parameter.device, parameter.dtype)
    network.set_multiplier(exported if multiplier is None else multiplier)
    network.attach(unet)
    others: Any = getattr(unet, "hypernetworks", ())
    unet.hypernetworks = nn.ModuleList([*others, network])
    return network


def web_ui_state(directory: Path | str, name: str = "hypernetwork") -> dict[Any, Any]:
    """An exported hypernetwork as the web UI keeps it: save it with `torch.save` as `models/hypernetworks/<name>.pt`.

    Raises:
        UserError: as `load_hypernetwork`.
    """
    config, state = _read(Path(directory))
    dropout = config["dropout"] or [0] * len(config["structure"])
    converted: dict[Any, Any] = {
        "name": name,
        "layer_structure": config["structure"],
        "activation_func": config["activation"],
        "activate_output": config["activate_output"],
        "is_layer_norm": config["layer_norm"],
        "weight_initialization": config["initialisation"].title().replace("_", ""),
        "dropout_structure": dropout,
        "use_dropout": any(dropout),
        "last_layer_dropout": bool(dropout[-2]),
    }
    for width in config["widths"]:
        converted[width] = tuple(
            {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            for prefix in (f"{width}.k.", f"{width}.v.")
        )
    return converted


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and weights of an export, which fit each other."""
    try:
        config = read_object(directory / CONFIG_FILE)
        state = load_file(directory / WEIGHTS_FILE)
        with torch.device("meta"):
            shapes = Hypernetwork(**{key: config[key] for key in ("widths", *_SHAPE)}).state_dict()
        if {k: v.shape for k, v in shapes.items()} != {k: v.shape for k, v in state.items()}:
            raise ValueError(f"{WEIGHTS_FILE} does not fit {CONFIG_FILE}")
        refuse_not_finite(state, WEIGHTS_FILE)
        return {key: config[key] for key in ("widths", *_SHAPE, "multiplier")}, state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{directory} holds no hypernetwork that `medsynth train` exported: {error}") from None
