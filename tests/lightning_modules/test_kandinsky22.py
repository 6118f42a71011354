"""Kandinsky 2.2, both stages, against diffusers on the same small weights: pictures, exports; and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, KandinskyV22Pipeline, KandinskyV22PriorPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.batches import Conditions, ImageBatch
from datamodules.stream import derive_seed
from jobs.run.config import load_config
from jobs.run.folder import build_module
from lightning_modules.base import GenerativeModule, count_parameters
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.kandinsky22_folders import write_decoder, write_prior
from tests.lightning_modules.moved import move

PROMPTS = ["generate an image with 1 polyp.", "a pelvis, 103"]
CONDITIONS = Conditions(captions=PROMPTS)
OTHER = {"prior": "decoder", "decoder": "prior"}
STAGE = pytest.mark.parametrize("stage", sorted(OTHER))
STEPS, GUIDANCE = 4, 3.0


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("kandinsky22")
    return {"prior": write_prior(base / "prior"), "decoder": write_decoder(base / "decoder")}


def configured(stage: str, folders, *settings: str):
    other = OTHER[stage]
    told = [f"model.pretrained={folders[stage]}", f"model.{other}={folders[other]}", "data.root=nowhere"]
    told += [
        f"model.{part}.{key}" for part in ("sampler", f"{other}_sampler") for key in (f"steps={STEPS}", "guidance=3")
    ]
    return load_config([REPOSITORY / f"configs/tiny/kandinsky22_{stage}_whole.yaml"], [*told, *settings])


def built(stage: str, folders, *settings: str) -> GenerativeModule:
    module = build_module(configured(stage, folders, *settings))
    module.configure_model()
    return module.eval()


def pipelines(prior: Path, decoder: Path) -> tuple[KandinskyV22PriorPipeline, KandinskyV22Pipeline]:
    both = KandinskyV22PriorPipeline.from_pretrained(prior), KandinskyV22Pipeline.from_pretrained(decoder)
    for pipeline in both:
        pipeline.set_progress_bar_config(disable=True)
    return both


def drawn(prior, decoder, seeds=(7, 8), steps: int = STEPS, guidance: float = GUIDANCE) -> Tensor:
    """What plain diffusers draws, float32 (n, 3, H, W)."""
    told = prior(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )  # fmt: skip
    pictures = decoder(
        image_embeds=told.image_embeds, negative_image_embeds=told.negative_image_embeds, height=32, width=32,
        num_inference_steps=steps, guidance_scale=guidance, output_type="np",
        generator=[torch.Generator().manual_seed(derive_seed(seed, "decoder")) for seed in seeds],
    ).images  # fmt: skip
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


# Against diffusers


def test_both_methods_draw_the_pictures_of_the_two_pipelines(folders):
    """The same folders and seeds: the same pictures, whichever stage is the one that learns."""
    prior, decoder = pipelines(**folders)
    modules = [built(stage, folders) for stage in OTHER]
    decoder.scheduler = modules[1].scheduler()
    expected = drawn(prior, decoder)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    for module in modules:
        torch.testing.assert_close(module.sample(CONDITIONS, [7, 8]), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_steps_and_guidance_of_the_caller_are_those_of_the_stage_that_learns(folders, guidance):
    prior, decoder = pipelines(**folders)
    module = built("decoder", folders)
    decoder.scheduler = module.scheduler()
    ours = module.sample(CONDITIONS, [7, 8], steps=3, guidance=guidance)
    torch.testing.assert_close(ours, drawn(prior, decoder, steps=3, guidance=guidance), rtol=0, atol=2e-5)


@STAGE
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_an_exported_update_draws_the_same_pictures_in_plain_diffusers(folders, tmp_path, stage, kind):
    settings = [
        "model.adapter.rank=2",
        "model.adapter.alpha=3",
        f"model.adapter.kind={kind}",
        "model.export_merged=true",
    ]
    module = move(built(stage, folders, *settings))
    module.export(tmp_path)
    ours = module.sample(CONDITIONS, [7, 8])
    assert (ours - built(stage, folders).sample(CONDITIONS, [7, 8])).abs().max() > 1e-3, "the update does nothing"

    prior, decoder = pipelines(**folders)
    network = {"prior": prior.prior, "decoder": decoder.unet} if stage == "prior" else {"decoder": decoder.unet}
    network[stage].load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    kept = DDPMScheduler if stage == "decoder" else type(prior.scheduler)
    scheduler = kept.from_pretrained(tmp_path, subfolder="scheduler")
    if stage == "decoder":
        decoder.scheduler = scheduler
    else:
        prior.scheduler, decoder.scheduler = scheduler, module.decoder.scheduler()
    torch.testing.assert_close(drawn(prior, decoder), ours, rtol=0, atol=2e-5)

    prior, whole = pipelines(**folders | {stage: tmp_path / "merged"})
    if stage == "prior":
        whole.scheduler = module.decoder.scheduler()
    learned = whole.unet if stage == "decoder" else prior.prior
    assert not [name for name, _ in learned.named_parameters() if "lora" in name]
    torch.testing.assert_close(drawn(prior, whole), ours, rtol=0, atol=2e-5)


@STAGE
def test_a_whole_network_is_exported_as_a_pipeline_that_draws_the_same(folders, tmp_path, stage):
    module = move(built(stage, folders))
    module.export(tmp_path)
    prior, decoder = pipelines(**folders | {stage: tmp_path})
    if stage == "prior":
        decoder.scheduler = module.decoder.scheduler()
    torch.testing.assert_close(drawn(prior, decoder), module.sample(CONDITIONS, [7, 8]), rtol=0, atol=2e-5)


@STAGE
def test_the_other_stage_takes_what_one_exports(folders, tmp_path, stage):
    """Stages of one job: what the first exported is what the second draws with."""
    first = move(built(stage, folders, "model.adapter.rank=2", "model.export_merged=true"))
    first.export(tmp_path / "export")
    second = built(OTHER[stage], folders | {stage: tmp_path / "export/merged"})
    ours, theirs = (module.sample(CONDITIONS, [7, 8]) for module in (first, second))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@STAGE
def test_what_is_frozen_is_exported_as_it_was_loaded(folders, tmp_path, stage):
    module = built(stage, folders)
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()  # as mixed precision holds it
    module.export(tmp_path)
    parts = {"prior": ("text_encoder", "image_encoder"), "decoder": ("movq",)}[stage]
    exported = build_module(configured(stage, folders | {stage: tmp_path}))
    assert exported.encoder_digest() == module.encoder_digest(), "a cache of the one is good for the other"
    assert exported.text_digest() == module.text_digest()
    for part in parts:
        (before,), (after,) = ((root / part).glob("*.safetensors") for root in (folders[stage], tmp_path))
        ours = load_file(after)
        assert all(torch.equal(value, ours[name]) for name, value in load_file(before).items())


@pytest.mark.parametrize("variant", ["fp16", "bin"])
def test_half_precision_and_pickles_are_exported_as_any_pipeline_reads_them(folders, tmp_path, variant):
    folder = shutil.copytree(folders["decoder"], tmp_path / "decoder")
    (file,) = (folder / "movq").glob("*.safetensors")
    state = {name: value.half().float() for name, value in load_file(file).items()}
    file.unlink()
    if variant == "bin":
        torch.save(state, file.with_suffix(".bin"))
    else:
        save_file(
            {name: value.half() for name, value in state.items()},
            file.with_suffix(".fp16.safetensors"),
            {"format": "pt"},
        )
    module = built("decoder", folders | {"decoder": folder})
    module.export(tmp_path / "export")
    ours = KandinskyV22Pipeline.from_pretrained(tmp_path / "export").movq.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in state.items())
    assert not list((tmp_path / "export").rglob("*.bin"))


# Sizes


def test_the_published_networks_have_the_papers_size():
    """Kandinsky 2.2 with its encoders, and what the paper trains of it: rank 128 on queries, keys, values and outputs.

    The paper's 4.6 B count another text encoder; CLIP ViT-bigG's, which the published prior has learned, has 695 M.
    """
    modules = {}
    for stage in OTHER:
        preset = REPOSITORY / f"configs/kandinsky22_{stage}.yaml"
        config = load_config([preset], ["model.pretrained=random", f"model.{OTHER[stage]}=random"])
        with torch.device("meta"):
            modules[stage] = build_module(config)
            modules[stage].configure_model()
    trained = {stage: count_parameters(module)[0] for stage, module in modules.items()}
    assert {stage: round(count / 1e6, 2) for stage, count in trained.items()} == {"prior": 41.94, "decoder": 26.35}
    assert round(sum(trained.values()) / 1e6, 1) == 68.3

    prior, decoder = modules["prior"], modules["decoder"]
    networks = [prior.prior, decoder.unet, decoder.movq, prior.text_encoder.model, prior.image_encoder.encoder]
    sizes = [sum(p.numel() for name, p in network.named_parameters() if "lora_" not in name) for network in networks]
    sizes[0] += prior.prior.clip_mean.numel() + prior.prior.clip_std.numel()
    assert [round(size / 1e6, 1) for size in sizes] == [1026.2, 1253.1, 67.8, 694.7, 1844.9]
    assert round(sum(sizes) / 1e9, 2) == 4.89


# What is held in which type


@STAGE
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16])
def test_what_never_learns_is_loaded_in_the_type_that_it_is_held_in(folders, stage, held):
    """Not in float32 first, which is twice the memory. The summary tries a picture so, before a device is there."""
    module = build_module(configured(stage, folders, "model.adapter.rank=2"))
    module.frozen_dtype = held
    module.configure_model()
    rows = ImageBatch(torch.rand(2, 3, 32, 32), CONDITIONS, torch.tensor([1, 2]), torch.zeros(2).bool())
    exact = built(stage, folders, "model.adapter.rank=2").losses(rows)["loss"]
    torch.testing.assert_close(module.losses(rows)["loss"], exact, rtol=0.05, atol=0)
    learns = module.network
    wide = {name for name, p in module.named_parameters() if p.dtype != held}
    assert wide == {f"{module.part}.{name}" for name, _ in learns.named_parameters()}
    statistics = module.prior if stage == "prior" else module.prior.prior
    assert statistics.clip_std.dtype == statistics.clip_mean.dtype == torch.float32
    assert torch.equal(
        statistics.clip_std, load_file(next((folders["prior"] / "prior").glob("*.safetensors")))["clip_std"]
    )


# What is refused


@STAGE
def test_the_folders_of_the_stages_given_for_each_other(folders, stage):
    swapped = folders | {stage: folders[OTHER[stage]]}
    with pytest.raises(UserError, match=r"^model\.pretrained: .* is the other stage of Kandinsky 2.2: name a "):
        built(stage, swapped)
    other = folders | {OTHER[stage]: folders[stage]}
    with pytest.raises(UserError, match=rf"^model\.{OTHER[stage]}: .* is the other stage of Kandinsky 2.2: name a "):
        built(stage, other)


@STAGE
def test_stages_of_different_width(folders, tmp_path, stage):
    wide = {"prior": write_prior, "decoder": write_decoder}[stage](tmp_path / "wide", width=24)
    with pytest.raises(UserError, match="is told image embeddings of width .*; they are not of one Kandinsky"):
        built(stage, folders | {stage: wide})


def changed(folder: Path, to: Path, file: str, **said) -> Path:
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | said), encoding="utf-8")
    return to


SCHEDULER = "scheduler/scheduler_config.json"
OF_PRIOR = [
    (SCHEDULER, {"prediction_type": "epsilon"}, "says prediction_type=epsilon, not sample"),
    (SCHEDULER, {"num_train_timesteps": 500}, "was trained with other noise; set model.noise.steps=500"),
    (SCHEDULER, {"_class_name": "DDPMScheduler", "beta_schedule": "linear"}, "other noise; set .*schedule=linear"),
    ("prior/config.json", {"clip_embed_dim": 8}, "has clip_embed_dim=8: text and pictures have width 16"),
    ("text_encoder/config.json", {"projection_dim": 8}, "has projection_dim=8, the prior embedding_dim=16"),
    ("image_encoder/config.json", {"projection_dim": 8}, "has projection_dim=8, the prior embedding_dim=16"),
    ("prior/config.json", {"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel, not a PriorTransformer"),
]
OF_DECODER = [
    (SCHEDULER, {"prediction_type": "v_prediction"}, "says prediction_type=v_prediction, not epsilon"),
    (SCHEDULER, {"beta_schedule": "scaled_linear"}, "other noise; set .*model.noise.schedule=scaled_linear"),
    (SCHEDULER, {"beta_end": 0.02}, "other noise; set .*model.noise.beta_end=0.02"),
    ("unet/config.json", {"encoder_hid_dim_type": None}, "is not told the embedding of a picture"),
    (
        "unet/config.json",
        {"out_channels": 4},
        "out_channels=4; of latents with 4 channels it gives noise and variance, 8",
    ),
]


@pytest.mark.parametrize(
    ("stage", "file", "said", "message"),
    [("prior", *case) for case in OF_PRIOR] + [("decoder", *case) for case in OF_DECODER],
)
def test_a_folder_that_is_not_what_the_stage_takes(folders, tmp_path, stage, file, said, message):
    folder = changed(folders[stage], tmp_path / "other", file, **said)
    with pytest.raises(UserError, match=message) as refused:
        built(stage, folders | {stage: folder})
    assert str(refused.value).startswith("model.pretrained: ") and "\n" not in str(refused.value)
    with pytest.raises(UserError, match=rf"^model\.{stage}: ") as refused:
        built(OTHER[stage], folders | {stage: folder})
    assert "model.noise" not in str(refused.value), "that key is the other stage's"


def test_a_prior_without_statistics_of_embeddings(folders, tmp_path):
    folder = tmp_path / "prior"
    shutil.copytree(folders["prior"], folder)
    (file,) = (folder / "prior").glob("*.safetensors")
    state = load_file(file)
    save_file(state | {"clip_std": torch.zeros_like(state["clip_std"])}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"^model\.pretrained: .* clip_std that is not above 0: the mean and standard"):
        built("prior", folders | {"prior": folder})
    save_file({name: value for name, value in state.items() if name != "clip_mean"}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"^model\.prior: .* lacks 1 of its weights, the first is clip_mean"):
        built("decoder", folders | {"prior": folder})


@STAGE
def test_an_export_of_an_update_alone_names_what_to_take(folders, tmp_path, stage):
    built(stage, folders, "model.adapter.rank=2", "model.export_merged=true").export(tmp_path / "run/export")
    with pytest.raises(UserError, match=r"is a low-rank update alone; name that run's export/merged"):
        built(OTHER[stage], folders | {stage: tmp_path / "run/export"})
    with pytest.raises(UserError, match=r"is a run; name its export, .*run/export/merged"):
        built(OTHER[stage], folders | {stage: tmp_path / "run"})


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("prior", ["model.sampler.name=ddim"], "model.sampler.name=ddim: Kandinsky's prior is drawn from with ddpm"),
        ("decoder", ["model.prior_sampler.name=ddim"], "^model.prior_sampler.name=ddim"),
        ("decoder", ["model.sampler.name=lcm"], "^model.sampler.name=lcm: .* is no consistency model"),
        ("prior", ["model.decoder_sampler.name=lcm"], "^model.decoder_sampler.name=lcm"),
        ("prior", ["model.sampler.steps=1"], "^model.sampler.steps=1: a prior's steps .* 2 or more"),
        ("decoder", ["model.prior_sampler.steps=1"], "^model.prior_sampler.steps=1: "),
        ("prior", ["model.decoder_sampler.steps=1001"], "^model.decoder_sampler.steps=1001: .* 1 to 1000 steps"),
        ("prior", ["model.noise.schedule=linear"], "model.noise.schedule=linear: Kandinsky's prior has cosine betas"),
        ("decoder", ["model.noise.zero_terminal_snr=true"], "model.noise.zero_terminal_snr: Kandinsky 2.2"),
        ("decoder", ["model.resolution=34", "data.resolution=34"], "model.resolution=34: must be a multiple of 4"),
        ("prior", ["model.adapter.rank=2", "model.adapter.targets=[q]"], r"model\.adapter\.targets=.*to_q"),
        ("prior", ["model.decoder=nobody/nothing"], "model.decoder: nobody/nothing is not on this machine"),
    ],
)
def test_one_clear_line_for_what_cannot_be(folders, stage, settings, message):
    with pytest.raises(UserError, match=message):
        built(stage, folders, *settings)


@pytest.mark.parametrize(
    "part", ["prior", "image_encoder", "image_processor", "text_encoder", "tokenizer", "scheduler"]
)
def test_a_prior_without_a_part_is_named(folders, tmp_path, part):
    broken = shutil.copytree(folders["prior"], tmp_path / "broken")
    shutil.rmtree(broken / part)
    with pytest.raises(UserError, match=f"{broken} has no folder {part}; it must be a prior of Kandinsky 2.2"):
        built("decoder", folders | {"prior": broken})


def test_negative_prompts_are_refused(folders):
    with pytest.raises(UserError, match="negative prompts need a method that leads away from words"):
        built("prior", folders).sample(Conditions(captions=PROMPTS, negatives=PROMPTS), [1, 2])
