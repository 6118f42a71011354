"""Small methods that use what the contract gives and no shipped method does yet: vectors as latents, two stages of
drawing, image embeddings in a batch, two players with optimizers of their own, classes as conditions."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from datamodules.batches import Conditions, ImageBatch
from datamodules.stream import derive_seed
from lightning_modules.base import GenerativeModule, Supports, to_image_range
from lightning_modules.families.latent_diffusion import (
    Context,
    Denoised,
    LatentDiffusion,
    LatentDiffusionConfig,
    NoiseConfig,
    SamplerConfig,
    guided,
)
from lightning_modules.maths.diffusion import SampleRandom, to_original
from lightning_modules.parts.optim import OptimConfig

WIDTH = 12  # of image embeddings: 2×2 means of three colours


def pooled(images: Tensor) -> Tensor:
    """The image embedding of these methods: (n, 12) in [-1, 1]."""
    return F.adaptive_avg_pool2d(images, 2).flatten(1) * 2 - 1


@dataclass(frozen=True)
class SmallConfig(LatentDiffusionConfig):
    """What both stages are configured by."""

    resolution: int = 32
    """Side of the square pictures, pixels."""
    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(schedule="cosine", steps=100))
    """The forward process."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(name="ddpm", steps=4, guidance=3.0))
    """The reverse process."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-2))
    """Optimizer."""


class SmallLatentDiffusion(LatentDiffusion):
    """A linear denoiser told the length of the caption and an image embedding, which predicts z_0."""

    Config = SmallConfig
    config: SmallConfig
    supports = Supports(frozenset({"captions"}))
    prediction = "sample"

    def build(self) -> None:
        inputs = 1 + int(torch.tensor(self.latent_shape()).prod())
        self.net = nn.Linear(inputs + WIDTH, inputs - 1)

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def normalise(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        return mean + (0.5 * log_variance).exp() * noise

    def embed(self, captions: list[str]) -> Context:
        told = torch.zeros(len(captions), 1, WIDTH, device=self.device)
        told[:, 0, 0] = torch.tensor([len(caption) / 50 for caption in captions])
        return Context(told, torch.ones(told.shape[:2], dtype=torch.bool, device=self.device))

    def latent_losses(self, z_0: Tensor, random: SampleRandom, batch: ImageBatch) -> dict[str, Tensor]:
        noised = self.diffuse(z_0, random)
        output = self.predict(noised.z_t, noised.t, self.told_in_training(batch))
        return {"loss": (output - z_0).square().mean()}

    def told_in_training(self, batch: ImageBatch) -> Context:
        return self.context_of(batch)

    def predict(self, z_t: Tensor, t: Tensor, context: Context) -> Tensor:
        told = [z_t.flatten(1), t[:, None] / len(self.betas), context.embeddings[:, 0]]
        return self.net(torch.cat(told, dim=1)).view_as(z_t)

    def denoise(
        self, z_t: Tensor, t: Tensor, context: Context, self_condition: Tensor | None, guidance: float
    ) -> Denoised:
        copies = 1 if guidance == 1 else 2
        output = guided(self.predict(torch.cat([z_t] * copies), torch.cat([t] * copies), context), guidance)
        return Denoised(output, to_original(self.prediction, output, z_t, t, self.alpha_bar))

    def encoder_digest(self) -> str:
        return "means"

    def text_digest(self) -> str:
        return "lengths"

    def export(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.net.state_dict(), directory / "net.safetensors")


class VectorPrior(SmallLatentDiffusion):
    """Captions to image embeddings: latents are vectors, and the scheduler is the one that such a prior needs."""

    def latent_shape(self) -> tuple[int, ...]:
        return (WIDTH,)

    def encode_moments(self, images: Tensor) -> Tensor:
        mean = pooled(images)
        return torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents.view(-1, 3, 2, 2), scale_factor=self.config.resolution / 2)

    def scheduler_options(self) -> dict[str, Any]:
        clip = {"clip_sample": True, "clip_sample_range": 2.0}
        return {"variance_type": "fixed_small_log", "timestep_spacing": "linspace", **clip}


class ZeroPrior(VectorPrior):
    """A prior that guidance leads away from an embedding of zeros, masked, and not from the empty caption's."""

    def with_unconditional(self, conditions: Conditions) -> Context:
        told = self.condition(conditions)
        return Context(torch.zeros_like(told.embeddings), torch.zeros_like(told.mask)).followed_by(told)


class Decoder(SmallLatentDiffusion):
    """Image embeddings to pictures of 4×4 means, enlarged; the embeddings that it draws for are its own prior's."""

    def build(self) -> None:
        super().build()
        self.prior = VectorPrior(self.config)
        self.prior.build()

    def latent_shape(self) -> tuple[int, ...]:
        return (3, 4, 4)

    def encode_moments(self, images: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool2d(images, 4) * 2 - 1
        return torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=self.config.resolution / 4)

    def embed_images(self, images: Tensor) -> Tensor:
        return pooled(images)

    def image_digest(self) -> str:
        return "pooled"

    def told_in_training(self, batch: ImageBatch) -> Context:
        told = batch.image_embeddings if batch.image_embeddings is not None else self.embed_images(batch.images)
        return self.told(told)

    def told(self, embeddings: Tensor) -> Context:
        mask = torch.ones(len(embeddings), 1, dtype=torch.bool, device=embeddings.device)
        return Context(embeddings[:, None], mask)

    def sample(
        self, conditions: Conditions, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        embeddings = self.prior.draw(self.prior.guided_context(conditions), seeds)
        context = self.told(torch.zeros_like(embeddings)).followed_by(self.told(embeddings))
        own = [derive_seed(seed, "decoder") for seed in seeds]
        return to_image_range(self.decode(self.draw(context, own, steps=steps, guidance=guidance)))


@dataclass(frozen=True)
class TwoPlayersConfig:
    """Generator and critic."""

    resolution: int = 32
    """Side of the square pictures, pixels."""
    classes: int = 2
    """Classes to draw."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="adam", lr=1e-2, weight_decay=0.0))
    """Optimizer of each player."""


class TwoPlayers(GenerativeModule):
    """A generator of class pictures and a critic under spectral norm: hinge losses, an optimizer each."""

    Config = TwoPlayersConfig
    config: TwoPlayersConfig
    supports = Supports(frozenset({"labels"}))
    uses_all_weights = False  # each player's backward pass leaves the other alone

    def __init__(self, config: TwoPlayersConfig):
        super().__init__(config)
        self.automatic_optimization = False

    def build(self) -> None:
        values = 3 * self.config.resolution**2
        self.generator = nn.Sequential(nn.Linear(8 + self.config.classes, values), nn.Tanh())
        layers = [parametrizations.spectral_norm(nn.Linear(values, 16)), nn.ReLU()]
        self.critic = nn.Sequential(*layers, parametrizations.spectral_norm(nn.Linear(16, 1)))

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(player.parameters(), lr=1e-2) for player in self.trainable_modules().values()]

    def learn(self, batch: ImageBatch) -> dict[str, Tensor]:
        of_generator, of_critic = self.optimizers()
        real, fake = batch.images.flatten(1) * 2 - 1, self.fake(batch)
        critic = F.relu(1 - self.critic(real)).mean() + F.relu(1 + self.critic(fake.detach())).mean()
        self.step(of_critic, critic)
        of_critic.step()
        generator = -self.critic(fake).mean()
        self.step(of_generator, generator)
        self.trainer.strategy.optimizer_step(of_generator.optimizer, lambda: None, self)
        return {"critic": critic, "generator": generator, "loss": critic + generator}

    def step(self, optimizer: Any, loss: Tensor) -> None:
        for each in self.optimizers():
            each.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer.optimizer, self.gradient_clip_norm, "norm")

    def losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        return {"loss": -self.critic(self.fake(batch)).mean()}

    def fake(self, batch: ImageBatch) -> Tensor:
        return self.generator(self.inputs(batch.conditions.labels, batch.seeds.tolist()))

    def inputs(self, labels: Tensor, seeds: list[int]) -> Tensor:
        z = SampleRandom(seeds, self.device).normal(8)
        return torch.cat([z, F.one_hot(labels, self.config.classes).to(z)], dim=1)

    @torch.no_grad()
    def sample(
        self, conditions: Conditions, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        side = self.config.resolution
        return to_image_range(self.generator(self.inputs(conditions.labels, seeds))).view(-1, 3, side, side)

    def after_swap(self) -> None:
        for layer in self.critic:
            if isinstance(layer, nn.Linear):
                spectral = layer.parametrizations.weight[0]
                spectral._power_method(layer.parametrizations.weight.original, 15)

    def export(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.generator.state_dict(), directory / "generator.safetensors")
        save_file(self.critic.state_dict(), directory / "critic.safetensors")
