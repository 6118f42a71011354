"""Names to classes. A new method or data set is one line here."""

import importlib
from typing import NamedTuple

from medsynth.errors import UserError, nearest


class Method(NamedTuple):
    """A method: where its module stands, the paper it is from, and what state it is in."""

    target: str
    paper: str
    title: str


METHODS = {
    "stable_diffusion": Method(
        "lightning_modules.stable_diffusion:StableDiffusion", "clip-sd-dreambooth-lora", "Stable Diffusion, fine-tuned"
    ),
    "dreambooth": Method("lightning_modules.dreambooth:DreamBooth", "llcm", "DreamBooth"),
    "dreambooth_lora": Method(
        "lightning_modules.dreambooth:DreamBooth", "clip-sd-dreambooth-lora", "DreamBooth by low-rank updates"
    ),
    "clip": Method("lightning_modules.clip:CLIP", "clip-sd-dreambooth-lora", "CLIP, fine-tuned, guiding a generator"),
    "llcm": Method("lightning_modules.llcm:LLCM", "llcm", "Leapfrog Latent Consistency Model"),
    "hypernetwork": Method(
        "lightning_modules.hypernetwork:HypernetworkModule", "cell-gan-hypernetwork", "Hypernetwork on Stable Diffusion"
    ),
    "controlnet": Method("lightning_modules.controlnet:ControlNet", "controlnet", "ControlNet on Stable Diffusion"),
    "kandinsky22_prior": Method(
        "lightning_modules.kandinsky22_prior:Kandinsky22Prior", "kandinsky-msdm", "Kandinsky 2.2, its prior fine-tuned"
    ),
    "kandinsky22_decoder": Method(
        "lightning_modules.kandinsky22_decoder:Kandinsky22Decoder",
        "kandinsky-msdm",
        "Kandinsky 2.2, its decoder fine-tuned",
    ),
    "kandinsky3": Method(
        "lightning_modules.kandinsky3:Kandinsky3", "kandinsky-msdm", "Kandinsky 3, its U-Net fine-tuned"
    ),
    "msdm_vae": Method("lightning_modules.msdm_vae:MSDMVAEModule", "kandinsky-msdm", "MSDM, stage 1: autoencoder"),
    "msdm": Method("lightning_modules.msdm:MSDM", "kandinsky-msdm", "MSDM, stage 2: latent diffusion with text"),
    "cell_gan": Method(
        "lightning_modules.cell_gan:CellGAN",
        "cell-gan-hypernetwork",
        "Cell GAN: conditional, of cells with self-attention",
    ),
    "dcgan": Method("lightning_modules.dcgan:DCGAN", "cell-gan-hypernetwork", "DCGAN"),
    "wgan": Method("lightning_modules.wgan:WGAN", "cell-gan-hypernetwork", "WGAN, its critic's weights clipped"),
    "wgan_gp": Method("lightning_modules.wgan_gp:WGANGP", "cell-gan-hypernetwork", "WGAN with a gradient penalty"),
    "bgan": Method("lightning_modules.bgan:BGAN", "cell-gan-hypernetwork", "Boundary-seeking GAN"),
    "began": Method("lightning_modules.began:BEGAN", "cell-gan-hypernetwork", "Boundary equilibrium GAN"),
}

DATA = {
    "medvqa_gi": "datamodules.medvqa_gi:MedVQAGI",
    "canine_hip": "datamodules.canine_hip:CanineHip",
    "cytology": "datamodules.cytology:Cytology",
    "chest_xray": "datamodules.chest_xray:ChestXRay",
    "dreambooth": "datamodules.dreambooth:DreamBoothData",
}


def known_method(name: str) -> Method:
    """The method of that name; raises UserError with the nearest name."""
    if name not in METHODS:
        raise UserError(f"method={name} is not known{nearest(name, METHODS)}")
    return METHODS[name]


def known_data(name: str) -> str:
    """Where the class of the data set of that name stands; raises UserError with the nearest name."""
    if name not in DATA:
        raise UserError(f"data.name={name} is not known{nearest(name, DATA)}")
    return DATA[name]


def method_class(name: str) -> type:
    """The `GenerativeModule` subclass; raises UserError with the nearest name."""
    return load_class(known_method(name).target)


def data_class(name: str) -> type:
    """The `ImageDataModule` subclass; raises UserError with the nearest name."""
    return load_class(known_data(name))


def load_class(target: str) -> type:
    """The class of a target "module:Class"; its module is imported only now."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
