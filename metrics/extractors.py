"""The networks whose features pictures are compared by."""

import difflib
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as INCEPTION_URL
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3
from torchmetrics import Metric

from medsynth.errors import UserError
from medsynth.files import sha256_of
from medsynth.pickled import read_pickled
from metrics import vision
from metrics.clef import CLASSES, Classifier, ClefScore, flat_resized, pooled
from metrics.inception_score import InceptionScore


class Features(NamedTuple):
    """Of n pictures: `pool`, float32 (n, dim), and `logits`, float32 (n, classes), or None where there are none."""

    pool: Tensor
    logits: Tensor | None


class FeatureExtractor(nn.Module, ABC):
    """A frozen network, always in evaluation mode, always in full float32 precision.

    name: what its scores are named by.
    identity: kind and checksum of the weights, for the keys of stored statistics.
    dim, classes: sizes of a picture's features and logits; 0 classes where there are no logits.
    resize, antialias, input_range: how a picture becomes the network's input, in the words of a protocol.
    """

    name: str
    identity: str
    dim: int
    classes: int = 0
    resize: str
    antialias: bool
    input_range: str

    @property
    def has_logits(self) -> bool:
        return self.classes > 0

    def class_score(self, total: int) -> Metric | None:
        """The metric of the logits of `total` pictures; None where there are none."""
        return InceptionScore(total, self.classes) if self.has_logits else None

    def train(self, mode: bool = True) -> "FeatureExtractor":
        return super().train(False)

    def forward(self, images: Tensor) -> Features:
        """Features of `images`, uint8 (n, 3, H, W), n > 0, RGB, of any size.

        Raises:
            ValueError: another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"features are of uint8 (n, 3, H, W), not of {images.dtype} {tuple(images.shape)}")
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False), _full_precision():
            return self._features(images)

    @abstractmethod
    def _features(self, images: Tensor) -> Features: ...


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 on CUDA, whatever training has chosen, so that features are those of the CPU."""
    # pyrefly: ignore[missing-attribute]  # torch makes cudnn.conv when it is imported
    operations = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    chosen = [operation.fp32_precision for operation in operations]
    for operation in operations:
        operation.fp32_precision = "ieee"
    try:
        yield
    finally:
        for operation, precision in zip(operations, chosen, strict=True):
            operation.fp32_precision = precision


def inception_path() -> Path:
    """Where the weights at INCEPTION_URL lie once fetched: in torch.hub's cache, under the name they have there."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name)


class InceptionExtractor(FeatureExtractor):
    """The TensorFlow Inception of 2015-12-05, through torch-fidelity: 2048 pooled features, 1008 logits without bias.

    It is named "inception", and so its Fréchet distance "fid", only with the published weights, told by their SHA-256;
    with others of the same shape, "inception_" and the first 8 hex digits of theirs.
    """

    dim = 2048
    classes = 1008
    resize = "bilinear of TensorFlow 1 to 299×299"
    antialias = False
    input_range = "(x - 128) / 128"

    def __init__(
        self, weights: str | None = None, setting: str = "set evaluation.weights=PATH", resize: str = "tensorflow"
    ):
        """`weights`: the file of weights; None for `inception_path()`. Nothing is downloaded.

        resize: how pictures come to 299×299: "tensorflow", as the published FID has it, or "clean" (Parmar et al.
        2022), bicubic with antialiasing; then the name begins with "clean_".

        setting: how messages say that the file is named.

        Raises:
            UserError: no such file, or not these weights.
        """
        super().__init__()
        path = Path(weights).expanduser() if weights else inception_path()
        mend = f"run `medsynth prepare weights CONFIG` on a machine with internet, or {setting}"
        if not path.is_file():
            raise UserError(f"{path}: no such file of Inception weights; {mend}")
        content = path.read_bytes()
        try:
            self.network = _build_inception(content)
        except UserError as error:
            raise UserError(f"{path}: not the weights of Inception 2015-12-05, it {error}; {mend}") from None
        except Exception as error:  # a broken file fails in many ways
            raise UserError(f"{path}: broken, or not the weights of Inception 2015-12-05; {mend}") from error
        digest = hashlib.sha256(content).hexdigest()
        self.clean = resize == "clean"
        self.name = _inception_name(digest, self.clean)
        self.identity = f"inception-{digest}"
        if self.clean:
            self.resize, self.antialias = "bicubic to 299×299, clipped to 0 … 255, not rounded", True
        self.eval()

    def _features(self, images: Tensor) -> Features:
        if not self.clean:
            return Features(*self.network(images))
        x = F.interpolate(images.float(), size=(299, 299), mode="bicubic", antialias=True).clamp(0, 255)
        pool = pooled(self.network, (x - 128) / 128)
        return Features(pool, pool @ self.network.get_parameter("fc.weight").T)


def _inception_name(digest: str, clean: bool) -> str:
    published = inception_path().stem.rpartition("-")[2]  # the start of their SHA-256, as torch.hub names files
    name = "inception" if digest.startswith(published) else f"inception_{digest[:8]}"
    return f"clean_{name}" if clean else name


class _Inception(FeatureExtractorInceptionV3):
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch does it, but what does not fit raises a UserError of a few words that begin with a verb."""
        return super().load_state_dict(_completed(self, state_dict), strict, assign)


def load_checked(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Load weights; what does not fit raises a UserError of a few words that begin with a verb."""
    network.load_state_dict(_completed(network, state))


def _completed(network: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    # How many batches a normalisation has seen is in no picture's features, and in older files not at all.
    counted, due = {}, {}
    for name, value in network.state_dict().items():
        (counted if name.endswith("num_batches_tracked") else due)[name] = value
    given = {name: value for name, value in state.items() if name not in counted}
    _check_weights(given, due)
    return counted | given


def _check_weights(state: dict[str, Any], due: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(due.keys() - state.keys()), sorted(state.keys() - due.keys())
    if missing:
        also = f" and has others, {unexpected[0]} the first" if unexpected else ""
        raise UserError(f"lacks {len(missing)} of {len(due)} weights, {missing[0]} the first{also}")
    if unexpected:
        raise UserError(f"has {len(unexpected)} weights too many, {unexpected[0]} the first")
    for name, value in due.items():
        if (given := torch.as_tensor(state[name])).shape != value.shape:
            raise UserError(f"has {name} of shape {tuple(given.shape)}, not {tuple(value.shape)}")
        if not given.isfinite().all():
            raise UserError(f"has {name} with numbers that are not finite")


def _build_inception(content: bytes) -> nn.Module:
    # torch-fidelity unpickles whatever the file holds: hand it only what a weights-only load has let through.
    state = read_pickled(io.BytesIO(content))
    checked = io.BytesIO()
    torch.save(state, checked)
    checked.seek(0)
    with torch.random.fork_rng(devices=[]):  # the layers draw initial weights that are overwritten
        network = _Inception("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=checked)
    return _fold_normalisations(network).to(memory_format=torch.channels_last)


def _fold_normalisations(network: nn.Module) -> nn.Module:
    """Batch norms as part of the convolutions before them, which in evaluation is the same function of a picture."""
    for block in network.modules():
        if isinstance(block, BasicConv2d):
            # In float64, so that the products are rounded once.
            fused = fuse_conv_bn_eval(block.conv.double(), block.bn.double())
            block.conv = fused.float().requires_grad_(False)
            setattr(block, "bn", nn.Identity())  # noqa: B010  # its type is that of a batch norm
    return network


class RandomConvExtractor(FeatureExtractor):
    """A fixed random convolutional network, for machines without weights: it orders runs, but no paper reports it.

    The picture at 64×64 pixels goes through four 3×3 convolutions of stride 2, half of whose kernels sum to zero and so
    see only edges. Mean and log spread of every channel tell colour and texture, fine to coarse; the quadrants of the
    last map tell layout.
    """

    name = "random"
    resize = "bilinear to 64×64"
    antialias = True
    input_range = "x / 127.5 - 1"
    widths = (16, 32, 64, 64)
    dim = 2 * sum(widths) + 4 * widths[-1]

    def __init__(self, seed: int = 0):
        """`seed` draws the weights, the same on every machine."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        inputs = (3, *self.widths[:-1])
        self.weights = nn.ParameterList(
            _draw_kernels(i, o, generator) for i, o in zip(inputs, self.widths, strict=True)
        )
        self.requires_grad_(False).eval()
        digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in self.weights))
        self.identity = f"random-{digest.hexdigest()}"

    def _features(self, images: Tensor) -> Features:
        x = F.interpolate(images.float() / 127.5 - 1, size=(64, 64), mode="bilinear", antialias=True)
        moments = []
        for weight in self.weights:
            x = F.leaky_relu(F.conv2d(x, weight, stride=2, padding=1), 0.2)
            # The logarithm lets fine texture count beside strong contrast; a flat picture has no spread.
            moments += [x.mean(dim=(2, 3)), (x.std(dim=(2, 3)) + 0.01).log()]
        quadrants = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return Features(torch.cat([*moments, quadrants], dim=1), None)


def _draw_kernels(inputs: int, outputs: int, generator: torch.Generator) -> Tensor:
    # On the CPU in float64: what processors round differently is gone from the float32 weights.
    kernels = torch.empty(outputs, inputs, 3, 3, dtype=torch.float64)
    nn.init.kaiming_uniform_(kernels, a=0.2, generator=generator)
    edges = kernels[: outputs // 2]
    edges -= edges.mean(dim=(2, 3), keepdim=True)
    return kernels.float()


class ClefExtractor(FeatureExtractor):
    """The MEDVQA-GI 2024 organisers' features: probabilities of ImageNet's 1000 classes, see `metrics.clef`.

    Its Fréchet distance is "clef_fid", its score "clef_is". The weights are a file of torchvision's InceptionV3, or of
    another's under its names; the auxiliary classifier is left out.
    """

    name = "clef"
    dim = classes = CLASSES
    resize = "numpy.resize of the flat bytes to 299×299×3"
    antialias = False
    input_range = "x / 127.5 - 1"

    def __init__(self, weights: str | None, setting: str = "set evaluation.weights=PATH"):
        """Raises UserError where there are no such weights."""
        super().__init__()
        if weights is None:
            raise UserError(f"The clef extractor needs a file of InceptionV3's weights for ImageNet: {setting}")
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"{path}: no such file of InceptionV3's weights for ImageNet; {setting}")
        content = path.read_bytes()
        with torch.random.fork_rng(devices=[]):
            self.network = Classifier()
        try:
            state = {k: v for k, v in read_pickled(io.BytesIO(content)).items() if not k.startswith("AuxLogits.")}
            load_checked(self.network, state)
        except UserError as error:
            raise UserError(f"{path}: not the weights of ImageNet's InceptionV3, it {error}; {setting}") from None
        except Exception as error:  # a broken file fails in many ways
            raise UserError(f"{path}: broken, or not the weights of ImageNet's InceptionV3; {setting}") from error
        self.identity = f"clef-{hashlib.sha256(content).hexdigest()}"
        self.eval()

    def class_score(self, total: int) -> Metric:
        return ClefScore(total)

    def _features(self, images: Tensor) -> Features:
        probabilities = self.network(flat_resized(images).float() / 127.5 - 1)
        return Features(probabilities, probabilities)


class TransformersExtractor(FeatureExtractor):
    """Any vision model of transformers in a local folder, named by its kind and the first 8 digits of its digest."""

    def __init__(self, weights: str | None, setting: str = "set evaluation.weights=PATH"):
        """Raises UserError where the folder holds no such model."""
        super().__init__()
        if weights is None:
            raise UserError(f"The transformers extractor needs the folder of a vision model: {setting}")
        folder = Path(weights).expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder of a vision model; {setting}")
        digest = vision.folder_digest(folder)
        self.network, self._processor = vision.load(folder)
        self.name = f"{vision.model_type(folder)}_{digest[:8]}"
        self.identity = f"{vision.model_type(folder)}-{digest}"
        self.resize, self.antialias, self.input_range = vision.described(self._processor)
        self.eval()
        self.dim = self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).pool.shape[1]

    def _features(self, images: Tensor) -> Features:
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"].to(images.device)
        return Features(vision.features(self.network, pixels), None)


EXTRACTORS: dict[str, type[FeatureExtractor]] = {
    "inception": InceptionExtractor,
    "random": RandomConvExtractor,
    "clef": ClefExtractor,
    "transformers": TransformersExtractor,
}
RESIZES = ("tensorflow", "clean")


def build_extractor(
    name: str, weights: str | None = None, setting: str = "set evaluation.weights=PATH", resize: str = "tensorflow"
) -> FeatureExtractor:
    """The extractor of that name, from the file or folder `weights`; None is torch.hub's cache, of "inception" alone.

    setting: how messages say that the file is named. resize: of "inception", one of `RESIZES`.

    Raises:
        UserError: an unknown name, weights for the random extractor, a resize for another than "inception", or weights
            that are missing or do not fit.
    """
    if name not in EXTRACTORS:
        nearest = difflib.get_close_matches(name, EXTRACTORS, n=1, cutoff=0)[0]
        raise UserError(f"There is no feature extractor {name!r}: did you mean {nearest!r}?")
    if name == "inception":
        return InceptionExtractor(weights, setting, resize)
    if resize != "tensorflow":
        raise UserError(f"The {name} extractor has a resize of its own: leave out {resize}")
    if name == "clef":
        return ClefExtractor(weights, setting)
    if name == "transformers":
        return TransformersExtractor(weights, setting)
    if weights is not None:
        raise UserError(
            f"The random extractor takes no weights: leave out {weights}, or choose the inception extractor"
        )
    return RandomConvExtractor()


def planned_name(name: str, weights: str | None, resize: str = "tensorflow") -> str:
    """What `build_extractor` would name the extractor, without building it; raises UserError for a broken folder."""
    if name == "inception":
        path = Path(weights).expanduser() if weights else inception_path()
        digest = sha256_of(path) if path.is_file() else inception_path().stem.rpartition("-")[2]
        return _inception_name(digest, resize == "clean")
    if name == "transformers" and weights is not None:
        folder = Path(weights).expanduser()
        return f"{vision.model_type(folder)}_{vision.folder_digest(folder)[:8]}"
    return name
