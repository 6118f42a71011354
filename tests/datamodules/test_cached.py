"""Cached latents and text: the same training without encoders, from any number of processes, or a plain refusal."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from datamodules.base import ImageDataModule
from datamodules.batches import Conditions, collate, undrawn
from datamodules.cached import CachedLatents
from datamodules.files.latents import Cache, CacheWriter, cut
from datamodules.stream import derive_seed
from jobs.encode import encode
from jobs.run.config import load_config
from jobs.run.folder import build_data, build_module, build_source, load_run, use_cache
from jobs.run.registry import DATA, data_class, method_class
from jobs.train import train
from lightning_modules.families.latent_diffusion import LatentDiffusion
from lightning_modules.maths.diffusion import SampleRandom
from medsynth.errors import UserError
from tests.class_folders import write_classes
from tests.conftest import REPOSITORY
from tests.processes import begin, together
from tests.sd_folder import write_pipeline

# Every method with latents, by its tiny config.
LATENT = sorted(
    path.stem for path in (REPOSITORY / "configs/tiny").glob("*.yaml")
    if issubclass(method_class(OmegaConf.load(path).method), LatentDiffusion)
)  # fmt: skip
METHODS = pytest.mark.parametrize("method", ["stable_diffusion", "msdm"])
ROWS = 100  # of a shard: 311 training samples make four
QUIET = ["evaluation.images=0", "evaluation.grid=0", "checkpoint.monitor=val/loss"]


def tiny(method: str, root, *settings: str):
    """root: a data set, or data sets by their names."""
    path = REPOSITORY / f"configs/tiny/{method}.yaml"
    root = root[OmegaConf.load(path).data.name] if isinstance(root, dict) else root
    return load_config([path], [f"data.root={root}", *settings])


def built(config, cached: bool):
    """The module as training builds it. Zero-initialised layers are filled: they would hide all that is before them."""
    torch.manual_seed(0)
    module = build_module(config)
    if cached:
        use_cache(config, module)
    module.configure_model()
    torch.manual_seed(0)  # the encoders may have drawn more or fewer numbers than their absence
    for network in module.trainable_modules().values():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return module.eval()


@pytest.fixture(scope="module")
def caches(tmp_path_factory, phantom) -> dict[str, Path]:
    """A cache of two variants for each method."""
    folder = tmp_path_factory.mktemp("caches")
    for method in ("stable_diffusion", "msdm"):
        encode(tiny(method, phantom), folder / method, variants=2, batch_size=16, shard_rows=ROWS)
    return {method: folder / method for method in ("stable_diffusion", "msdm")}


@pytest.fixture
def copy(caches, here) -> Path:
    """A cache of stable_diffusion to be harmed."""
    return Path(shutil.copytree(caches["stable_diffusion"], here / "latents"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard_file(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"{name}-*.safetensors")
    return path


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Mean over all weights; a step of training moves most by 1e-4. Single ones follow the sign of a tiny gradient."""
    return torch.cat([(value - b[key]).abs().flatten() for key, value in a.items()]).mean().item()


# training


@pytest.mark.parametrize("name", LATENT)
def test_the_loss_is_the_uncached_one_on_the_same_noise(name, phantoms, tmp_path):
    """Of every method, on its own data set; control, class pictures and all."""
    config = tiny(name, phantoms)
    encode(config, tmp_path / "latents", variants=2, batch_size=16, shard_rows=ROWS)
    cached = tiny(name, phantoms, f"data.latents={tmp_path}/latents")
    plain, quick = built(config, cached=False), built(cached, cached=True)
    source, data = build_source(config)[0].training_set(), build_data(cached, quick)[0].training_set()
    length = source.stream.length
    for first in (0, length // 2, length - 1, length + 7, 2 * length + 3, 5 * length - 2):
        positions = range(first, first + 4)
        batch = collate([data[p] for p in positions])
        assert batch.images is None
        expected = []
        for position in positions:  # beyond the second pass the first two are shown again, with other noise
            pass_, index = source.stream(position)
            expected.append(source.sample(pass_ % 2, index).row(derive_seed(config.seed, "noise", position)))
        expected = collate(expected)
        for field in ("captions", "labels", "control"):
            same(getattr(batch.conditions, field), getattr(expected.conditions, field))
        same(batch.seeds, expected.seeds)
        same(batch.is_prior, expected.is_prior)
        assert quick.losses(batch)["loss"].item() == pytest.approx(plain.losses(expected)["loss"].item(), abs=1e-5)


def same(a, b) -> None:
    assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@METHODS
def test_the_validation_loss_is_the_uncached_one(method, phantom, caches):
    config = tiny(method, phantom)
    cached = tiny(method, phantom, f"data.latents={caches[method]}")
    plain, quick = built(config, cached=False), built(cached, cached=True)
    a, b = build_source(config)[0].validation_set(), build_data(cached, quick)[0].validation_set()
    rows = [0, len(a) - 1, -1]
    a, b = (collate([rows_[i] for i in rows]) for rows_, rows in ((a, rows), (b, rows)))
    assert torch.equal(a.seeds, b.seeds)
    assert quick.losses(b)["loss"].item() == pytest.approx(plain.losses(a)["loss"].item(), abs=1e-5)


def test_the_posterior_is_sampled_anew_each_pass(phantom, caches):
    config = tiny("stable_diffusion", phantom, f"data.latents={caches['stable_diffusion']}")
    module = built(config, cached=True)
    training = build_data(config, module)[0].training_set()
    _, index = training.stream(0)
    later = next(p for p in range(2 * len(training), 3 * len(training)) if training.stream(p)[1] == index)
    first, again = training[0], training[later]
    assert torch.equal(first.latents, again.latents)
    z_0, other = (module.latents(row, SampleRandom(row.seeds)) for row in (first, again))
    assert not torch.allclose(z_0, other)


@METHODS
def test_no_encoder_is_held_and_pictures_are_the_uncached_ones(method, phantom, caches):
    cached = tiny(method, phantom, f"data.latents={caches[method]}")
    plain, quick = built(tiny(method, phantom), cached=False), built(cached, cached=True)
    first_stage, posterior = {"msdm": ("codec.net", "to_moments"), "stable_diffusion": ("vae", "quant_conv")}[method]
    gone = ("text_encoder.", f"{first_stage}.encoder.", f"{first_stage}.{posterior}.")
    held, before = ({name for name, _ in module.named_parameters()} for module in (quick, plain))
    assert before - held == {name for name in before if name.startswith(gone)}
    assert all(any(name.startswith(prefix) for name in before) for prefix in gone)
    conditions = build_data(cached, quick)[0].evaluation_conditions(3)
    torch.testing.assert_close(quick.sample(conditions, [1, 2, 3]), plain.sample(conditions, [1, 2, 3]))
    with pytest.raises(UserError, match="no text of the caption 'a cat'.*medsynth sample"):
        quick.sample(Conditions(captions=["a cat"]), [1])


@METHODS
def test_a_cached_run_ends_where_the_uncached_one_does(method, phantom, caches, here):
    """Weights and export; and its module for sampling has the encoders again."""
    train(tiny(method, phantom, "run_dir=plain", *QUIET))
    train(tiny(method, phantom, f"data.latents={caches[method]}", "run_dir=quick", *QUIET))
    a, b = (load_file(here / run / "checkpoints/last.ckpt/weights.safetensors") for run in ("plain", "quick"))
    assert distance(a, b) < 1e-7
    exported = {path.relative_to(here / "plain") for path in (here / "plain/export").rglob("*") if path.is_file()}
    assert exported == {
        path.relative_to(here / "quick") for path in (here / "quick/export").rglob("*") if path.is_file()
    }
    for file in exported:
        if file.parts[1] in ("vae", "text_encoder", "tokenizer"):
            assert (here / "plain" / file).read_bytes() == (here / "quick" / file).read_bytes(), file
    module, _ = load_run(here / "quick", "last")
    assert module.sample(Conditions(captions=["a cat"]), [1]).shape == (1, 3, 32, 32)


def test_a_resumed_cached_run_equals_the_undisturbed_one_and_cache_or_not_may_change(phantom, caches, here):
    latents = f"data.latents={caches['stable_diffusion']}"
    settings = ["train.max_steps=4", "train.validate_every_steps=2", *QUIET]

    def run(name: str, *own: str):
        train(tiny("stable_diffusion", phantom, f"run_dir={name}", *settings, *own))
        return load_file(here / name / "checkpoints/last.ckpt/weights.safetensors")

    whole = run("whole", latents)
    run("halves", latents, "train.max_steps=2")
    halves = run("halves", latents)
    run("mixed", "train.max_steps=2")
    mixed = run("mixed", latents)
    for key, value in whole.items():
        assert torch.equal(value, halves[key]), key
    assert distance(whole, mixed) < 1e-7


def test_workers_read_the_same_rows(phantom, caches):
    config = tiny("stable_diffusion", phantom, f"data.latents={caches['stable_diffusion']}", "data.workers=2")
    data, _ = build_data(config, build_module(config))
    training = data.training_set()
    expected = collate([training[i] for i in range(4)])  # opens shards in this process before the workers start
    for batch in (
        next(iter(data.train_dataloader())),
        collate([pickle.loads(pickle.dumps(training))[i] for i in range(4)]),
    ):
        for field in ("latents", "text_embeddings", "text_mask", "seeds"):
            assert torch.equal(getattr(batch, field), getattr(expected, field)), field


def test_class_pictures_are_drawn_before_they_are_encoded(tmp_path):
    """The cache then holds them, and an encoding that is repeated draws and writes nothing."""
    root = write_classes(tmp_path / "hips")
    config = load_config([REPOSITORY / "configs/tiny/dreambooth.yaml"], [f"data.root={root}"])
    missing = build_source(config)[0].to_draw()
    assert undrawn(missing)
    encode(config, tmp_path / "latents")
    assert not undrawn(missing)
    files = [drawing.path for drawing in missing] + list((tmp_path / "latents").glob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in files]
    encode(config, tmp_path / "latents")
    assert [path.stat().st_mtime_ns for path in files] == before
    missing[0].path.unlink()
    config.data.latents = str(tmp_path / "latents")
    with pytest.raises(UserError, match="pictures or prompts have changed"):
        build_data(config, build_module(config))


def test_a_learning_text_encoder_stays_and_reads_captions(phantom, here):
    config = tiny("stable_diffusion", phantom, "model.train_text_encoder=true")
    encode(config, here / "latents")
    assert not list((here / "latents").glob("text-*"))
    config.data.latents = "latents"
    module = built(config, cached=True)
    row = build_data(config, module)[0].training_set()[0]
    assert row.text_embeddings is None
    assert module.losses(row)["loss"].isfinite()
    with pytest.raises(UserError, match="stale: the text encoder has changed"):  # a frozen one needs text
        build_data(
            tiny("stable_diffusion", phantom, "data.latents=latents"), build_module(tiny("stable_diffusion", phantom))
        )


def test_text_in_the_cache_does_not_bind_a_text_encoder_that_learns(phantom, caches):
    latents = f"data.latents={caches['stable_diffusion']}"
    config = tiny("stable_diffusion", phantom, latents, "model.train_text_encoder=true")
    module = built(config, cached=True)
    assert build_data(config, module)[0].training_set()[0].text_embeddings is None


@pytest.mark.parametrize("name", DATA)
def test_what_a_data_set_can_say_a_cached_one_says_too(name):
    """Every public method that a data set fills in must reach it through the cache."""
    own = {
        key for base in data_class(name).__mro__ for key in vars(base)
        if base is not ImageDataModule and issubclass(base, ImageDataModule) and callable(getattr(base, key))
    }  # fmt: skip
    said = {key for key in own & set(vars(ImageDataModule)) if not key.startswith("_")}
    assert said
    assert said <= set(vars(CachedLatents)), said - set(vars(CachedLatents))


# encoding


def test_pictures_that_look_the_same_are_encoded_once(phantom, tmp_path):
    plain = ["data.brightness=0", "data.contrast=0", "data.saturation=0", "data.flips=false"]
    config = tiny("stable_diffusion", phantom, *plain)
    encode(config, tmp_path / "latents", shard_rows=10_000)
    data, _ = build_source(config)
    for name, rows in (("variant-00-000000", data.training_set()), ("validation-000000", data.validation_set())):
        shard = load_file(shard_file(tmp_path / "latents", name))
        names = [pair.picture for pair in rows.pairs]
        assert len(shard["row"]) == len(names)
        assert len(shard["moments"]) == len(set(names)) < len(names)
        assert len({(int(row), picture) for row, picture in zip(shard["row"], names, strict=True)}) == len(set(names))


def test_an_interrupted_encoding_by_two_processes_is_finished_by_one(phantom, caches, tmp_path):
    """Killed at its first shard; then the bytes are those that one undisturbed process wrote."""
    out = tmp_path / "latents"
    config = load_config([REPOSITORY / "configs/tiny/stable_diffusion.yaml"], [f"data.root={phantom}", *PAIR])
    how = {"variants": 2, "batch_size": 16, "shard_rows": ROWS}
    processes = begin(2, lambda _: encode(config, out, **how), log=tmp_path / "log")
    deadline = time.monotonic() + 240
    while not list(out.glob("*.safetensors")) and all(process.is_alive() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    (out / ".variant-01-000000").write_bytes(b"half a shard")
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert kept
    encode(tiny("stable_diffusion", phantom), out, variants=2, batch_size=16, shard_rows=ROWS)
    assert contents(out) == contents(caches["stable_diffusion"])
    assert all((out / name).stat().st_mtime_ns == written for name, written in kept.items())


def test_two_processes_write_the_bytes_of_one(phantom, caches, tmp_path):
    process = launch(phantom, tmp_path / "latents")
    assert process.wait(timeout=300) == 0, process.stderr.read()
    assert contents(tmp_path / "latents") == contents(caches["stable_diffusion"])


PAIR = [
    "hardware.devices=2", "hardware.strategy=ddp", "hardware.accelerator=cpu", "train.device_batch_size=2",
]  # fmt: skip


def launch(phantom, out: Path) -> subprocess.Popen:
    """`medsynth encode` on two processes, the second started by the first, in a process group of their own."""
    arguments = [REPOSITORY / "configs/tiny/stable_diffusion.yaml", f"data.root={phantom}", "--out", out]
    arguments += ["--variants", 2, "--batch-size", 16, "--shard-rows", ROWS, *PAIR]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.encode", *map(str, arguments)], cwd=out.parent, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_more_variants_are_added_to_those_there_are(phantom, caches, copy):
    before = contents(copy)
    encode(tiny("stable_diffusion", phantom), copy, variants=3, batch_size=16, shard_rows=ROWS)
    after = contents(copy)
    assert Cache(copy).variants == 3
    assert all(after[name] == content for name, content in before.items() if name != "manifest.json")
    assert sum(name.startswith("variant-02") for name in after) == 4


def test_another_cache_is_neither_overwritten_nor_taken_over(phantom, copy):
    before = contents(copy)
    other = tiny("stable_diffusion", phantom, "data.saturation=0.1")
    with pytest.raises(
        UserError, match=r"another cache: data.saturation was 0.4 and is 0.1; encode into another folder"
    ):
        encode(other, copy, variants=2, shard_rows=ROWS)
    with pytest.raises(UserError, match=r"another cache: shard_rows was 100 and is 64"):
        encode(tiny("stable_diffusion", phantom), copy, variants=2, shard_rows=64)
    assert contents(copy) == before
    for name in ("plan.json", "manifest.json"):
        (copy / name).unlink()
    encode(other, copy, variants=2, batch_size=16, shard_rows=ROWS)
    kept = {name for name, content in contents(copy).items() if before.get(name) == content}
    assert not kept, "shards of other pictures were kept, though nothing said of what they were"


def test_a_method_that_learns_from_pictures_has_no_latents(phantom, tmp_path):
    with pytest.raises(UserError, match="method=msdm_vae learns from pictures"):
        encode(tiny("msdm_vae", phantom), tmp_path / "latents")


def test_a_machine_that_is_not_there_is_named(phantom, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="hardware.accelerator=gpu: torch finds none here"):
        encode(tiny("stable_diffusion", phantom, "hardware.accelerator=gpu"), tmp_path / "latents")


def test_a_folder_that_cannot_be_written_is_named(phantom, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out=.*file/latents cannot be written"):
        encode(tiny("stable_diffusion", phantom), tmp_path / "file/latents")


# what is refused


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("data.brightness=0.1", "data.brightness was 0.4 and is 0.1"),
        ("data.square=pad", "data.square was crop and is pad"),
        ("data.resolution=16", "data.resolution was 32 and is 16"),
        ("data.validation_images=7", "data.validation_images was 8 and is 7"),
        ("seed=5", "seed was 0 and is 5"),
        ("model.architecture.vae_layers=2", "the picture encoder has changed"),
        ("model.prompt_chunks=2", "the text encoder has changed"),
    ],
)
def test_a_stale_cache_is_refused_with_the_reason(setting, reason, phantom, caches, here):
    latents = f"data.latents={caches['stable_diffusion']}"
    with pytest.raises(UserError, match=f"is stale: {reason}; encode into another folder") as refused:
        train(tiny("stable_diffusion", phantom, latents, setting, "run_dir=run"))
    assert "\n" not in str(refused.value)
    assert not (here / "run").exists()


@pytest.mark.parametrize(("part", "reason"), [("vae", "the picture encoder"), ("text_encoder", "the text encoder")])
def test_other_weights_make_a_cache_stale(part, reason, phantom, tmp_path):
    folder = write_pipeline(tmp_path / "sd")
    config = tiny("stable_diffusion", phantom, f"model.pretrained={folder}")
    encode(config, tmp_path / "latents")
    config.data.latents = str(tmp_path / "latents")
    build_data(config, build_module(config))
    (weights,) = (folder / part).glob("*.safetensors")
    damage(weights)
    with pytest.raises(UserError, match=f"is stale: {reason} has changed"):
        build_data(config, build_module(config))


def test_other_pictures_or_prompts_make_a_cache_stale(phantom, caches, tmp_path):
    latents = f"data.latents={caches['stable_diffusion']}"
    for name, content in (("prompt-gt.csv", b"\n"), ("images", b"\0")):
        root = Path(shutil.copytree(phantom, tmp_path / name))
        file = root / name if name.endswith("csv") else next((root / name).iterdir())
        text = file.read_bytes()
        file.write_bytes(text.replace(b"polyp", b"lesion") if name.endswith("csv") else text + content)
        config = tiny("stable_diffusion", root, latents)
        with pytest.raises(UserError, match="is stale: pictures or prompts have changed"):
            build_data(config, build_module(config))


def damage(path: Path, place: int = -20) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


HARM = {
    "a shard is missing": (
        lambda folder: shard_file(folder, "variant-01-000002").unlink(),
        "variant-01-000002.* is missing",
    ),
    "a shard is cut off": (
        lambda folder: os.truncate(shard_file(folder, "validation-000000"), 1000),
        "validation-000000.* has 1000 bytes, and [0-9]+ were written",
    ),
    "a bit of the latents": (
        lambda folder: damage(shard_file(folder, "variant-00-000003")),
        r"variant-00-000003.* is not what was written \(its SHA-256 differs\)",
    ),
    "a bit of the text's values": (
        lambda folder: damage(shard_file(folder, "text-000000")),
        r"text-000000.* is not what was written \(its SHA-256 differs\)",
    ),
    "a bit of the text's header": (
        lambda folder: damage(shard_file(folder, "text-000000"), 9),
        "a shard of the text cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_cache_is_refused_before_the_first_step_and_mended_by_encoding_again(
    harm, phantom, caches, copy, here
):
    damaging, said = HARM[harm]
    damaging(copy)
    config = tiny("stable_diffusion", phantom, "data.latents=latents", "run_dir=run")
    with pytest.raises(UserError, match=f"latents is damaged: {said}.*--variants 2` makes only that anew") as refused:
        train(config)
    assert "\n" not in str(refused.value)
    assert not (here / "run/checkpoints").exists()
    before = {path.name: path.stat().st_mtime_ns for path in copy.glob("*.safetensors")}
    encode(tiny("stable_diffusion", phantom), copy, variants=2, batch_size=16, shard_rows=ROWS)
    assert contents(copy) == contents(caches["stable_diffusion"])
    written = [path.name for path in copy.glob("*.safetensors") if before.get(path.name) != path.stat().st_mtime_ns]
    assert len(written) == 1


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: os.truncate(path, 50), damage])
def test_without_its_manifest_a_cache_is_not_finished(harm, phantom, copy):
    harm(copy / "manifest.json")
    with pytest.raises(
        UserError, match=r"data.latents: latents holds (no finished latents|a damaged manifest); run `medsynth"
    ):
        train(tiny("stable_diffusion", phantom, "data.latents=latents"))


def verified_by(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=2)
    try:
        Cache(folder).verify(rank, 2)
    except UserError as error:
        os.write(1, str(error).encode())
    torch.distributed.destroy_process_group()


def test_every_process_hears_of_damage_that_one_has_found(copy, tmp_path):
    damage(shard_file(copy, "variant-00-000001"))
    first, second = (said.splitlines()[-1] for said in together(2, verified_by, copy, log=tmp_path / "log"))
    assert first == second
    assert "variant-00-000001" in first


# the format


def test_the_files_are_what_the_docs_say(caches, phantom):
    folder = caches["msdm"]
    manifest = json.loads((folder / "manifest.json").read_text())
    data, _ = build_source(tiny("msdm", phantom))
    assert manifest["rows"] == {
        "variant-00": len(data.training_set()),
        "variant-01": len(data.training_set()),
        "validation": len(data.validation_set()),
        "text": len(data.all_captions()),
    }
    assert {entry["file"] for entry in manifest["shards"].values()} == {p.name for p in folder.glob("*.safetensors")}
    with safe_open(shard_file(folder, "text-000000"), "pt") as shard:
        assert json.loads(shard.metadata()["medsynth"])["captions"] == data.all_captions()
        assert shard.get_tensor("embeddings").shape == (len(data.all_captions()), 48, 32)
        assert shard.get_tensor("mask").dtype == torch.bool
    shard = load_file(shard_file(folder, "variant-01-000003"))
    assert shard["row"].shape == (len(data.training_set()) % ROWS,)
    assert shard["moments"].shape[1:] == (8, 8, 8)
    assert shard["moments"].dtype == torch.float32


def test_a_shard_is_either_whole_or_not_there(tmp_path, monkeypatch):
    """A full disk: what was written so far has no name that anyone reads."""
    writer = CacheWriter(tmp_path / "cache", {"shard_rows": 2})
    (shard,) = cut("text", 2, 2)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device"):
        patch.setattr(os, "fsync", full)
        writer.write(shard, {"mask": torch.ones(2, 3)})
    assert not writer.keeps(shard)
    writer.write(shard, {"mask": torch.ones(2, 3)})
    assert writer.keeps(shard)
    assert writer.finished_rows([shard]) == 2
