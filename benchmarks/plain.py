"""Plain training loops, as the example scripts of diffusers go about each method, to measure ours against.

What they have in common: frozen networks in the type of mixed precision, autocast around the trained one, gradients
clipped to a norm, torch's own AdamW or Adam, a learning-rate schedule. They log nothing, so that nothing waits for the
device. Shapes: pictures (n, 3, R, R) in [-1, 1], latents (n, C, h, w), text (n, 77, D).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.cell import Batches, Cell
from lightning_modules.families.latent_diffusion import DIFFUSERS_SCHEDULES
from lightning_modules.families.stable_diffusion import StableDiffusionBase
from lightning_modules.parts.optim import OPTIMIZERS

CLIP_NORM = 1.0
"""Longest gradient, of both loops."""


class Draws(NamedTuple):
    """What a step draws at random.

    posterior, noise: (n, C, h, w), standard normal. steps: int64 (n,). guidance: (n,) in [0, 1), where there is one.
    """

    posterior: Tensor
    noise: Tensor
    steps: Tensor
    guidance: Tensor | None = None


class PlainLoop:
    """Text-to-image fine-tuning; other methods derive from it. It begins with the weights that `module` has now."""

    def __init__(self, cell: Cell, module: Any, batches: Batches):
        """module: built, not yet trained; batches: what `step` reads."""
        self.cell, self.config, self.batches, self.device = cell, module.config, batches, torch.device(cell.device)
        self._shape = (cell.batch, *module.latent_shape())
        noise = module.config.noise
        self.noise_scheduler = DDPMScheduler(
            noise.steps,
            beta_start=noise.beta_start,
            beta_end=noise.beta_end,
            beta_schedule=DIFFUSERS_SCHEDULES[noise.schedule],
        )
        self.take_encoders(module)
        with torch.device(self.device):
            self.unet = self.load(module)
            self.learned = list(self.build(module))
        optim = module.config.optim
        self.optimizer = OPTIMIZERS[optim.name](
            self.learned, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, weight_decay=optim.weight_decay
        )
        self.lr_scheduler = get_scheduler("constant", self.optimizer)
        self._i = 0

    def step(self) -> Tensor:
        """Train on the next batch and return the loss, on the device."""
        batch = {name: value.to(self.device) for name, value in self.batches.plain(self._i).items()}
        self._i += 1
        loss = self.loss(batch, self.draw())
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned, CLIP_NORM)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        """The loss of a batch on the device; the same batch and draws give the same."""
        latents, prompt_embeds = self.encode(batch, draws.posterior)
        noisy = self.noise_scheduler.add_noise(latents, draws.noise, draws.steps)
        with self.autocast():
            prediction = self.predict(noisy, draws.steps, prompt_embeds, batch)
        return self.error(prediction.float(), draws.noise.float())

    # What methods differ in

    def take_encoders(self, module: Any) -> None:
        """The frozen networks that `encode` asks."""
        self.scaling = module.vae.config.scaling_factor
        if not self.cell.cached:
            self.vae = self._frozen(module.load_vae(), module.vae)
            self.text_encoder = self._frozen(module.load_text_encoder().model, module.text_encoder.model)

    def load(self, module: Any) -> Any:
        """The denoiser as it is before training."""
        return module.load_unet()

    def original(self, module: Any) -> Any:
        """The module's own denoiser."""
        return module.unet

    def build(self, module: StableDiffusionBase) -> Iterable[nn.Parameter]:
        """Make the networks beside the U-Net and return what learns."""
        return self._trained(self.unet, module.unet).parameters()

    def predict(self, noisy: Tensor, steps: Tensor, prompt_embeds: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The predicted noise."""
        return self.unet(noisy, steps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of a prediction."""
        return F.mse_loss(prediction, target)

    def draw(self) -> Draws:
        """The step's random numbers, from the device's generator."""
        steps = torch.randint(len(self.noise_scheduler), self._shape[:1], device=self.device)
        return Draws(self._normal(), self._normal(), steps)

    # What they share

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and text, computed or read."""
        dtype = self.cell.dtype
        if self.cell.cached:
            mean, log_variance = batch["moments"].to(dtype).chunk(2, dim=1)
            return (mean + (0.5 * log_variance).exp() * noise) * self.scaling, batch["prompt_embeds"].to(dtype)
        posterior = self.vae.encode(batch["pixel_values"].to(dtype)).latent_dist
        return (posterior.mean + posterior.std * noise) * self.scaling, self.text_encoder(batch["input_ids"])[0]

    def autocast(self) -> torch.autocast:
        """Mixed precision, where the cell asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cell.dtype == torch.bfloat16)

    def _normal(self) -> Tensor:
        return torch.randn(self._shape, device=self.device, dtype=self.cell.dtype)

    def _frozen(self, network: nn.Module, original: nn.Module) -> nn.Module:
        network.load_state_dict(original.state_dict())
        return network.requires_grad_(False).eval().to(self.device, self.cell.dtype)

    def _trained(self, network: nn.Module, original: nn.Module) -> nn.Module:
        network.load_state_dict(original.state_dict())
        if self.cell.checkpointing:
            network.enable_gradient_checkpointing()
        return network.train()


class LoRA(PlainLoop):
    """Low-rank updates of the attention layers, in float32 on a U-Net in the type of mixed precision."""

    def build(self, module: StableDiffusionBase) -> Iterable[nn.Parameter]:
        adapter = self.config.adapter
        self.unet.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=adapter.rank, lora_alpha=adapter.rank, target_modules=list(adapter.targets)))
        self._trained(self.unet, self.original(module))
        for parameter in self.unet.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.cell.dtype)
        return (parameter for parameter in self.unet.parameters() if parameter.requires_grad)


class KandinskyPrior(LoRA):
    """Low-rank updates of Kandinsky 2.2's prior, which predicts the clean embedding; min-SNR weights."""

    def take_encoders(self, module: Any) -> None:
        statistics = (module.prior.clip_mean, module.prior.clip_std)
        self.mean, self.std = (value.to(self.device, self.cell.dtype) for value in statistics)
        if not self.cell.cached:
            self.image_encoder = self._frozen(module.load_image_encoder().encoder, module.image_encoder.encoder)
            self.text_encoder = self._frozen(module.load_text_encoder().model, module.text_encoder.model)

    def load(self, module: Any) -> Any:
        return module.load_part()

    def original(self, module: Any) -> Any:
        return module.network

    def loss(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        embeddings, words, caption = self._told(batch)
        original = (embeddings - self.mean) / self.std
        noisy = self.noise_scheduler.add_noise(original, draws.noise, draws.steps)
        with self.autocast():
            prediction = self.unet(
                noisy, draws.steps, proj_embedding=caption, encoder_hidden_states=words,
                attention_mask=batch["attention_mask"][:, : words.shape[1]],
            ).predicted_image_embedding  # fmt: skip
        error = (prediction.float() - original.float()).square().mean(1)
        return (error * self._snr(draws.steps).clamp(max=self.config.min_snr_gamma)).mean()

    @torch.no_grad()
    def _told(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of pictures, of words, and of captions."""
        dtype = self.cell.dtype
        if self.cell.cached:
            text = batch["prompt_embeds"].to(dtype)
            return batch["moments"].to(dtype).chunk(2, dim=1)[0], text[:, :-1], text[:, -1]
        text = self.text_encoder(batch["input_ids"])
        embeddings = self.image_encoder(batch["clip_pixel_values"].to(dtype)).image_embeds
        return embeddings, text.last_hidden_state, text.text_embeds

    def _snr(self, steps: Tensor) -> Tensor:
        alpha_bar = self.noise_scheduler.alphas_cumprod.to(self.device)[steps]
        return alpha_bar / (1 - alpha_bar)


class KandinskyDecoder(KandinskyPrior):
    """Low-rank updates of Kandinsky 2.2's decoder, which predicts the noise; min-SNR weights."""

    def take_encoders(self, module: Any) -> None:
        if self.cell.cached:
            return
        prior = module.prior
        self.image_encoder = self._frozen(prior.load_image_encoder().encoder, prior.image_encoder.encoder)
        self.movq = self._frozen(module.load_movq(), module.movq)

    def loss(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        latents, embeddings = self._seen(batch)
        noisy = self.noise_scheduler.add_noise(latents, draws.noise, draws.steps)
        with self.autocast():
            told = {"image_embeds": embeddings}
            output = self.unet(noisy, draws.steps, encoder_hidden_states=None, added_cond_kwargs=told).sample
        error = (output.float().chunk(2, dim=1)[0] - draws.noise.float()).square().mean(dim=(1, 2, 3))
        snr = self._snr(draws.steps)
        return (error * snr.clamp(max=self.config.min_snr_gamma) / snr).mean()

    @torch.no_grad()
    def _seen(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents and embeddings of pictures."""
        dtype = self.cell.dtype
        if self.cell.cached:
            return batch["moments"].to(dtype).chunk(2, dim=1)[0], batch["image_embeds"].to(dtype)
        embeddings = self.image_encoder(batch["clip_pixel_values"].to(dtype)).image_embeds
        return self.movq.encode(batch["pixel_values"].to(dtype)).latents, embeddings


class ControlNet(PlainLoop):
    """A trained copy of the U-Net's encoder beside the frozen U-Net."""

    def build(self, module: StableDiffusionBase) -> Iterable[nn.Parameter]:
        widths = tuple(self.config.conditioning_widths)
        self.controlnet = ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=widths)
        self._trained(self.controlnet, module.controlnet.nets[0])
        self._frozen(self.unet, module.unet)
        if self.cell.checkpointing:
            self.unet.enable_gradient_checkpointing()
        return self.controlnet.parameters()

    def predict(self, noisy: Tensor, steps: Tensor, prompt_embeds: Tensor, batch: dict[str, Tensor]) -> Tensor:
        dtype, control = self.cell.dtype, batch["conditioning_pixel_values"]
        down, middle = self.controlnet(
            noisy, steps, encoder_hidden_states=prompt_embeds, controlnet_cond=control.to(dtype), return_dict=False
        )
        return self.unet(
            noisy,
            steps,
            encoder_hidden_states=prompt_embeds,
            down_block_additional_residuals=[residual.to(dtype) for residual in down],
            mid_block_additional_residual=middle.to(dtype),
            return_dict=False,
        )[0]


class Hypernetwork(PlainLoop):
    """A pair of networks for each width of context; keys and values are made of context + f(context)."""

    def build(self, module: StableDiffusionBase) -> Iterable[nn.Parameter]:
        self._frozen(self.unet, module.unet)
        if self.cell.checkpointing:
            self.unet.enable_gradient_checkpointing()
        pairs = nn.ModuleDict()
        attentions = [m for m in self.unet.modules() if hasattr(m, "to_k")]
        for attention in attentions:
            width = attention.to_k.in_features
            if str(width) not in pairs:
                pairs[str(width)] = nn.ModuleDict({kind: _perceptron(width) for kind in ("k", "v")})
            pair = pairs[str(width)]
            attention.to_k, attention.to_v = _Changed(pair["k"], attention.to_k), _Changed(pair["v"], attention.to_v)
        state = module.hypernetwork.state_dict()
        pairs.load_state_dict({name.replace(".linear", ""): value for name, value in state.items()})
        return pairs.parameters()


class DreamBooth(PlainLoop):
    """Half of each batch are class pictures, whose loss is added with its weight."""

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        ours, prior = prediction.chunk(2)
        our_target, prior_target = target.chunk(2)
        return F.mse_loss(ours, our_target) + self.config.prior_weight * F.mse_loss(prior, prior_target)


class LLCM(PlainLoop):
    """Consistency distillation with a DDIM teacher, which is asked twice; the target network is in float32."""

    def build(self, module: StableDiffusionBase) -> Iterable[nn.Parameter]:
        self._frozen(self.unet, module.unet)
        self.student, self.target = self._student(), self._student()
        self.target.load_state_dict(module.target.state_dict())
        self.target.requires_grad_(False)
        self._unconditional = self._embed_nothing(module).to(self.device, self.cell.dtype)
        return self._trained(self.student, module.student).parameters()

    def step(self) -> Tensor:
        loss = super().step()
        decay = self.config.target_decay
        with torch.no_grad():
            for target, source in zip(self.target.parameters(), self.student.parameters(), strict=True):
                target.mul_(decay).add_(source, alpha=1 - decay)
        return loss

    def loss(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        config = self.config
        latents, prompt_embeds = self.encode(batch, draws.posterior)
        skipped = config.noise.steps // config.solver_steps
        start = (draws.steps + 1) * skipped - 1
        end = (start - skipped).clamp(min=0)
        noisy = self.noise_scheduler.add_noise(latents, draws.noise, start)
        w = config.guidance_min - 1 + (config.guidance_max - config.guidance_min) * draws.guidance
        embedding = _guidance_embedding(w, config.guidance_dim)
        prediction = self._consistent(self.student, noisy, start, prompt_embeds, embedding)
        with torch.no_grad():
            previous = self._solver_step(noisy, start, end, prompt_embeds, w.reshape(-1, 1, 1, 1))
            target = self._consistent(self.target, previous, end, prompt_embeds, embedding)
        difference = prediction.float() - target.float()
        return ((difference.square() + config.huber_c**2).sqrt() - config.huber_c).mean()

    def draw(self) -> Draws:
        n = self._shape[:1]
        steps = torch.randint(self.config.solver_steps, n, device=self.device)
        return Draws(self._normal(), self._normal(), steps, torch.rand(n, device=self.device))

    def _solver_step(self, noisy: Tensor, start: Tensor, end: Tensor, prompt_embeds: Tensor, w: Tensor) -> Tensor:
        nothing = self._unconditional.expand_as(prompt_embeds)
        conditional = self._teacher(noisy, start, prompt_embeds)
        unconditional = self._teacher(noisy, start, nothing)
        original, noise = (c + w * (c - u) for c, u in zip(conditional, unconditional, strict=True))
        return self.noise_scheduler.add_noise(original, noise, end)

    def _teacher(self, noisy: Tensor, steps: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            output = self.unet(noisy, steps, encoder_hidden_states=prompt_embeds).sample.float()
        return self._original(output, noisy, steps), output

    def _consistent(
        self, network: nn.Module, noisy: Tensor, steps: Tensor, prompt_embeds: Tensor, embedding: Tensor
    ) -> Tensor:
        with self.autocast():
            output = network(noisy, steps, timestep_cond=embedding, encoder_hidden_states=prompt_embeds).sample.float()
        scaled = 10.0 * steps.reshape(-1, 1, 1, 1)
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return c_skip * noisy + c_out * self._original(output, noisy, steps)

    def _original(self, noise: Tensor, noisy: Tensor, steps: Tensor) -> Tensor:
        alpha_bar = self.noise_scheduler.alphas_cumprod.to(self.device)[steps].reshape(-1, 1, 1, 1)
        return (noisy - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()

    def _student(self) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_config(self.unet.config, time_cond_proj_dim=self.config.guidance_dim)

    @torch.no_grad()
    def _embed_nothing(self, module: StableDiffusionBase) -> Tensor:
        return module.embed([""]).embeddings


LOOPS = {
    "stable_diffusion": PlainLoop,
    "stable_diffusion_lora": LoRA,
    "controlnet": ControlNet,
    "llcm": LLCM,
    "hypernetwork": Hypernetwork,
    "dreambooth": DreamBooth,
    "kandinsky22_prior_lora": KandinskyPrior,
    "kandinsky22_decoder_lora": KandinskyDecoder,
}
"""The plain loop of each method."""


def _perceptron(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, width))


class _Changed(nn.Module):
    """A layer that is given x + f(x)."""

    def __init__(self, change: nn.Module, layer: nn.Module):
        super().__init__()
        self.change, self.layer = change, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.change(x))


def _guidance_embedding(w: Tensor, dim: int) -> Tensor:
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) / (dim // 2 - 1) * torch.arange(dim // 2)).to(w.device)
    angles = (1000.0 * w)[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
