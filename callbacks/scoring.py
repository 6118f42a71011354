"""Generated pictures scored against a data set's: one way, for training and for `medsynth evaluate`."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional
from typing import Protocol as Interface

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from datamodules.base import ImageDataModule, SizedDataset
from datamodules.stream import EvaluationSampler, derive_seed
from lightning_modules.base import GenerativeModule
from medsynth.errors import UserError
from medsynth.files import put_whole
from medsynth.ranges import choice, number
from metrics.extractors import EXTRACTORS, RESIZES, FeatureExtractor, build_extractor, planned_name
from metrics.images import quantise
from metrics.paired import PAIRED, PairedSimilarity
from metrics.protocol import Protocol, protocol_of
from metrics.suite import LEAST, MAX_BANK, GenerationMetrics, score_names


@dataclass
class EvaluationConfig:
    """How generated pictures are scored while training."""

    images: int = number(2000, least=0)
    """Pictures generated for each evaluation, over all processes; 0 scores nothing."""
    every: int = number(1, least=1)
    """Validations from one evaluation, and one grid, to the next."""
    at_start: bool = False
    """Evaluate before the first step too."""
    batch_size: int = number(32, least=1)
    """Pictures a process generates at once."""
    extractor: str = choice("inception", tuple(EXTRACTORS))
    """Features: inception (of 2015-12-05, gives fid), random (fixed seed, needs no weights, gives fd_random), clef (the
    MEDVQA-GI organisers', gives clef_fid and clef_is), transformers (a folder of CLIP, DINOv2 …, gives fd_<name>)."""
    weights: Optional[str] = None
    """Its weights: a file, of transformers a folder; of inception by default where torch-fidelity has its download."""
    resize: str = choice("tensorflow", RESIZES)
    """How pictures come to Inception's input: tensorflow, as fid has it, or clean, antialiased, for clean_fid."""
    reference: str = choice("all", ("train", "val", "all"))
    """Real pictures to score against: train, val or all (the papers' choice)."""
    paired: bool = False
    """Compare each generated picture with the real one whose conditions it was given too: eval/psnr, eval/psnr_pooled
    (dB), eval/ssim, eval/ssim_whole."""
    steps: Optional[int] = number(None, least=1)
    """Denoising steps; by default the model's."""
    guidance: Optional[float] = number(None, least=0)
    """Guidance; by default the model's."""
    grid: int = number(8, least=0)
    """Validation samples of the grid, with fixed prompts and seeds; 0 draws none."""
    cache: str = "~/.cache/medsynth"
    """Folder where statistics of real pictures are kept, under a key of data, resolution and extractor."""

    def __post_init__(self):
        if 0 < self.images < LEAST:
            raise UserError(f"evaluation.images={self.images}: scores need at least {LEAST}; 0 scores nothing")

    def names(self) -> list[str]:
        """What each evaluation logs that can be compared; of the deviations, the kernel distance's may be left out."""
        if not self.images:
            return []
        name = planned_name(self.extractor, self.weights, self.resize)
        scores = score_names(name, EXTRACTORS[self.extractor].classes > 0)
        scores = [name for name in scores if not name.endswith("_std")]
        return [f"eval/{name}" for name in scores + (list(PAIRED) if self.paired else [])]


class Processes(Interface):
    """Those that score together."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def all_agree(self, decision: bool) -> bool:
        """Whether each of them says yes; all call it together."""
        ...

    def writing(self, path: Path) -> AbstractContextManager[None]:
        """Around the writing of a file that one can do without."""
        ...

    def between(self) -> None:
        """Called by all before each batch."""
        ...


class Alone:
    """One process."""

    rank, world = 0, 1

    def all_agree(self, decision: bool) -> bool:
        return decision

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield
        except OSError:
            pass

    def between(self) -> None:
        pass


class Scoring:
    """How a run's pictures are scored, whoever asks for it."""

    def __init__(self, config: EvaluationConfig, seed: int):
        """seed: the run's, from which each picture's follows.

        Raises:
            UserError: weights of the extractor are missing, or not what they should be.
        """
        self.config, self.seed = config, seed
        self.extractor: FeatureExtractor = build_extractor(config.extractor, config.weights, resize=config.resize)

    def protocol(self, data: ImageDataModule) -> Protocol:
        """By what the scores are scores: the same for every process and every picture drawn."""
        return protocol_of(
            self.extractor,
            data.reading(),
            reference=self.config.reference,
            split_seed=None if self.config.reference == "all" else data.seed,
            real=len(data.reference_set(self.config.reference)),
            fake=self.config.images,
            bank=MAX_BANK,
        )

    def score(
        self,
        data: ImageDataModule,
        module: GenerativeModule,
        processes: Processes,
        checked: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> dict[str, float]:
        """Draw the run's pictures and score them; every score by its name, the same on every process.

        checked: what each batch that is drawn goes through first.
        """
        metrics, paired = self.fill(data, module, processes, checked)
        values = metrics.compute() | ({} if paired is None else paired.compute())
        self.extractor.cpu()  # its memory is training's again
        return values

    def fill(
        self,
        data: ImageDataModule,
        module: GenerativeModule,
        processes: Processes,
        checked: Callable[[Tensor], Tensor] = lambda images: images,
        keep_logits: bool = False,
    ) -> tuple[GenerationMetrics, PairedSimilarity | None]:
        """Draw the run's pictures; the metrics that have seen them, of pairs only where the config asks for them.

        checked: as `score`. keep_logits: as `GenerationMetrics`.
        """
        reals = data.reference_set(self.config.reference)
        total = self.config.images
        metrics = GenerationMetrics(self.extractor, len(reals), total, keep_logits=keep_logits).to(module.device)
        self._load_reference(data, metrics, reals, processes)
        paired = PairedSimilarity(self.config.images).to(module.device) if self.config.paired else None
        for rows in turns(processes, self.config.images, self.config.batch_size, "generating"):
            indices = [max(i, 0) for i in rows]  # padding draws picture 0: a sharded model needs every process
            images = quantise(checked(self.draw(data, module, indices)))
            metrics.update_fake(images, torch.tensor(rows))
            if paired is not None:
                paired.update(images, data.paired_pictures(indices), torch.tensor(rows))
        return metrics, paired

    def draw(self, data: ImageDataModule, module: GenerativeModule, indices: list[int]) -> Tensor:
        """Those of the pictures that are scored: float (n, 3, H, W) in [0, 1]."""
        return module.sample(
            data.evaluation_conditions(indices).to(module.device),
            [derive_seed(self.seed, "evaluation", i) for i in indices],
            steps=self.config.steps,
            guidance=self.config.guidance,
        )

    def _load_reference(
        self, data: ImageDataModule, metrics: GenerationMetrics, reals: SizedDataset, processes: Processes
    ) -> None:
        """Statistics of the real pictures: from disk, or computed by all processes and kept there."""
        reading = data.reading()["reading"]
        key = (data.fingerprint(), self.config.reference, data.config.resolution, self.extractor.identity, reading)
        key += (self.config.resize,) if self.config.resize != "tensorflow" else ()
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
        path = Path(self.config.cache).expanduser() / f"reference-{name}.safetensors"
        kept = _kept(path)
        # All agree: another run may be writing the file right now.
        if processes.all_agree(kept is not None) and kept is not None:
            metrics.load_real_state(kept)
            return
        for rows in turns(processes, len(reals), self.config.batch_size, "real pictures"):
            metrics.update_real(torch.stack([reals[max(i, 0)] for i in rows]), torch.tensor(rows))
        state = metrics.real_state()
        if processes.rank == 0:
            with processes.writing(path):
                put_whole(path, save({key: value.contiguous().cpu() for key, value in state.items()}))


def turns(processes: Processes, total: int, batch_size: int, title: str) -> Iterator[list[int]]:
    """This process's batches of the rows 0 … total-1, with a bar on the first."""
    batches: Iterable[list[int]] = EvaluationSampler(total, batch_size, processes.rank, processes.world)
    hidden = None if processes.rank == 0 else True  # None: only where the output is no terminal
    for rows in tqdm(batches, desc=title, leave=False, disable=hidden, unit="batch"):
        processes.between()
        yield rows


def _kept(path: Path) -> dict[str, Tensor] | None:
    """Statistics of real pictures that an earlier run kept; None where there are none, or they cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None
