"""What fine-tuning Stable Diffusion shares: which networks learn, whole or through adapters, and what is exported."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from torch import nn

from lightning_modules.base import STRATEGIES, Supports
from lightning_modules.families.stable_diffusion import Denoising, DenoisingConfig
from lightning_modules.parts.adapters import AdapterConfig, adapter_metadata, adapter_state, attach, merged
from medsynth.errors import UserError


@dataclass(frozen=True)
class FineTuningConfig(DenoisingConfig):
    """What learns."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank update of the U-Net; with rank 0 the U-Net learns whole."""
    train_text_encoder: bool = False
    """Let the text encoder learn too."""
    text_adapter: AdapterConfig = field(
        default_factory=lambda: AdapterConfig(targets=["q_proj", "k_proj", "v_proj", "out_proj"])
    )
    """Low-rank update of a learning text encoder; with rank 0 it learns whole."""
    export_merged: bool = False
    """Beside the weights of an adapter also export the whole pipeline with the update added, as `merged/`."""

    def __post_init__(self):
        super().__post_init__()
        if self.text_adapter.rank and not self.train_text_encoder:
            raise UserError("model.text_adapter.rank: the text encoder is frozen; set model.train_text_encoder=true")


class FineTuning(Denoising):
    """Stable Diffusion whose U-Net, and text encoder if asked, learn whole or by low-rank updates."""

    config: FineTuningConfig
    supports = Supports(frozenset({"captions"}), STRATEGIES, negatives=True)

    def build(self) -> None:
        super().build()
        config = self.config
        if config.adapter.rank:
            attach(self.unet, config.adapter, "model.adapter")
        if config.train_text_encoder:
            self._let_text_learn()

    def trainable_modules(self) -> dict[str, nn.Module]:
        text = {"text_encoder": self.own_text_encoder} if self.config.train_text_encoder else {}
        return {"unet": self.unet} | text

    def text_digest(self) -> str | None:
        return None if self.config.train_text_encoder else super().text_digest()

    def export(self, directory: Path) -> None:
        """Write updates as `pytorch_lora_weights.safetensors`, for diffusers' `load_lora_weights`.

        Networks that learned whole come as a pipeline folder, in the same place.
        """
        adapted = self._adapted()
        whole = {name: network for name, network in self._learned().items() if name not in adapted}
        if whole:
            self.export_pipeline(directory, **whole)
        if adapted:
            self._export_adapters(directory, adapted)
            if self.config.export_merged:
                plain = {"unet": self.load_unet, "text_encoder": lambda: self.load_text_encoder().model}
                parts = {name: merged(plain[name](), *adapted[name]) for name in adapted}
                self.export_pipeline(directory / "merged", **whole, **parts)

    def _let_text_learn(self) -> None:
        if self.cached_text:
            raise UserError("model.train_text_encoder: the cache holds text, which must not change; encode again")
        self.own_text_encoder.learns = True
        if self.config.text_adapter.rank:
            attach(self.own_text_encoder.model, self.config.text_adapter, "model.text_adapter")
        else:
            self.own_text_encoder.model.requires_grad_(True)
        if self.config.gradient_checkpointing:
            self.own_text_encoder.model.gradient_checkpointing_enable()

    def _learned(self) -> dict[str, nn.Module]:
        """Networks that learn, by their name in the pipeline."""
        text = {"text_encoder": self.own_text_encoder.model} if self.config.train_text_encoder else {}
        return {"unet": self.unet} | text

    def _adapted(self) -> dict[str, tuple[nn.Module, AdapterConfig]]:
        configs = {"unet": self.config.adapter, "text_encoder": self.config.text_adapter}
        return {name: (network, configs[name]) for name, network in self._learned().items() if configs[name].rank}

    def _export_adapters(self, directory: Path, adapted: dict[str, tuple[nn.Module, AdapterConfig]]) -> None:
        arguments: dict[str, Any] = {}
        for name, (network, config) in adapted.items():
            arguments[f"{name}_lora_layers"] = adapter_state(network)
            arguments[f"{name}_lora_adapter_metadata"] = adapter_metadata(config)
        StableDiffusionPipeline.save_lora_weights(directory, **arguments)
