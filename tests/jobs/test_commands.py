"""The commands, as a user calls them: what they make, what they say, and how they refuse."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from jobs import cli
from jobs.run.config import load_config
from jobs.run.folder import refuse_another_run, write_config
from jobs.train import train
from medsynth.errors import UserError
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "configs/tiny/msdm.yaml"


def medsynth(*arguments: str) -> str:
    """What a command prints; raises what it raises."""
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory, phantom):
    """A finished tiny run of msdm, and the folder it was trained in."""
    folder = tmp_path_factory.mktemp("work")
    settings = [f"data.root={phantom}", f"run_dir={folder}/run", f"tracking.uri=sqlite:///{folder}/mlruns.db"]
    train(load_config([TINY], [*settings, f"evaluation.cache={folder}/cache"]))
    return folder / "run"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("Prompt\nGenerate an image with 1 polyp.\nGenerate an image containing text.\n" * 1)
    return path


# train


def test_a_run_leaves_what_the_docs_say(run, phantom):
    assert (run / "config.yaml").is_file()
    split = json.loads((run / "split.json").read_text())
    assert len(split["val"]) == 8
    assert not set(split["train"]) & set(split["val"])
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "export/unet", "grids"):
        assert (run / name).is_dir(), name


def test_a_run_is_in_mlflow_with_all_that_was_asked(run):
    from jobs.tracking.server import logged_images, mlflow_client
    from jobs.tracking.spool import read_run_id

    client = mlflow_client(f"sqlite:///{run.parent}/mlruns.db")
    record = client.get_run(read_run_id(run))
    assert record.info.status == "FINISHED"
    assert record.data.params["model.optim.lr"] == "0.0001"
    tags = record.data.tags
    for key in ("method", "paper", "data.fingerprint", "git.commit", "parameters.trained", "checkpoint.best"):
        assert tags[key], key
    metrics = record.data.metrics
    for key in ("train/loss", "val/loss", "eval/fd_random", "eval/precision_random", "throughput/images_per_second"):
        assert key in metrics, key
    assert not any(key.startswith("eval/fid") for key in metrics), "fid is only what Inception gives"
    assert "config.yaml" in [item.path for item in client.list_artifacts(record.info.run_id)]
    assert [image.step for image in logged_images(client, record.info.run_id)] == [2]


def test_a_run_that_fails_to_export_is_not_finished(run, here):
    (here / "again").mkdir()
    (here / "again/export").write_text("in the way")
    with pytest.raises(UserError, match="again/export cannot be written: Not a directory"):
        train(load_config([run / "config.yaml"], ["run_dir=again", f"tracking.uri=sqlite:///{here}/again.db"]))
    from jobs.tracking.server import mlflow_client
    from jobs.tracking.spool import read_run_id

    client = mlflow_client(f"sqlite:///{here}/again.db")
    assert client.get_run(read_run_id(here / "again")).info.status == "FAILED"


def test_statistics_of_the_real_pictures_are_computed_once(run, phantom):
    (kept,) = (run.parent / "cache").iterdir()
    before = kept.stat().st_mtime_ns
    again = load_config([run / "config.yaml"], [f"run_dir={run.parent}/again", "train.max_steps=1"])
    again.train.validate_every_steps = 1
    trainer = train(again)
    assert kept.stat().st_mtime_ns == before
    assert float(trainer.callback_metrics["eval/fd_random"]) > 0
    other = load_config([run / "config.yaml"], [f"run_dir={run.parent}/smaller"])
    other.data.resolution = other.model.resolution = 16
    train(other)
    assert len(list(kept.parent.iterdir())) == 2, "another resolution, another key"


def test_another_model_in_the_same_run_directory_is_refused_but_not_other_steps(run, here):
    with pytest.raises(UserError, match="another `model`"):
        train(load_config([run / "config.yaml"], ["model.unet.time_dim=64"]))
    shutil.copytree(run, here / "run")
    other_rate = load_config([run / "config.yaml"], ["model.optim.lr=5e-4", f"run_dir={here}/run"])
    refuse_another_run(other_rate)
    write_config(other_rate)
    assert load_config([here / "run/config.yaml"]).model.optim.lr == 5e-4


def test_print_and_keys_start_nothing(here):
    printed = medsynth("train", TINY, "train.max_steps=9", "--print")
    assert "max_steps: 9" in printed
    listed = medsynth("train", TINY, "--keys")
    assert "model.optim.lr" in listed
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.root=no/such"], "data.root"),
        (
            ["evaluation.extractor=inception", "evaluation.weights=no/file.pth", "checkpoint.monitor=eval/fid"],
            "no/file.pth",
        ),
        (["model.text_encoder.source=no/such-clip"], "medsynth prepare weights"),
        (["model.vae=runs/none"], "train the first stage"),
        (["data.latents=no/latents"], "medsynth encode"),
        (["hardware.strategy=zero"], "use one of auto, ddp, fsdp, deepspeed2, deepspeed3"),
        (["data.validation_images=40"], "leaves none"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(here, phantom, settings, said):
    with pytest.raises(UserError) as caught:
        medsynth("train", TINY, f"data.root={phantom}", "run_dir=run", *settings)
    assert said in str(caught.value)
    assert not (here / "run").exists(), "nothing is begun"


# sample


def test_sample_writes_marked_pictures_once(run, prompts, tmp_path):
    out = tmp_path / "out"
    medsynth("sample", run, "--prompts", prompts, "--out", out, "--seed", 7)
    files = sorted(out.glob("*.png"))
    assert [f.name for f in files] == ["000000.png", "000001.png"]
    with Image.open(files[0]) as image:
        assert image.size == (32, 32)
        assert image.info["prompt"] == "Generate an image with 1 polyp."
        assert (image.info["seed"], image.info["method"], image.info["synthetic"]) == ("7", "msdm", "true")
    before = files[0].read_bytes(), files[0].stat().st_mtime_ns
    files[1].unlink()
    assert "1 of 2" in medsynth("sample", run, "--prompts", prompts, "--out", out, "--seed", 7)
    assert (files[0].read_bytes(), files[0].stat().st_mtime_ns) == before
    assert files[1].exists()


def test_a_picture_depends_on_its_row_not_on_the_batch(run, prompts, tmp_path):
    for size in (1, 2):
        medsynth("sample", run, "--prompts", prompts, "--out", tmp_path / str(size), "--batch-size", size)
    a, b = (np.asarray(Image.open(tmp_path / str(size) / "000001.png"), dtype=int) for size in (1, 2))
    assert abs(a - b).max() <= 1


def test_one_prompt_several_times_and_the_run_s_own_prompts(run, prompts, tmp_path):
    from jobs.run.folder import build_source

    medsynth("sample", run, "--prompt", "Generate an image with 1 polyp.", "--count", 2, "--out", tmp_path / "one")
    texts = [Image.open(path).info for path in sorted((tmp_path / "one").glob("*.png"))]
    assert [(text["prompt"], text["row"]) for text in texts] == [
        ("Generate an image with 1 polyp.", row) for row in "01"
    ]
    medsynth("sample", run, "--validation", 3, "--out", tmp_path / "own")
    data, _ = build_source(load_config([run / "config.yaml"]))
    drawn = [Image.open(tmp_path / f"own/00000{i}.png").info["prompt"] for i in range(3)]
    assert drawn == data.evaluation_conditions(3).captions
    for several in ([], ["--prompt", "a", "--validation", 1]):
        with pytest.raises(UserError, match="give one of --prompts FILE, --prompt TEXT, --labels NAMES, --per-class"):
            medsynth("sample", run, *several, "--out", tmp_path / "none")


def test_sample_refuses_what_it_cannot_do(run, prompts, tmp_path):
    medsynth("sample", run, "--prompts", prompts, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="was made with seed '0', not '1'"):
        medsynth("sample", run, "--prompts", prompts, "--out", tmp_path / "out", "--seed", 1)
    with pytest.raises(UserError, match="no run directory"):
        medsynth("sample", tmp_path, "--prompts", prompts, "--out", tmp_path / "other")
    with pytest.raises(UserError, match=r"prompts.csv: no column Prompt"):
        prompts.write_text("Text\nhello\n")
        medsynth("sample", run, "--prompts", prompts, "--out", tmp_path / "other")


# evaluate


def noise_pictures(folder, count: int, seed: int, side: int = 32):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_evaluate_scores_folders(phantom, tmp_path):
    fake, out = noise_pictures(tmp_path / "fake", 12, seed=0), tmp_path / "scores.json"
    arguments = ("--extractor", "random", "--workers", 0)
    medsynth("evaluate", "--real", phantom / "images", "--fake", fake, "--out", out, *arguments)
    report = json.loads(out.read_text())
    assert report["real_pictures"] == 40
    assert report["fake_pictures"] == 12
    far = report["scores"]["fd_random"]
    medsynth("evaluate", "--real", phantom / "images", "--fake", phantom / "images", "--out", out, *arguments)
    same = json.loads(out.read_text())["scores"]
    assert same["fd_random"] == pytest.approx(0, abs=1e-6 * far)
    assert same["precision_random"] == 1


def test_evaluate_takes_pictures_of_any_size_and_mode(tmp_path):
    real = noise_pictures(tmp_path / "real", 8, seed=1)
    Image.new("L", (50, 40), 128).save(real / "grey.png")
    Image.new("CMYK", (33, 64)).save(real / "cmyk.jpg")
    printed = medsynth("evaluate", "--real", real, "--fake", real, "--extractor", "random", "--workers", 0)
    assert "fd_random" in printed


def test_evaluate_names_what_is_wrong(tmp_path):
    real = noise_pictures(tmp_path / "real", 5, seed=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        medsynth("evaluate", "--real", real, "--fake", tmp_path / "empty", "--extractor", "random")
    with pytest.raises(UserError, match="there is no folder"):
        medsynth("evaluate", "--real", real, "--fake", tmp_path / "none", "--extractor", "random")
    with pytest.raises(UserError, match="inception"):
        medsynth("evaluate", "--real", real, "--fake", real, "--extractor", "inceptoin")
    (real / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(UserError, match=r"broken\.png"):
        medsynth("evaluate", "--real", real, "--fake", real, "--extractor", "random", "--workers", 0)


def test_inception_without_weights_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-cache"))
    real = noise_pictures(tmp_path / "real", 5, seed=1)
    with pytest.raises(UserError, match="medsynth prepare weights") as caught:
        medsynth("evaluate", "--real", real, "--fake", real)
    assert "\n" not in str(caught.value)


# prepare


def test_prepare_phantom(tmp_path):
    printed = medsynth("prepare", "phantom", "colonoscopy", "--out", tmp_path / "p", "--images", 3, "--size", 64)
    assert "3 pictures" in printed
    with (tmp_path / "p/prompt-gt.csv").open() as file:
        assert len(list(csv.DictReader(file, delimiter=";"))) >= 3 * 7
    assert "already" in medsynth(
        "prepare", "phantom", "colonoscopy", "--out", tmp_path / "p", "--images", 3, "--size", 64
    )


def test_prepare_weights_of_a_tiny_config_needs_none():
    assert "needs no pretrained weights" in medsynth("prepare", "weights", TINY)


def test_prepare_weights_without_internet_names_the_source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"model.perceptual_weights: file://.*vgg.pth could not be fetched"):
        medsynth(
            "prepare", "weights", REPOSITORY / "configs/msdm_vae.yaml", "model.perceptual_weights=file:///none/vgg.pth"
        )


def test_prepare_weights_names_the_variable_of_a_cache_that_cannot_be_written(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("TORCH_HOME", "/dev/null")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/dev/null/hub")
    vae, diffusion = (REPOSITORY / f"configs/{name}.yaml" for name in ("msdm_vae", "stable_diffusion"))
    with pytest.raises(UserError, match="kept in /dev/null/hub/checkpoints.*: set TORCH_HOME to a folder for weights"):
        medsynth("prepare", "weights", vae, "model.perceptual_weights=https://localhost/vgg.pth")
    with pytest.raises(UserError, match="kept in /dev/null/hub, .*: set HF_HOME to a folder for weights"):
        medsynth("prepare", "weights", diffusion, "model.pretrained=owner/name")


def test_prepare_weights_fetches_a_url_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    url = (tmp_path / "vgg.pth").as_uri()
    medsynth("prepare", "weights", REPOSITORY / "configs/msdm_vae.yaml", f"model.perceptual_weights={url}")
    assert (tmp_path / "cache/hub/checkpoints/vgg.pth").read_bytes() == b"weights"
    damaged = tmp_path / "vgg-01234567.pth"
    damaged.write_bytes(b"not what its name promises")
    with pytest.raises(UserError, match="invalid hash"):
        medsynth(
            "prepare", "weights", REPOSITORY / "configs/msdm_vae.yaml", f"model.perceptual_weights={damaged.as_uri()}"
        )


# the command line itself


def test_a_user_s_mistake_is_one_line_and_exit_code_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "jobs.train", str(TINY), "model.optim.lrr=1"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("medsynth: model.optim.lrr=1: there is no key")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "did you mean train?"),
        (["sample", "run", "--promts", "x"], "--prompts"),
        (["evaluate", "--batch-size", "many"], "not a valid integer"),
    ],
)
def test_bad_usage_names_the_nearest_right_word(arguments, said):
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_every_option(command):
    result = CliRunner().invoke(cli.main, [command, "--help"])
    assert result.exit_code == 0
    target = cli.main.get_command(None, command)
    for parameter in target.params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name
