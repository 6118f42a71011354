"""DreamBooth's pictures: one folder a class, and for each class further pictures that keep its meaning.

    <root>/<class>/*.png             10 to 20 pictures of the subject, shown as `a photo of sks <class>`
    <class folder>/<class>/*.png     class pictures, shown as `a photo of <class>`: drawn by the untrained model before
                                     training, or anyone's own, put there beforehand

Pictures in `root` itself are one class, called as the folder is. Folders `train`, `validation` and `test`, each with
class folders, are the split. `extra.jsonl` may give a picture a caption or another class (see layouts.py).
"""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePath
from typing import Optional

from torch import Tensor

from datamodules.batches import DRAWN_FILE, Drawing, undrawn
from datamodules.captioned import CaptionedConfig, CaptionedDataModule, Contents, Pair, Progress, TrainingSet
from datamodules.files.layouts import Catalogue, Entry, read_catalogue
from datamodules.files.pictures import Pictures
from datamodules.files.tables import Table, drop_bad_rows
from datamodules.files.walk import PictureFolder, stem
from datamodules.stream import SampleStream, derive_seed
from medsynth.errors import UserError
from medsynth.ranges import number

_PRIOR = "class pictures:"  # in a picture's name: it lies in the class folder, not in root


@dataclass
class DreamBoothConfig(CaptionedConfig):
    """Which pictures of which classes are learned, under which words."""

    name: str = "dreambooth"
    """This data set's name."""
    token: str = "sks"
    """The rare word that stands for the subject; best one that the tokenizer knows as one piece."""
    tokens: dict[str, str] = field(default_factory=dict)
    """Rare words of single classes, by class, in `token`'s place."""
    instance_prompt: str = "a photo of {token} {label}"
    """Prompt of the pictures in root. {label} is the class; {text} the picture's caption, where there is one, else the
    class."""
    class_prompt: str = "a photo of {label}"
    """Prompt of the class pictures."""
    class_pictures: int = number(200, least=0)
    """Class pictures of each class; 0 learns without a prior."""
    class_folder: Optional[str] = None
    """Folder of the class pictures, which runs may share; none: ROOT-class, beside root. What is missing is drawn; a
    class whose folder holds pictures of your own uses those."""
    validation_images: int = number(0, least=0)
    """Pictures of each class that are held out for validation, drawn by seed; a folder `validation` takes their place.
    0 trains on all, and validates on the same, unvaried: the loss then says how well they are known by heart."""
    prompt_dropout: float = 0.0


class DreamBoothData(CaptionedDataModule[DreamBoothConfig]):
    """Pictures of the subject and, as every other sample, class pictures.

    Of the counts that `check` gives, "pictures" are those of the subject. A pass shows each of those that train once,
    and as many class pictures. Validation sees class pictures too, so that its loss is the one of training.
    """

    Config = DreamBoothConfig

    def __init__(self, config: DreamBoothConfig, seed: int = 0, batch_size: int = 1, accumulate: int = 1):
        super().__init__(config, seed, batch_size, accumulate)
        root = self._root.absolute()
        folder = Path(config.class_folder).expanduser() if config.class_folder else root.with_name(f"{root.name}-class")
        if folder.resolve().is_relative_to(root.resolve()):
            raise UserError(f"data.class_folder: {folder} lies in data.root, whose folders are classes")
        self._class_folder = folder.absolute()
        self._labels: list[str] = []
        self._drawings: list[Drawing] = []
        self._missing: list[Drawing] = []

    def check(self, on_progress: Progress | None = None) -> dict[str, int]:
        """Look at every picture once; and once more when the last class picture has been drawn."""
        if self._missing and not undrawn(self._missing):
            self._found = self._fingerprint = None
        return super().check(on_progress)

    def to_draw(self) -> list[Drawing]:
        self.check()
        return list(self._drawings)

    def rare_words(self) -> list[str]:
        self.check()
        return sorted({self._token(label) for label in self._labels})

    def training_set(self) -> "DreamBoothTrainingSet":
        return DreamBoothTrainingSet(self._contents.train, self._contents.pictures, self.config, self.seed)

    def _read(self, on_progress: Progress | None) -> Contents:
        catalogue = _read_classes(self._root.absolute())
        pictures = SubjectPictures(self._root, self._class_folder, self.config)
        self.reject_faults(catalogue.splits.values(), pictures, on_progress)
        groups = self.groups(catalogue.splits.values(), lambda entry: (entry.name, entry.columns()))
        skipped = drop_bad_rows(list(catalogue.splits.values()), self.config.on_bad)
        splits = {split: list(table.rows.values()) for split, table in catalogue.splits.items()}
        self._labels = sorted({entry.label for entries in splits.values() for entry in entries})
        self._check_words()

        train, val = self._divide(splits, groups)
        prior = self._prior()
        self._check_drawn(prior, pictures, on_progress)
        summary = {
            "classes": len(self._labels),
            "pictures": sum(map(len, splits.values())),
            "train pictures": len(train),
            "validation pictures": len(val),
            "test pictures": len(splits.get("test", [])),
            "class pictures": len(prior) - len(self._missing),
            "class pictures to draw": len(self._missing),
            "skipped samples": skipped,
        }
        asked = [pair.prompt for pair in train + val]
        val = val or train
        return Contents(
            train + prior, val + _spread(prior, len(val)), pictures, summary, asked,
            test=sorted(entry.name for entry in splits.get("test", [])), groups=groups, notes=catalogue.notes(),
        )  # fmt: skip

    def _check_words(self) -> None:
        """Refuse tokens of unknown classes, classes that can have no folder, and prompts that say the same."""
        if strange := sorted(set(self.config.tokens) - set(self._labels)):
            raise UserError(f"data.tokens: there is no class {strange[0]}; there are {', '.join(self._labels)}")
        for label in self._labels:
            if label in ("", ".", "..") or PurePath(label).name != label:
                raise UserError(f"data.root: {label!r} is no name of a class: it must be one that a folder can have")
            prompt = self._instance_prompt(label, label)
            if self.config.class_pictures and prompt == self._class_prompt(label):
                raise UserError(f"data.instance_prompt and data.class_prompt both say {prompt!r}: they must differ")

    def _divide(self, splits: dict[str, list[Entry]], groups: dict[str, str] | None) -> tuple[list[Pair], list[Pair]]:
        """Pairs that train and that validate, of each class by itself but for groups that several classes have."""
        by_class: dict[str, list[Pair]] = {}
        for entry in splits.get("", splits.get("train", [])):
            by_class.setdefault(entry.label, []).append(self._pair(entry))
        if "validation" in splits:
            return [*chain(*by_class.values())], [self._pair(entry) for entry in splits["validation"]]
        decided: dict[str, bool] = {}
        train, val = zip(*(self.split(pairs, groups, decided) for pairs in by_class.values()), strict=True)
        return [*chain(*train)], [*chain(*val)]

    def _pair(self, entry: Entry) -> Pair:
        return Pair(entry.name, self._instance_prompt(entry.label, entry.text))

    def _prior(self) -> list[Pair]:
        """The class pictures of all classes, there or not; remembers those that the model is to draw."""
        self._drawings = []
        if not self.config.class_pictures:
            return []
        return [pair for label in self._labels for pair in self._class_pairs(label)]

    def _class_pairs(self, label: str) -> list[Pair]:
        folder, wanted, prompt = self._class_folder / label, self.config.class_pictures, self._class_prompt(label)
        names = PictureFolder(folder).names()
        if not names or (folder / DRAWN_FILE).is_file():
            # The seed is the prompt's, not the run's: runs share the pictures, and more are added to those there are.
            names = [f"{i:05d}.png" for i in range(wanted)]
            seeds = [derive_seed("class picture", prompt, i) for i in range(wanted)]
            self._drawings += [Drawing(folder / name, prompt, seed) for name, seed in zip(names, seeds, strict=True)]
        elif len(names) < wanted:
            raise UserError(
                f"data.class_pictures={wanted}: {folder} has only {len(names)} pictures of your own; add some, or "
                "remove it to have all drawn"
            )
        return [Pair(f"{_PRIOR}{label}/{name}", prompt, is_prior=True) for name in names[:wanted]]

    def _check_drawn(self, prior: list[Pair], pictures: "SubjectPictures", on_progress: Progress | None) -> None:
        """See which class pictures are missing, and that the others are sound."""
        self._missing = undrawn(self._drawings)
        missing = {drawing.path for drawing in self._missing}
        names = [pair.picture for pair in prior if pictures.path(pair.picture) not in missing]
        faults = self.faults(pictures, names, on_progress)
        if faults:
            table = Table(str(self._class_folder), faults=faults, noun="class picture")
            raise UserError(table.report("remove them: what is missing is drawn"))

    def _token(self, label: str) -> str:
        return self.config.tokens.get(label, self.config.token)

    def _instance_prompt(self, label: str, text: str) -> str:
        return _filled("instance_prompt", self.config.instance_prompt, token=self._token(label), label=label, text=text)

    def _class_prompt(self, label: str) -> str:
        return _filled("class_prompt", self.config.class_prompt, label=label)


class SubjectPictures(Pictures):
    """Pictures below root, and class pictures below another folder."""

    def __init__(self, root: Path, class_folder: Path, config: DreamBoothConfig):
        super().__init__(root, config)
        self._class_folder = class_folder

    def path(self, name: str) -> Path:
        if name.startswith(_PRIOR):
            return self._class_folder / name.removeprefix(_PRIOR)
        return self.folder / name

    def open_picture(self, name: str, least_side: int = 0) -> Tensor:
        return super().open_picture(str(self.path(name).absolute()), least_side)

    def check_picture(self, name: str) -> None:
        super().check_picture(str(self.path(name).absolute()))

    def sizes(self, name: str) -> list[int]:
        return super().sizes(name) if self.path(name).is_file() else []


class AlternatingStream:
    """Subject, class, subject, class …: stream position -> (pass, index), each kind in an endless order of its own.

    Every batch of even size is half and half, wherever it begins. Class pictures have the indices after the subject's.
    A pass is one over the subject's pictures.
    """

    def __init__(self, subject: int, prior: int, seed: int):
        """subject, prior: how many pictures of each kind there are."""
        self.length = 2 * subject
        self._subject = SampleStream(subject, seed)
        self._prior = SampleStream(prior, derive_seed(seed, "class pictures"))

    def __call__(self, position: int) -> tuple[int, int]:
        turn, is_prior = divmod(position, 2)
        if not is_prior:
            return self._subject(turn)
        pass_, index = self._prior(turn)
        return pass_, self._subject.length + index


class DreamBoothTrainingSet(TrainingSet[DreamBoothConfig]):
    """Pictures of the subject, then class pictures; where there are such the stream takes them in turn."""

    def __init__(self, pairs: list[Pair], pictures: Pictures, config: DreamBoothConfig, seed: int):
        super().__init__(pairs, pictures, config, seed)
        prior = sum(pair.is_prior for pair in pairs)
        if prior:
            self.stream = AlternatingStream(len(pairs) - prior, prior, seed)


def _read_classes(root: Path) -> Catalogue:
    flat = PictureFolder(root)
    names = flat.names()
    if not names or any("/" in name for name in names):
        return read_catalogue(root, "folders", texts=False, given=False)
    rows = {name: Entry(name, stem(name), root.name, root.name) for name in names}
    return Catalogue(root, "folders", {"": Table(root.name, rows, noun="sample")}, unread=flat.others)


def _filled(key: str, template: str, **words: str) -> str:
    try:
        return template.format_map(words)
    except (KeyError, ValueError, IndexError, TypeError, AttributeError):
        names = ", ".join(f"{{{word}}}" for word in words)
        raise UserError(f"data.{key}={template!r} is no template of {names}") from None


def _spread(pairs: list[Pair], count: int) -> list[Pair]:
    """`count` of the pairs at equal distances, some more than once where there are not so many."""
    return [pairs[i * len(pairs) // count] for i in range(count)] if pairs else []
