"""Two epochs of each method on pretrained networks, on real pictures at tiny size: losses fall, pictures are made."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from datamodules.batches import collate
from jobs.encode import encode
from jobs.run.config import load_config
from jobs.run.folder import build_data, build_module
from jobs.train import train
from lightning_modules.base import GenerativeModule
from tests.conftest import REPOSITORY
from tests.kandinsky3_folder import write_kandinsky3
from tests.kandinsky22_folders import write_decoder, write_prior
from tests.sd_folder import write_pipeline

DATA = REPOSITORY.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no real pictures beside the repository")
PICTURES = 64

SETTINGS = [
    "data.validation_images=8",
    "train.max_epochs=2",
    "train.max_steps=null",
    "train.validate_every_steps=null",
    "train.global_batch_size=4",
    "train.device_batch_size=4",
    "model.optim.lr=2e-3",
    "ema.decay=0",
]


@pytest.fixture(scope="module")
def colonoscopy(tmp_path_factory) -> Path:
    """64 pictures with their masks and prompts."""
    folder = tmp_path_factory.mktemp("real") / "colonoscopy"
    names = sorted(path.name for path in (DATA / "colonoscopy/images").iterdir())[:PICTURES]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
        stems = {Path(name).stem for name in names}
        for path in (DATA / "colonoscopy" / part).iterdir():
            if path.stem in stems:
                shutil.copy(path, folder / part)
    rows = (DATA / "colonoscopy/prompt-gt.csv").read_text().splitlines()
    kept = [row for row in rows[1:] if Path(row.partition(";")[0]).stem in stems]
    (folder / "prompt-gt.csv").write_text("\n".join([rows[0], *kept]) + "\n")
    return folder


@pytest.fixture(scope="module")
def blood_cells(tmp_path_factory) -> Path:
    """Class folders of 16 pictures each."""
    folder = tmp_path_factory.mktemp("real") / "blood-cells"
    for kind in sorted((DATA / "blood-cells").iterdir()):
        (folder / kind.name).mkdir(parents=True)
        for path in sorted(kind.iterdir())[:16]:
            shutil.copy(path, folder / kind.name)
    (folder / "style_filewords.txt").write_text("a stained smear of [filewords], [name]\n")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, colonoscopy) -> Path:
    """Stable Diffusion's shape, small, fine-tuned on colonoscopy: what the other methods start from."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_pipeline(folder / "random")
    run = folder / "run"
    settings = [f"model.pretrained={folder / 'random'}", f"data.root={colonoscopy}", f"run_dir={run}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        before, after = losses_of("stable_diffusion", settings)
    assert after < 0.95 * before
    return run / "export"


def losses_of(method: str, settings: list[str]) -> tuple[float, float]:
    """Validation loss before and after two epochs."""
    config = load_config([REPOSITORY / f"configs/tiny/{method}.yaml"], [*SETTINGS, *settings])
    torch.manual_seed(config.seed)
    untrained = build_module(config)
    untrained.configure_model()
    before = validation_loss(untrained.eval(), config)
    trained = train(config).lightning_module
    return before, validation_loss(trained.eval(), config)


@torch.no_grad()
def validation_loss(module: GenerativeModule, config) -> float:
    """Mean over the validation set, whose noise is fixed, four times over: small sets are noisy."""
    data, _ = build_data(config, module)
    dataset = data.validation_set()
    rows = collate([dataset[i] for i in range(min(len(dataset), 16))])
    return sum(module.losses(replace(rows, seeds=rows.seeds + i))["loss"].item() for i in range(4)) / 4


def check_pictures(run: Path) -> None:
    grids = sorted((run / "grids").glob("*.png"))
    assert len(grids) == 2, "one an epoch"
    assert all(Image.open(grid).getextrema() != ((0, 0),) * 3 for grid in grids)


@needs_data
@pytest.mark.parametrize("method", ["stable_diffusion_lora", "llcm"])
def test_methods_of_captions_learn_from_colonoscopy(method, pretrained, colonoscopy, here):
    data = [f"data.root={colonoscopy}"]
    if method == "llcm":
        # The student starts as its own target's equal: a large step parts them.
        data = ["model.optim.lr=1e-4", f"data.root={as_metadata(colonoscopy, here / 'metadata')}"]
    before, after = losses_of(method, [f"model.pretrained={pretrained}", "run_dir=run", *data])
    assert after < before
    check_pictures(here / "run")


@needs_data
def test_clip_learns_from_colonoscopy(pretrained, colonoscopy, here):
    """And leads the fine-tuned generator."""
    settings = [f"data.root={colonoscopy}", f"model.generator={pretrained}", "run_dir=run"]
    before, after = losses_of("clip", settings)
    assert after < 0.95 * before
    check_pictures(here / "run")


@needs_data
@pytest.mark.parametrize("data", ["colonoscopy", "lung-nodules"])
def test_controlnet_learns_from_masks(data, pretrained, colonoscopy, here):
    settings = [f"model.pretrained={pretrained}", "run_dir=run"]
    if data == "colonoscopy":
        settings += [f"data.root={colonoscopy}", "data.captions=prompt-gt.csv"]
    else:
        settings += [f"data.root={DATA / data}"]
    before, after = losses_of("controlnet", settings)
    assert after < before
    check_pictures(here / "run")


@needs_data
@pytest.mark.parametrize("method", ["dreambooth", "dreambooth_lora", "hypernetwork"])
def test_methods_of_classes_learn_from_blood_cells(method, pretrained, blood_cells, here):
    settings = [f"model.pretrained={pretrained}", "run_dir=run", f"data.root={blood_cells}"]
    if method == "hypernetwork":
        settings += ["data.name=cytology", "model.widths=[16,8]"]
    before, after = losses_of(method, settings)
    assert after < before
    check_pictures(here / "run")


@needs_data
def test_both_stages_of_kandinsky_learn_from_colonoscopy(colonoscopy, here):
    """The decoder first, then the prior, which draws with what the decoder's run has exported."""
    prior, decoder = write_prior(here / "prior"), write_decoder(here / "decoder")
    data, update = f"data.root={colonoscopy}", ["model.adapter.rank=4", "model.export_merged=true"]
    settings = [data, *update, f"model.pretrained={decoder}", f"model.prior={prior}", "run_dir=decoder-run"]
    before, after = losses_of("kandinsky22_decoder", settings)
    assert after < 0.95 * before
    check_pictures(here / "decoder-run")
    settings = [data, *update, f"model.pretrained={prior}", "model.decoder=decoder-run/export/merged", "run_dir=run"]
    before, after = losses_of("kandinsky22_prior", settings)
    assert after < 0.95 * before
    check_pictures(here / "run")


@needs_data
def test_kandinsky_3_learns_from_colonoscopy_by_an_update_out_of_a_cache(colonoscopy, here):
    """Encoded first, so that neither encoder is held."""
    settings = [f"data.root={colonoscopy}", f"model.pretrained={write_kandinsky3(here / 'pretrained')}", "run_dir=run"]
    settings += ["model.adapter.rank=4", "data.validation_images=8"]
    encode(load_config([REPOSITORY / "configs/tiny/kandinsky3.yaml"], settings), here / "latents")
    before, after = losses_of("kandinsky3", [*settings, "data.latents=latents"])
    assert after < before
    check_pictures(here / "run")


def as_metadata(colonoscopy: Path, folder: Path) -> Path:
    """The pictures with their first prompts, as `metadata.csv`."""
    shutil.copytree(colonoscopy / "images", folder)
    suffixes = {path.stem: path.suffix for path in folder.iterdir()}
    rows = dict(reversed([row.split(";")[:2] for row in (colonoscopy / "prompt-gt.csv").read_text().splitlines()[1:]]))
    lines = [f'{Path(name).stem}{suffixes[Path(name).stem]},"{prompt}"' for name, prompt in sorted(rows.items())]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]) + "\n")
    return folder


@needs_data
@pytest.mark.parametrize("method", ["cell_gan"])
def test_adversarial_methods_learn_from_blood_cells(method, blood_cells, here):
    """Their losses tell little: what they draw comes nearer to the real pictures in its mean and spread of colours."""
    settings = [*SETTINGS, f"data.root={blood_cells}", "run_dir=run", "model.optim.lr=1e-3", "ema.decay=0.5"]
    settings += ["train.max_epochs=4", "data.affine_probability=0"]
    settings += ["model.classes=4"] if method == "cell_gan" else []
    config = load_config([REPOSITORY / f"configs/tiny/{method}.yaml"], settings)
    torch.manual_seed(config.seed)
    untrained = build_module(config)
    untrained.configure_model()
    before = distance_of_colours(untrained.eval(), config)
    trained = train(config).lightning_module
    after = distance_of_colours(trained.eval(), config)
    assert after < 0.8 * before
    assert len(list((here / "run/grids").glob("*.png"))) == 4, "one an epoch"


@torch.no_grad()
def distance_of_colours(module: GenerativeModule, config) -> float:
    """Between means, and between standard deviations, of the colours of 32 real and 32 drawn pictures."""
    data, _ = build_data(config, module)
    training = data.training_set()
    real = collate([training[i] for i in range(32)])
    drawn = module.sample(real.conditions, list(range(32)))
    means, stds = ([each(x, dim=(0, 2, 3)) for x in (real.pictures(), drawn)] for each in (torch.mean, torch.std))
    return float((means[0] - means[1]).norm() + (stds[0] - stds[1]).norm())
