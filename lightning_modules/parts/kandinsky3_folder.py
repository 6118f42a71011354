"""Kandinsky 3's pipeline in diffusers' layout: what its folder says."""

from typing import ClassVar

from diffusers import Kandinsky3UNet, VQModel

from lightning_modules.parts.adapters import PEFT_FILE
from lightning_modules.parts.kandinsky_folder import KandinskyFolder
from lightning_modules.parts.t5 import load_tokenizer

_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")


class Kandinsky3Folder(KandinskyFolder):
    """U-Net, MoVQ, and the T5 encoder with its tokenizer."""

    networks: ClassVar[dict[str, type]] = {"unet": Kandinsky3UNet, "movq": VQModel}
    parts = ("unet", "movq", "text_encoder", "tokenizer", "scheduler")
    what, prediction, adapter_file = "a pipeline of Kandinsky 3", "epsilon", PEFT_FILE
    mend = "name a Kandinsky 3, as kandinsky-community/kandinsky-3 or a run's export/merged"

    def check(self) -> None:
        """Raise UserError unless its parts are there and fit each other."""
        self.check_layout()
        text, unet = self.json("text_encoder/config.json"), self.config("unet")
        if text.get("model_type") != "t5":
            raise self.fault("text_encoder", f"is of the kind {text.get('model_type')}, not T5's")
        width = text.get("d_model", 512)  # transformers leaves its default out
        if (taken := unet["encoder_hid_dim"]) != width:
            raise self.fault("text_encoder", f"has d_model={width}, the U-Net encoder_hid_dim={taken}")
        channels = self.config("movq")["latent_channels"]
        if unet["in_channels"] != channels:
            raise self.fault("unet", f"has in_channels={unet['in_channels']}, latents have {channels} channels")
        if (variance := self.variance) not in _VARIANCES:
            raise self.fault("scheduler", f"says variance_type={variance}: the U-Net predicts the noise alone")
        load_tokenizer(self.path / "tokenizer", self.key)

    def instead(self) -> str | None:
        there = [part for part in ("prior", "unet") if (self.path / part / "config.json").is_file()]
        if "prior" in there or ("unet" in there and not (self.path / "text_encoder").is_dir() and self._is_decoder()):
            return f"is a stage of Kandinsky 2.2: {self.mend}"
        return super().instead()

    @property
    def variance(self) -> str:
        """What its scheduler steps with; schedulers that know no choice have the small one."""
        return self.scheduler.config.get("variance_type", "fixed_small")

    def _is_decoder(self) -> bool:
        return self.json("unet/config.json").get("_class_name") == "UNet2DConditionModel"
