"""What adversarial methods derive from: a generator, a discriminator, and the steps that they take in turn."""

import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Optional

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, save
from torch.export import export as as_program

from datamodules.batches import Conditions, ImageBatch
from lightning_modules.base import GenerativeModule, OptimConfig, Supports, to_image_range, to_model_range
from lightning_modules.maths.adversarial import Turns
from lightning_modules.maths.augmentation import DRAWS, adapted_probability, diff_augment, overfitting
from lightning_modules.maths.diffusion import SampleRandom
from lightning_modules.nets.norms import SyncBatchNorm2d, recomputed_statistics
from lightning_modules.nets.spectral import fit_vectors, without_spectral_norm
from lightning_modules.parts import optim
from medsynth.errors import UserError
from medsynth.ranges import choice, number

NOISES = ("normal", "uniform")
AUGMENTATIONS = ("none", "diffaugment", "ada")
CERTAIN_STEPS = 1000
"""Steps in a row in which the discriminator has told every picture before it is said that it has won."""
_LOOKED_AT = 100  # steps from one look at that to the next, since each waits for the device
_STATISTICS, _AT_ONCE = 256, 64  # pictures that norm statistics are taken anew from, and of one pass


@dataclass(frozen=True)
class AdversarialConfig:
    """What every adversarial method is configured by."""

    resolution: int = number(64, least=8)
    """Side of the square pictures, pixels."""
    latent: int = number(100, least=1)
    """Numbers that a picture is drawn from."""
    noise: str = choice("normal", NOISES)
    """How they are distributed: normal, or uniform in [-1, 1)."""
    discriminator_steps: int = number(1, least=1)
    """Steps of the discriminator for each of the generator's; each takes a batch and counts as one."""
    augmentation: str = choice("none", AUGMENTATIONS)
    """How all that the discriminator sees is varied: none, diffaugment (colour, translation, cutout), or ada, the same
    with a probability that follows how far the discriminator overfits; ada needs one that gives logits."""
    ada_target: float = number(0.6, least=-1, most=1)
    """Share of real pictures told as real beyond those told as generated that ada aims at."""
    ada_pictures: int = number(500_000, least=1)
    """Real pictures in which ada's probability would go from 0 to 1."""
    discriminator_lr: Optional[float] = number(None, above=0)
    """Learning rate of the discriminator at its highest; null: the generator's, `optim.lr`."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="adam", lr=2e-4, weight_decay=0.0))
    """Optimizer of both players, each of which has its own."""


class Scalars(nn.Module):
    """Numbers that training changes without optimising them, by name: float32 buffers that a checkpoint has."""

    def __init__(self, **values: float):
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, torch.tensor(value))


class Adversarial(GenerativeModule):
    """Generator and discriminator, each minimising a loss of its own.

    One batch is one step: the discriminator's, and in its turn (`turns`) the generator's after it, on the same
    generated pictures and against the discriminator as it is then. Each player's gradient is clipped by itself, and a
    step that is not finite is left out with all that it has done to statistics and scalars.
    """

    Config = AdversarialConfig
    config: Any
    supports = Supports(frozenset(), unconditional=True)
    uses_all_weights = False  # each player's backward pass leaves the other alone
    gives_logits: ClassVar[bool] = True
    """Whether a score's sign says on which side of the discriminator's boundary a picture is."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.automatic_optimization = False
        self._certain: Tensor | None = None  # steps in a row in which the discriminator told every picture
        self._warned = False
        self._moved: list[Tensor] = []  # buffers of statistics and scalars

    # What a method fills in

    @abstractmethod
    def make_generator(self) -> nn.Module:
        """Maps latents (n, Z), where it is conditional with int64 labels (n,), to pictures (n, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def make_discriminator(self) -> nn.Module:
        """Maps pictures in [-1, 1], where it is conditional with labels, to scores (n,)."""

    def discriminator_loss(self, real_B: Tensor, fake_B: Tensor) -> Tensor:
        """What the discriminator minimises, of its scores."""
        raise NotImplementedError

    def generator_loss(self, fake_B: Tensor) -> Tensor:
        """What the generator minimises, of the discriminator's scores."""
        raise NotImplementedError

    # And where it is not as the others

    def turns(self) -> Turns:
        """When the generator moves."""
        return Turns(critic=self.config.discriminator_steps)

    def scalars_at_start(self) -> dict[str, float]:
        """Numbers that `settle` changes, by name; `self.scalars` has them as buffers."""
        return {}

    def discriminator_terms(
        self, real: Tensor, fake: Tensor, labels: Tensor | None, random: SampleRandom
    ) -> dict[str, Tensor]:
        """Scalars of pictures in [-1, 1], among them "discriminator", which it minimises. `fake` has no gradient."""
        scores = self.judge(real, labels), self.judge(fake, labels)
        return {"discriminator": self.discriminator_loss(*scores), **self.told(*scores)}

    def generator_terms(self, fake: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Scalars, among them "generator", which it minimises."""
        return {"generator": self.generator_loss(self.judge(fake, labels))}

    def bound(self) -> None:
        """Keep the discriminator within bounds after its step."""

    def settle(self, terms: dict[str, Tensor]) -> None:
        """Move `self.scalars` at the end of a step by its terms, which are this process's."""

    # What is the same for all

    @property
    def classes(self) -> int | None:
        """How many classes it draws; None where it is told none."""
        return self.config.classes if "labels" in self.supports.conditions else None

    def build(self) -> None:
        if self.config.augmentation == "ada" and not self.gives_logits:
            raise UserError(f"model.augmentation=ada: {type(self).__name__} gives no logits; take diffaugment or none")
        self.generator, self.discriminator = self.make_generator(), self.make_discriminator()
        probability = {"ada": {"p": 0.0}}.get(self.config.augmentation, {})
        self.scalars = Scalars(generator=0.0, **probability, **self.scalars_at_start())

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.classes is None or self.datamodule is None:
            return
        names = self.datamodule.split_facts().get("classes", [])
        if len(names) != self.classes:
            known = f"{len(names)} classes ({', '.join(names)})" if names else "no classes"
            raise UserError(f"model.classes={self.classes}: the data set has {known}; set it to their number")

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def averaged_modules(self) -> dict[str, nn.Module]:
        return {"scalars": self.scalars}

    def configure_optimizers(self) -> Any:
        settings = self.config.optim
        judging = replace(settings, lr=self.config.discriminator_lr or settings.lr)
        total, made = int(self.trainer.estimated_stepping_batches), []
        for name, each in (("discriminator", judging), ("generator", settings)):
            chosen = optim.configure_optimizers(each, {name: self.trainable_modules()[name]}, total)
            made.append({"optimizer": chosen["optimizer"], "lr_scheduler": chosen["lr_scheduler"]["scheduler"]})
        return made

    def on_train_start(self) -> None:
        super().on_train_start()
        self._moved = []  # they may have gone to another device
        self._set_rates()

    def learn(self, batch: ImageBatch) -> dict[str, Tensor]:
        of_discriminator, of_generator = self.optimizers()
        real, labels = to_model_range(batch.pictures()), self._labels_of(batch.conditions)
        random, before = SampleRandom(batch.seeds, self.device), self._statistics()
        moves = self.turns().generator_moves(self.trainer.global_step + 1)
        with torch.set_grad_enabled(moves):
            fake = self.draw(self.latents(random), labels)

        real, fake = (self._varied(each, random) for each in (real, fake))
        terms = self.discriminator_terms(real, fake.detach(), labels, random)
        self._descend(of_discriminator, terms["discriminator"])
        of_discriminator.step()
        self.bound()
        if moves:
            with _held(self.discriminator):
                terms |= self.generator_terms(fake, labels)
                self._descend(of_generator, terms["generator"])
            self.trainer.strategy.optimizer_step(of_generator.optimizer, lambda: None, self)  # uncounted
            self.scalars.get_buffer("generator").copy_(terms["generator"].detach())
        with torch.no_grad():
            self.settle(terms)
            self._adapt(terms, len(batch))
            self._keep_finite(before)
        self._set_rates()
        self._notice(terms)
        terms["generator"] = self.scalars.get_buffer("generator").clone()  # its newest
        return {**terms, "loss": terms["discriminator"].detach() + terms["generator"]}

    def losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Both players' terms, each with the gradient of its own player alone, and their sum as "loss"."""
        real, labels = to_model_range(batch.pictures()), self._labels_of(batch.conditions, check=True)
        random = SampleRandom(batch.seeds, self.device)
        fake = self.draw(self.latents(random), labels)
        terms = self.discriminator_terms(real, fake.detach(), labels, random)
        with _held(self.discriminator):
            terms |= self.generator_terms(fake, labels)
        return {**terms, "loss": terms["discriminator"] + terms["generator"]}

    @torch.no_grad()
    def sample(
        self, conditions: Conditions, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        labels = self._labels_of(conditions, check=True)
        with _evaluating(self.generator):
            return to_image_range(self.draw(self.latents(SampleRandom(seeds, self.device)), labels))

    def latents(self, random: SampleRandom) -> Tensor:
        """(n, Z), as `noise` says."""
        size = self.config.latent
        return random.normal(size) if self.config.noise == "normal" else random.uniform(size) * 2 - 1

    def draw(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """The generator's pictures, float32 in [-1, 1]."""
        return (self.generator(z) if labels is None else self.generator(z, labels)).float()

    def judge(self, pictures: Tensor, labels: Tensor | None) -> Tensor:
        """The discriminator's scores, float32 (n,)."""
        scores = self.discriminator(pictures) if labels is None else self.discriminator(pictures, labels)
        return scores.float()

    @staticmethod
    def told(real_B: Tensor, fake_B: Tensor) -> dict[str, Tensor]:
        """Of logits: "accuracy", the share of pictures that are told rightly, and "overfitting" (ADA, eq. 1)."""
        right = torch.cat([real_B > 0, fake_B < 0]).float().mean()
        return {"accuracy": right, "overfitting": overfitting(real_B)}

    def over_processes(self, value: Tensor) -> Tensor:
        """A scalar of each process, (processes,); all ask together."""
        gathered: Any = self.all_gather(value)
        return gathered.reshape(-1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip this player's gradient here, where it has been unscaled and its norm is known."""
        before, self.gradient_norm = self.gradient_norm, None
        super().on_before_optimizer_step(optimizer)
        self.configure_gradient_clipping(optimizer, self.gradient_clip_norm)
        if self.gradient_norm is not None and before is not None:
            self.gradient_norm = torch.maximum(self.gradient_norm, before)

    def after_swap(self) -> None:
        """Fit spectral norm's vectors to the weights, and the generator's norm statistics to what it now draws.

        The discriminator's statistics stay: they are of real pictures, too, and only its validation loss uses them.
        """
        for network in self.trainable_modules().values():
            fit_vectors(network)
        if not any(isinstance(layer, SyncBatchNorm2d) for layer in self.generator.modules()):
            return
        with torch.no_grad(), _evaluating(self.generator), recomputed_statistics(self.generator):
            for first in range(0, _STATISTICS, _AT_ONCE):
                seeds = list(range(first, first + _AT_ONCE))
                labels = None if self.classes is None else torch.tensor(seeds, device=self.device) % self.classes
                self.draw(self.latents(SampleRandom(seeds, self.device)), labels)

    def export(self, directory: Path) -> None:
        """Write both players' weights, spectral norm divided out, the config, and the generator as torch exports it.

        `generator.pt2` maps latents (n, Z), where it is conditional with labels, to pictures in [0, 1].
        """
        directory.mkdir(parents=True, exist_ok=True)
        for name, network in self.trainable_modules().items():
            plain = without_spectral_norm(network).cpu().to(memory_format=torch.contiguous_format)
            save_file(plain.state_dict(), directory / f"{name}.safetensors")
            if name == "generator":
                save(self._program(plain), directory / "generator.pt2")
        described = {"class": type(self).__name__, "classes": self.classes, "config": asdict(self.config)}
        (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def _program(self, generator: nn.Module) -> ExportedProgram:
        """The graph of drawing any number of pictures."""
        inputs = [torch.zeros(2, self.config.latent)]
        if self.classes is not None:
            inputs.append(torch.zeros(2, dtype=torch.int64))
        any_number = ({0: Dim("pictures", min=1)},) * len(inputs)
        return as_program(Drawing(generator).eval(), tuple(inputs), dynamic_shapes=(any_number,))

    def _labels_of(self, conditions: Conditions, check: bool = False) -> Tensor | None:
        """Labels on the device, None where it is told none; `check` waits for the device."""
        if self.classes is None:
            return None
        labels = conditions.labels
        if labels is None:
            raise UserError(f"{type(self).__name__} learns and draws by classes: there are no labels")
        if check and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise UserError(
                f"model.classes={self.classes}: there is a class {int(labels.max())}, counted from 0; set it to the "
                "number of the data set's classes"
            )
        return labels.to(self.device)

    def _descend(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)

    def _set_rates(self) -> None:
        """The rates of the coming step, a function of the step: also of a player that has not moved."""
        for each in self.trainer.lr_scheduler_configs:
            optim.resume_schedule(each.scheduler, self.trainer.global_step)  # pyrefly: ignore[bad-argument-type]

    def _varied(self, pictures: Tensor, random: SampleRandom) -> Tensor:
        """As the discriminator sees them in training."""
        if self.config.augmentation == "none":
            return pictures
        p = self.scalars.get_buffer("p") if self.config.augmentation == "ada" else 1.0
        return diff_augment(pictures, random.uniform(DRAWS), p=p)

    def _adapt(self, terms: dict[str, Tensor], pictures: int) -> None:
        """Move ada's probability by all processes' pictures."""
        if self.config.augmentation == "ada":
            p, found = self.scalars.get_buffer("p"), self.over_processes(terms["overfitting"])
            shown, config = pictures * len(found), self.config
            p.copy_(adapted_probability(p, found.mean(), shown, config.ada_target, config.ada_pictures))
            terms["augmentation"] = p.clone()

    def _statistics(self) -> list[tuple[Tensor, Tensor]]:
        """What a step moves beside weights and vectors, and its values now."""
        if not self._moved:
            norms = (m for network in self.trainable_modules().values() for m in network.modules())
            self._moved = [b for m in norms if isinstance(m, SyncBatchNorm2d) for b in m.buffers()]
            self._moved += self.scalars.buffers()
        return [(buffer, buffer.clone()) for buffer in self._moved]

    def _keep_finite(self, before: list[tuple[Tensor, Tensor]]) -> None:
        """Take back what a step has moved that is left out: statistics would never lose a NaN again."""
        if self.gradient_norm is None:
            return
        finite = self.gradient_norm.isfinite()
        for buffer, old in before:
            buffer.copy_(torch.where(finite, buffer, old))

    def _notice(self, terms: dict[str, Tensor]) -> None:
        """Say once where the discriminator has won: then the generator has nothing left to learn from."""
        if "accuracy" not in terms or self._warned:
            return
        certain = (terms["accuracy"] == 1).float()
        self._certain = certain if self._certain is None else (self._certain + 1) * certain
        if self.trainer.global_step % _LOOKED_AT == 0 and float(self._certain) >= CERTAIN_STEPS:
            self._warned = True
            rank_zero_warn(
                f"the discriminator has told every picture in {CERTAIN_STEPS} steps in a row, so that the generator "
                "learns little: lower model.discriminator_lr, or show more pictures"
            )


class Drawing(nn.Module):
    """A generator whose pictures are in [0, 1]."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = generator

    def forward(self, *inputs: Tensor) -> Tensor:
        return (self.generator(*inputs) / 2 + 0.5).clamp(0, 1)


@contextmanager
def _held(network: nn.Module) -> Iterator[None]:
    """Let gradients pass through a network and reach none of its weights."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
