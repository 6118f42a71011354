"""Leapfrog Latent Consistency Model: a fine-tuned Stable Diffusion distilled to a few steps (LLCM, section 3.2.4)."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from datamodules.batches import ImageBatch
from lightning_modules.base import STRATEGIES, Supports
from lightning_modules.families.latent_diffusion import Context, Denoised, SamplerConfig
from lightning_modules.families.stable_diffusion import StableDiffusionBase, StableDiffusionBaseConfig
from lightning_modules.maths.diffusion import SampleRandom, add_noise, guide, to_noise, to_original
from lightning_modules.maths.solvers import SOLVERS, boundary_scalings, guidance_embedding, huber, leapfrog_step
from lightning_modules.parts.optim import OptimConfig
from medsynth.errors import UserError
from medsynth.ranges import choice, number


@dataclass(frozen=True)
class LLCMConfig(StableDiffusionBaseConfig):
    """Consistency distillation. Defaults: the paper, and the authors' code where the paper is silent."""

    pretrained: str = "runs/stable_diffusion_hips/export"
    """The teacher: folder or hub id of a fine-tuned Stable Diffusion; "random" makes one."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(name="lcm", steps=4, guidance=8.0))
    """The reverse process; guidance is an input of the network and costs nothing."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="adam", lr=8e-6, weight_decay=0.0))
    """Optimizer."""
    solver: str = choice("leapfrog", tuple(SOLVERS))
    """The teacher's step: leapfrog (as published), ddim, or midpoint (second order, one more evaluation)."""
    leapfrog_h: float = number(0.5, above=0)
    """Step length h of the leapfrog solver; at 0.5, the paper's, its step is DDIM's."""
    solver_steps: int = number(50, least=1)
    """Steps the teacher would take from noise to picture; k = noise.steps / solver_steps is skipped at once."""
    guidance_min: float = number(6.0, least=0)
    """Least guidance that is distilled, as u + g·(c - u); the paper's ω is g - 1."""
    guidance_max: float = number(16.0, least=0)
    """Greatest guidance that is distilled."""
    guidance_dim: int = number(256, least=4)
    """Width of the guidance embedding."""
    huber_c: float = number(0.001, above=0)
    """Where the distance of two latents turns from square to linear."""
    target_decay: float = number(0.95, least=0, below=1)
    """Share of the old average in each update of the target network."""

    def __post_init__(self):
        super().__post_init__()
        if self.leapfrog_h != 0.5 and self.solver != "leapfrog":
            raise UserError(f"model.leapfrog_h={self.leapfrog_h}: the solver {self.solver} has no h; leave the key out")
        if self.sampler.name != "lcm":
            raise UserError(f"model.sampler.name={self.sampler.name}: a consistency model samples with lcm")
        if self.noise.steps % self.solver_steps:
            raise UserError(f"model.solver_steps={self.solver_steps} must divide model.noise.steps={self.noise.steps}")
        if self.guidance_min > self.guidance_max:
            raise UserError(f"model.guidance_min={self.guidance_min}: must not exceed guidance_max={self.guidance_max}")
        if self.guidance_dim % 2:
            raise UserError(f"model.guidance_dim={self.guidance_dim}: must be even")

    @property
    def most_steps(self) -> int:
        return self.solver_steps  # its scheduler skips along the teacher's


class LLCM(StableDiffusionBase):
    """A student that gives, from any point of the teacher's trajectory, its end.

    Student and target are U-Nets with a further input, the guidance. The target is the student's running average.
    """

    Config = LLCMConfig
    config: LLCMConfig
    supports = Supports(frozenset({"captions"}), STRATEGIES)
    guidance_is_input = True

    def build(self) -> None:
        super().build()
        self.student, self.target = self._student(), self._student()
        if self.config.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def averaged_modules(self) -> dict[str, nn.Module]:
        return {"target": self.target}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        super().compile(*args, **kwargs)
        self.unet.compile(*args, **kwargs)

    def latent_losses(self, z_0: Tensor, random: SampleRandom, batch: ImageBatch) -> dict[str, Tensor]:
        """Distance of the student at t_{n+k} from the target at the teacher's z_{t_n} (paper, eq. 5)."""
        config = self.config
        noise = random.normal(*z_0.shape[1:])
        t, previous = self._draw_steps(random)
        guidance = config.guidance_min + (config.guidance_max - config.guidance_min) * random.uniform()
        z_t = add_noise(z_0, noise, t, self.alpha_bar)
        context = self.context_of(batch)
        with torch.no_grad():
            predict = partial(self._teacher, context=self._with_unconditional(context), guidance=guidance)
            z_previous = self._solver()(predict, z_t, t, previous, self.alpha_bar)
            target = self._consistent(self.target, z_previous, previous, context, guidance)
        prediction = self._consistent(self.student, z_t, t, context, guidance)
        return {"loss": huber(prediction, target, config.huber_c).mean()}

    def denoise(
        self, z_t: Tensor, t: Tensor, context: Context, self_condition: Tensor | None, guidance: float
    ) -> Denoised:
        output = self._guided(self.student, z_t, t, context, torch.full_like(t, guidance, dtype=torch.float32))
        return Denoised(output, to_original(self.prediction, output, z_t, t, self.alpha_bar))

    def scheduler_options(self) -> dict[str, Any]:
        return super().scheduler_options() | {"original_inference_steps": self.config.solver_steps}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The student's step, and within it the target's, so that a checkpoint after it holds both."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            average = get_ema_multi_avg_fn(self.config.target_decay)
            average(_parts(self.target), _parts(self.student), None)

    def export(self, directory: Path) -> None:
        """Write a pipeline folder whose scheduler is diffusers' LCMScheduler."""
        self.export_pipeline(directory, unet=self.student)

    def _student(self) -> UNet2DConditionModel:
        """The teacher with a guidance input that does nothing yet."""
        student = UNet2DConditionModel.from_config(self.unet.config, time_cond_proj_dim=self.config.guidance_dim)
        student.load_state_dict(self.unet.state_dict(), strict=False)
        nn.init.zeros_(student.time_embedding.cond_proj.weight)
        return student

    def _draw_steps(self, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """t_{n+k} and t_n, int64 (B,): one of the teacher's steps and the one before it."""
        k = self.config.noise.steps // self.config.solver_steps
        t = (random.integers(self.config.solver_steps) + 1) * k - 1
        return t, (t - k).clamp_min(0)

    def _solver(self):
        if self.config.solver == "leapfrog":
            return partial(leapfrog_step, h=self.config.leapfrog_h)
        return SOLVERS[self.config.solver]

    def _with_unconditional(self, context: Context) -> Context:
        """The unconditional rows before the conditional ones."""
        nothing = self.embed([""]).embeddings.expand_as(context.embeddings)
        return context._replace(embeddings=torch.cat([nothing, context.embeddings]))

    def _teacher(self, z_t: Tensor, t: Tensor, *, context: Context, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """z_0 and noise as the teacher sees them under guidance, both predictions in one batch (paper, eq. 7)."""
        unconditional, conditional = self.predict(torch.cat([z_t, z_t]), torch.cat([t, t]), context).float().chunk(2)
        output = guide(unconditional, conditional, guidance[:, None, None, None])
        answer = (self.prediction, output, z_t, t, self.alpha_bar)
        return to_original(*answer), to_noise(*answer)

    def _consistent(self, network: nn.Module, z_t: Tensor, t: Tensor, context: Context, guidance: Tensor) -> Tensor:
        """The consistency function: z_0 by the network, z_t itself at t = 0 (paper, eq. 4)."""
        output = self._guided(network, z_t, t, context, guidance)
        c_skip, c_out = (c[:, None, None, None] for c in boundary_scalings(t))
        return c_skip * z_t + c_out * to_original(self.prediction, output, z_t, t, self.alpha_bar)

    def _guided(self, network: nn.Module, z_t: Tensor, t: Tensor, context: Context, guidance: Tensor) -> Tensor:
        # The embedding is of the paper's ω, as diffusers' pipelines have it.
        embedding = guidance_embedding(guidance - 1, self.config.guidance_dim)
        return network(z_t, t, encoder_hidden_states=context.embeddings, timestep_cond=embedding).sample.float()


def _parts(network: nn.Module) -> list[Tensor]:
    """What this process holds of each weight: all of it, or under fsdp and deepspeed3 a part."""
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in network.parameters()]
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
