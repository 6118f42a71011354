"""The two pipelines of Kandinsky 2.2 in diffusers' layout: what their folders say, and their networks."""

from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import PriorTransformer, UNet2DConditionModel, VQModel
from transformers import CLIPVisionModelWithProjection

from lightning_modules.parts.adapters import ADAPTER_FILE
from lightning_modules.parts.image_prompt import load_processor
from lightning_modules.parts.kandinsky_folder import KandinskyFolder
from lightning_modules.parts.pretrained import load_network

PRIOR_PARTS = ("prior", "image_encoder", "image_processor", "text_encoder", "tokenizer", "scheduler")
DECODER_PARTS = ("unet", "movq", "scheduler")
# What must be as wide as the prior's embeddings, by the folder whose config says it.
_WIDTHS = (("text_encoder", "hidden_size"), ("text_encoder", "projection_dim"), ("image_encoder", "projection_dim"))
_POSITIONS = r"position_ids$"  # counted anew


class Kandinsky22Folder(KandinskyFolder):
    """What the folders of both stages share. `other`: a network of the other stage's."""

    other: ClassVar[str]
    adapter_file = ADAPTER_FILE

    def instead(self) -> str | None:
        if (self.path / self.other).is_dir():
            return f"is the other stage of Kandinsky 2.2: {self.mend}"
        return super().instead()


class PriorFolder(Kandinsky22Folder):
    """The prior: from text to the embedding of a picture, with the encoders of both."""

    networks: ClassVar[dict[str, type]] = {"prior": PriorTransformer}
    mend = "name a prior of Kandinsky 2.2, as kandinsky-community/kandinsky-2-2-prior or a run's export/merged"
    parts, other, what, prediction = PRIOR_PARTS, "unet", "a prior of Kandinsky 2.2", "sample"

    def check(self) -> None:
        """Raise UserError unless its parts are there and fit each other."""
        self.check_layout()
        prior, width = self.config("prior"), self.width
        for name in ("embedding_proj_dim", "clip_embed_dim"):
            if prior[name] not in (None, width):
                raise self.fault("prior", f"has {name}={prior[name]}: text and pictures have width {width} here")
        if prior["added_emb_type"] != "prd" or prior["encoder_hid_proj_type"] != "linear":
            raise self.fault("prior", "has no place for the picture's embedding or for the words")
        for part, name in _WIDTHS:
            found = self.json(f"{part}/config.json").get(name, 512)  # transformers leaves its default out
            if found != width:
                raise self.fault(part, f"has {name}={found}, the prior embedding_dim={width}")

    @property
    def width(self) -> int:
        """Width of the embeddings of pictures and of text."""
        return self.config("prior")["embedding_dim"]

    def load_prior(self, dtype: torch.dtype = torch.float32) -> PriorTransformer:
        """The prior, held in `dtype`, but for its mean and standard deviation of embeddings, which are float32."""
        network = PriorTransformer if dtype == torch.float32 else _NarrowPrior
        prior = load_network(network, self.path / "prior", self.key, dtype=dtype)
        if not (prior.clip_std > 0).all():
            raise self.fault(
                "prior",
                "has a clip_std that is not above 0: the mean and standard deviation of image embeddings, which are "
                "normalised by them, are missing",
            )
        return prior

    def load_image_encoder(self, dtype: torch.dtype = torch.float32) -> CLIPVisionModelWithProjection:
        """The image encoder, held in `dtype`."""
        folder = self.path / "image_encoder"
        return load_network(CLIPVisionModelWithProjection, folder, self.key, _POSITIONS, dtype)

    @cached_property
    def image_processor(self) -> Any:
        """How pictures are normalised for the image encoder."""
        return load_processor(self.path / "image_processor", self.key)


class DecoderFolder(Kandinsky22Folder):
    """The decoder: from the embedding of a picture to the picture."""

    networks: ClassVar[dict[str, type]] = {"unet": UNet2DConditionModel, "movq": VQModel}
    mend = "name a decoder of Kandinsky 2.2, as kandinsky-community/kandinsky-2-2-decoder or a run's export/merged"
    parts, other, what, prediction = DECODER_PARTS, "prior", "a decoder of Kandinsky 2.2", "epsilon"

    def check(self) -> None:
        """Raise UserError unless its parts are there and fit each other."""
        self.check_layout()
        unet, movq = self.config("unet"), self.config("movq")
        if (unet["encoder_hid_dim_type"], unet["addition_embed_type"]) != ("image_proj", "image"):
            raise self.fault("unet", "is not told the embedding of a picture, and of that alone")
        channels = movq["latent_channels"]
        if (unet["in_channels"], unet["out_channels"]) != (channels, 2 * channels):
            raise self.fault(
                "unet",
                f"has in_channels={unet['in_channels']} and out_channels={unet['out_channels']}; of latents with "
                f"{channels} channels it gives noise and variance, {2 * channels}",
            )

    @property
    def width(self) -> int:
        """Width of the image embeddings that the U-Net is told."""
        return self.config("unet")["encoder_hid_dim"]


class _NarrowPrior(PriorTransformer):
    _keep_in_fp32_modules = ["clip_mean", "clip_std"]  # diffusers reads it
