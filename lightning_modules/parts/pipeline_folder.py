"""A Stable Diffusion pipeline of 1.x or 2.x in diffusers' layout: what its files say, and its networks."""

from functools import cached_property
from typing import ClassVar

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from lightning_modules.maths.diffusion import PREDICTION_TYPES
from lightning_modules.parts.diffusers_folder import DiffusersFolder
from lightning_modules.parts.hub_layout import instead_of, single_file
from medsynth.errors import UserError
from medsynth.loading import one_line

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# Inputs of diffusers' U-Net, by the key of its config that asks for them, which no method here feeds.
_UNFED = {
    "time_cond_proj_dim": "the guidance, as a consistency model (LCM) does: give the model that it was distilled from",
    "addition_embed_type": "more than one text and picture sizes, as Stable Diffusion XL does",
    "class_embed_type": "a class, a noise level or a picture's embedding",
    "num_class_embeds": "a class",
    "encoder_hid_dim": "embeddings of another encoder",
    "encoder_hid_dim_type": "embeddings of another encoder",
}
# What a U-Net takes beside the noised latents, by its number of channels where latents have four.
_BESIDE = {5: "a depth map", 7: "a small picture", 8: "another picture", 9: "a mask and a masked picture (inpainting)"}


class PipelineFolder(DiffusersFolder):
    """The folder of a Stable Diffusion; "unet" and "vae" are its networks of diffusers."""

    networks: ClassVar[dict[str, type]] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    mend = "name a text-to-image Stable Diffusion 1.x or 2.x"
    noise = "Stable Diffusion's kind"

    def check(self) -> None:
        """Raise UserError unless its parts are there and of one pipeline whose inputs are all fed here."""
        self._check_layout()
        self._check_classes()
        self._check_unet()
        self._check_vae()
        prediction = self.scheduler.config.prediction_type
        if prediction not in PREDICTION_TYPES:
            raise self.fault("scheduler", f"says prediction_type={prediction}, not {', '.join(PREDICTION_TYPES)}")

    @property
    def text_width(self) -> int:
        """Width of the text embeddings."""
        return self._text_config.hidden_size

    # Within

    @cached_property
    def _text_config(self) -> CLIPTextConfig:
        try:
            return CLIPTextConfig.from_pretrained(self.path / "text_encoder", local_files_only=True)
        except Exception as error:
            raise self.fault("text_encoder", f"cannot be read: {one_line(error)}") from error

    def _check_layout(self) -> None:
        folder = self.path
        single = single_file(folder)
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if single and (single == folder or len(missing) == len(PARTS)):
            raise UserError(f"{self.key}: {single} {instead_of(single)}")
        if (folder / "export" / PARTS[0]).is_dir() and missing:
            raise UserError(f"{self.key}: {folder} is a run; name its export, {folder / 'export'}")
        if missing:
            raise UserError(
                f"{self.key}: {folder} has no folder {missing[0]}; it must be a Stable Diffusion pipeline in "
                f"diffusers' layout ({', '.join(PARTS)})"
            )

    def _check_classes(self) -> None:
        self.check_classes()
        kind = self.json("text_encoder/config.json").get("model_type", "clip_text_model")
        if kind not in ("clip_text_model", "clip"):
            raise self.fault("text_encoder", f"is of the kind {kind}, not CLIP's")

    def _check_unet(self) -> None:
        unet = self.config("unet")
        for name, what in _UNFED.items():
            if unet[name] is not None:
                raise self.fault("unet", f"has {name}={unet[name]}: it takes {what}, which no method here gives")
        if unet["attention_type"] != "default":
            raise self.fault("unet", f"has attention_type={unet['attention_type']}: it takes boxes (GLIGEN)")
        channels = self.config("vae")["latent_channels"]
        if unet["in_channels"] != channels:
            beside = _BESIDE.get(unet["in_channels"], "something") if channels == 4 else "something"
            raise self.fault(
                "unet", f"has in_channels={unet['in_channels']}, latents have {channels} channels: it takes {beside} "
                "beside them, which no method here gives"
            )  # fmt: skip
        if unet["out_channels"] != channels:
            raise self.fault(
                "unet", f"has out_channels={unet['out_channels']}, latents have {channels} channels: it predicts more "
                "than the noise"
            )  # fmt: skip
        taken, given = unet["cross_attention_dim"], self.text_width
        widths = set(taken) if isinstance(taken, (list, tuple)) else {taken}
        if widths != {given}:
            raise UserError(
                f"{self.key}: {self.path} has text embeddings of width {given}, its U-Net takes "
                f"{', '.join(map(str, sorted(widths)))}; they are not of one pipeline"
            )

    def _check_vae(self) -> None:
        vae = self.config("vae")
        if (vae["in_channels"], vae["out_channels"]) != (3, 3):
            raise self.fault("vae", f"has in_channels={vae['in_channels']}: pictures have three")
        scale = vae["scaling_factor"]
        if not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise self.fault("vae", f"has scaling_factor={scale}; give the number that its U-Net was trained with")
        for name in ("shift_factor", "latents_mean", "latents_std"):
            if vae.get(name):
                raise self.fault(
                    "vae", f"has {name}, which Stable Diffusion's pipeline does not know: its U-Net was trained with "
                    "other latents"
                )  # fmt: skip
