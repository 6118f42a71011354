"""LoRA, DoRA and rsLoRA on any network through peft: attach, merge, export."""

from dataclasses import dataclass, field
from typing import Optional

from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from medsynth.errors import UserError
from medsynth.ranges import choice, number

KINDS = ("lora", "dora", "rslora")
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

    key: the config key of the adapter. B starts at zero, so that nothing changes before training.

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


def _lora_config(config: AdapterConfig) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,  # pyrefly: ignore[bad-argument-type]  # fractions work, peft says int
        target_modules=list(config.targets),
        lora_dropout=config.dropout,
        use_dora=config.kind == "dora",
        use_rslora=config.kind == "rslora",
    )
