"""Pretrained folders: read in every way the hub has them, and refused in one line where they are not what they say."""

import copy
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, LCMScheduler, UNet2DConditionModel
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionModelWithProjection

from datamodules.batches import Conditions
from jobs.run.config import load_config
from jobs.run.folder import build_module
from lightning_modules.base import GenerativeModule
from lightning_modules.msdm_vae import LatentCodec, LatentCodecConfig
from lightning_modules.parts.image_prompt import ImagePrompt, load_image_encoder
from lightning_modules.parts.perceptual import PerceptualLoss
from lightning_modules.parts.text import TextEncoder, TextEncoderConfig
from lightning_modules.parts.weights import Weights
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.lightning_modules.moved import move
from tests.lightning_modules.test_stable_diffusion import PROMPTS, batch, drawn, reference
from tests.sd_folder import write_pipeline

CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A small Stable Diffusion 1.x."""
    return write_pipeline(tmp_path_factory.mktemp("plain") / "sd1")


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    """A copy of it, to be spoilt."""
    return shutil.copytree(plain, tmp_path / "pipeline")


@cache
def configured(preset: str, *settings: str) -> DictConfig:
    return load_config([REPOSITORY / f"configs/tiny/{preset}.yaml"], ["data.root=nowhere", *settings])


def unbuilt(folder, *settings: str, preset: str = "stable_diffusion") -> GenerativeModule:
    config = copy.deepcopy(configured(preset, *settings))
    config.model.pretrained = str(folder)
    return build_module(config)


def built(folder, *settings: str, preset: str = "stable_diffusion") -> GenerativeModule:
    module = unbuilt(folder, *settings, preset=preset)
    module.configure_model()
    return module.eval()


def refused(build, *arguments, **named) -> str:
    """The one line that it is refused with."""
    with pytest.raises(UserError) as caught:
        build(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(file: Path) -> dict[str, Tensor]:
    """A file of weights, without a hold on it, so that it can be rewritten."""
    return {name: value.clone() for name, value in load_file(file).items()}


def write(file: Path, state: dict[str, Tensor]) -> None:
    save_file({name: value.clone() for name, value in state.items()}, file, {"format": "pt"})


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in names}


def describe(folder: Path, name: str, **facts) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


# Each way in which the hub has them


def rewrite(folder: Path, part: str, way: str) -> None:
    """A part's weights again, as the libraries themselves write that way."""
    network = CLASSES[part].from_pretrained(folder / part)
    (folder / part / f"{FILES[part]}.safetensors").unlink()
    options = {"variant": "fp16"} if "fp16" in way else {}
    options |= {"max_shard_size": "8KB"} if "shards" in way else {}
    network = network.half() if "fp16" in way else network
    if "bin" not in way:
        network.save_pretrained(folder / part, **options)
    elif part == "text_encoder":  # transformers writes no pickles any more
        torch.save(network.state_dict(), folder / part / "pytorch_model.bin")
    else:
        network.save_pretrained(folder / part, safe_serialization=False, **options)


@pytest.mark.parametrize("way", ["fp16", "shards", "fp16 shards", "bin", "bin shards"])
def test_a_folder_is_read_in_every_way_the_hub_has_it(plain, folder, way):
    for part in CLASSES:
        rewrite(folder, part, way)
    ours, theirs = built(folder), built(plain)
    pairs = [(ours.unet, theirs.unet), (ours.vae, theirs.vae), (ours.text_encoder.model, theirs.text_encoder.model)]
    for network, whole in pairs:
        for (name, value), expected in zip(network.state_dict().items(), whole.state_dict().values(), strict=True):
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected.half().to(expected.dtype) if "fp16" in way else expected), name
    read = set(Weights("key", str(folder), ("unet", "tokenizer")).contents())
    written = {str(path.relative_to(folder)) for path in (folder / "unet").iterdir()}
    assert {name for name in read if name.startswith("unet/")} == written
    assert "tokenizer/vocab.json" in read or "tokenizer/tokenizer.json" in read


def test_full_precision_is_read_before_half_and_a_pickle_runs_nothing(plain, folder, tmp_path):
    CLASSES["unet"].from_pretrained(folder / "unet").half().save_pretrained(folder / "unet", variant="fp16")
    expected = built(plain).unet.conv_in.weight
    assert torch.equal(built(folder).unet.conv_in.weight, expected)
    names = Weights("key", str(folder), ("unet",)).contents()
    assert not [name for name in names if "fp16" in name]

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    torch.save({"conv_in.weight": Code()}, folder / "unet/diffusion_pytorch_model.bin")
    assert f"{folder}/unet cannot be loaded" in refused(built, folder)
    assert not (tmp_path / "ran").exists()


def test_an_index_that_promises_more_than_its_shards_hold_is_not_believed(folder):
    rewrite(folder, "unet", "shards")
    file = min((folder / "unet").glob("*-of-*.safetensors"))
    name = min(read(file))
    write(file, without(read(file), name))
    assert f"unet lacks 1 of its weights, the first is {name}" in refused(built, folder)


def test_a_shard_or_weights_that_are_not_there_are_named_with_the_mend(folder):
    rewrite(folder, "unet", "shards")
    next((folder / "unet").glob("*-00002-of-*")).unlink()
    said = refused(built, folder)
    assert "unet has no diffusion_pytorch_model-00002-of-" in said
    assert "which diffusion_pytorch_model.safetensors.index.json names; fetch it with `medsynth prepare weights" in said
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "../../b"}}')
    assert "index.json is no index of weights" in refused(built, folder)
    for file in (folder / "unet").glob("*.safetensors*"):
        file.unlink()
    assert "unet cannot be loaded: it has neither safetensors nor .bin of a network" in refused(built, folder)


WHOLE, UPDATE = "model.diffusion_model.input_blocks.0.0.weight", "unet.down_blocks.0.to_q.lora_A.weight"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_checkpoint_in_one_file_is_told_the_command_that_converts_it(tmp_path, suffix):
    file = tmp_path / f"v1-5-pruned{suffix}"
    save_file({WHOLE: torch.zeros(1)}, file)
    for source in (file, tmp_path):
        said = refused(built, source)
        assert f"{file} is a checkpoint in one file" in said
        command = re.search(r'python -c "(.*)"$', said)[1]
        compile(command, "command", "exec")
        assert f"P.from_single_file('{file}').save_pretrained('{tmp_path}/v1-5-pruned')" in command


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([UPDATE], "is a low-rank update alone; name the pipeline that it was made for"),
        ([WHOLE, "conditioner.embedders.1.model.ln_final.bias"], "is a Stable Diffusion XL"),
        (["768.k.0.weight"], "is no Stable Diffusion in one file"),
        ([], "cannot be read"),
    ],
)
def test_no_other_file_is_taken_for_one(tmp_path, names, said):
    file = tmp_path / "weights.safetensors"
    save_file({name: torch.zeros(1) for name in names}, file) if names else file.write_bytes(b"<html>")
    assert f"model.pretrained: {file} {said}" in refused(built, tmp_path)


def test_a_run_in_the_place_of_its_export_is_told_so(tmp_path, folder):
    folder.rename(tmp_path / "export")
    assert refused(built, tmp_path) == f"model.pretrained: {tmp_path} is a run; name its export, {tmp_path}/export"


# Every weight


@pytest.mark.parametrize("part", CLASSES)
def test_weights_that_do_not_fit_are_refused(folder, part):
    file = folder / part / f"{FILES[part]}.safetensors"
    whole = read(file)
    first, *_, last = sorted(whole)
    broken = whole[last].clone()
    broken.view(-1)[0] = float("-inf")
    faults = {
        r"lacks 1 of its weights, the first is \S+; copy or fetch that folder anew": without(whole, last),
        r"lacks 2 of its weights": without(whole, first, last),
        r"has 1 weights that the network of its config.json has not, the first is": whole | {"odd": torch.zeros(1)},
        r"of shape \(7,\), its config.json makes it \(.*not of one network$": whole | {last: torch.zeros(7)},
        r"has 1 weights that are not finite numbers": whole | {last: broken},
        r"has \d+ weights that are not finite numbers": {k: v * float("nan") for k, v in whole.items()},
    }
    module = unbuilt(folder)
    load = {"unet": module.load_unet, "vae": module.load_vae, "text_encoder": module.load_text_encoder}[part]
    for said, state in faults.items():
        write(file, state)
        line = refused(load)
        assert line.startswith(f"model.pretrained: {folder}/{part} ")
        assert re.search(said, line), line


@pytest.mark.parametrize(("part", "word"), [("unet", "_orig_mod."), ("text_encoder", "_orig_mod."), ("vae", "module.")])
def test_names_that_a_wrapper_left_are_refused_with_the_command_that_mends_them(plain, folder, part, word):
    file = folder / part / f"{FILES[part]}.safetensors"
    write(file, {f"{word}{name}": value for name, value in read(file).items()})
    said = refused(built, folder)
    assert f"weights named {word}…" in said
    command = re.search(r'python -c "(.*)"$', said)[1]
    exec(command, {})
    assert torch.equal(built(folder).losses(batch())["loss"], built(plain).losses(batch())["loss"])


def test_an_export_that_holds_an_adapter_is_told_how_to_come_by_another(folder):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    write(file, {name.replace("to_q.", "to_q.base_layer."): value for name, value in read(file).items()})
    said = refused(built, folder)
    assert re.search(r"adapter in it and lacks 8 weights.*start the run that exported it once more", said)


def test_an_adapter_s_folder_is_not_followed_to_the_network_that_it_names(plain, folder):
    (folder / "text_encoder/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(plain)}))
    assert "text_encoder has adapter_config.json" in refused(built, folder)


def test_a_tokenizer_without_its_words_or_of_another_model_is_refused(folder):
    path = folder / "tokenizer"
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (path / name).unlink(missing_ok=True)
    assert f"model.pretrained: {path} h" in refused(built, folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    file = folder / "text_encoder/model.safetensors"
    table = "embeddings.token_embedding.weight"
    write(file, {k: v[:40] if k.endswith(table) else v for k, v in read(file).items()})
    describe(folder, "text_encoder/config.json", vocab_size=40)
    said = refused(built, folder)
    assert re.search(r"tokenizer knows \d+ tokens, the text encoder 40; they are not of one model", said)


def test_a_whole_clip_serves_for_its_sides_and_one_that_lacks_a_weight_does_not(tmp_path, folder):
    text = json.loads((folder / "text_encoder/config.json").read_text())
    shape = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 8, **shape}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    for file in (folder / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "clip")
    source = str(tmp_path / "clip")
    assert TextEncoder(TextEncoderConfig(source=source, width=16))(["a b"])[0].shape == (1, 77, 16)
    encoder, _ = load_image_encoder(source, "model.image_encoder")
    assert isinstance(encoder, CLIPVisionModelWithProjection)
    file = tmp_path / "clip/model.safetensors"
    whole = read(file)
    write(file, without(whole, "visual_projection.weight"))
    assert "lacks 1 of its weights, the first is visual_projection.weight" in refused(load_image_encoder, source, "key")
    write(file, without(whole, *(name for name in whole if "text_model.final_layer" in name)))
    assert "lacks 2 of its weights" in refused(TextEncoder, TextEncoderConfig(source=source, width=16))


def test_networks_of_this_project_s_own_layout_are_held_likewise(tmp_path):
    codec = LatentCodec(LatentCodecConfig(widths=[8, 8], norm_groups=4))
    codec.save(tmp_path)
    LatentCodec.load(tmp_path, "model.vae")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = read(file)
    for state, said in (
        (
            {k: v for k, v in whole.items() if "running_mean" not in k},
            "lacks 1 of its weights, the first is statistics.",
        ),
        ({f"_orig_mod.{k}": v for k, v in whole.items()}, "weights named _orig_mod.…"),
        ({k: v * float("nan") if "running_var" in k else v for k, v in whole.items()}, "not finite numbers"),
    ):
        write(file, state)
        line = refused(LatentCodec.load, tmp_path, "model.vae")
        assert line.startswith(f"model.vae: {file} ") and said in line

    prompt = ImagePrompt(*load_image_encoder("random", "key"), text_width=8, tokens=2, weight=1.0)
    prompt.save_pretrained(tmp_path / "prompt", *load_image_encoder("random", "key"))
    file = tmp_path / "prompt/diffusion_pytorch_model.safetensors"
    write(file, {k: v for k, v in read(file).items() if "norm" not in k})
    said = refused(ImagePrompt.from_pretrained, tmp_path / "prompt")
    assert said.startswith(f"{tmp_path}/prompt holds no image prompt: projection: ") and "lacks 2 of its" in said

    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    assert "vgg.pth lacks 25 of VGG-16's weights, the first is features.0.bias" in refused(
        PerceptualLoss, str(tmp_path / "vgg.pth")
    )


# Every input, and the facts of the folder


@pytest.mark.parametrize(
    ("name", "facts", "said"),
    [
        ("unet", {"time_cond_proj_dim": 8}, "time_cond_proj_dim=8: it takes the guidance.* that it was distilled from"),
        ("unet", {"in_channels": 9}, "in_channels=9, latents have 4 channels: it takes a mask and a masked picture"),
        ("unet", {"in_channels": 8}, "in_channels=8.* another picture"),
        ("unet", {"out_channels": 8}, "out_channels=8.*it predicts more than the noise"),
        ("unet", {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}, "as Stable Diffusion XL does"),
        ("unet", {"class_embed_type": "projection"}, "class_embed_type=projection: it takes a class, a noise level or"),
        ("unet", {"num_class_embeds": 1000}, "num_class_embeds=1000: it takes a class"),
        ("unet", {"encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj"}, "embeddings of another encoder"),
        ("unet", {"attention_type": "gated"}, "attention_type=gated: it takes boxes"),
        ("unet", {"cross_attention_dim": [16, 24]}, "text embeddings of width 16, its U-Net takes 16, 24"),
        ("unet", {"_class_name": "UNet2DModel"}, "unet is a UNet2DModel, not a UNet2DConditionModel"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "vae is a AutoencoderTiny, not a AutoencoderKL"),
        ("vae", {"latent_channels": 16}, "in_channels=4, latents have 16 channels"),
        ("vae", {"in_channels": 1, "out_channels": 1}, "vae has in_channels=1: pictures have three"),
        ("vae", {"shift_factor": 0.1}, "vae has shift_factor, which Stable Diffusion's pipeline does not know"),
        ("vae", {"latents_mean": [0.1] * 4}, "vae has latents_mean"),
        ("vae", {"scaling_factor": 0}, "vae has scaling_factor=0"),
        ("text_encoder", {"model_type": "t5"}, "text_encoder is of the kind t5, not CLIP's"),
    ],
)
def test_what_a_method_never_feeds_is_refused(folder, name, facts, said):
    describe(folder, f"{name}/config.json", **facts)
    assert re.search(said, refused(built, folder))


def test_an_lcm_export_is_no_model_for_another_method(plain, tmp_path):
    built(plain, preset="llcm").export(tmp_path / "export")
    for preset in ("stable_diffusion", "dreambooth", "hypernetwork", "llcm"):
        assert "time_cond_proj_dim=8: it takes the guidance" in refused(built, tmp_path / "export", preset=preset)


def test_how_latents_are_scaled_is_read_from_the_folder(folder):
    describe(folder, "vae/config.json", scaling_factor=0.5)
    module, moments = built(folder), torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(module.normalise(moments, torch.zeros(1, 4, 8, 8)), 0.5 * moments[:, :4])
    text = (folder / "vae/config.json").read_text()
    described = {k: v for k, v in json.loads(text).items() if k != "scaling_factor"}
    (folder / "vae/config.json").write_text(json.dumps(described))
    assert built(folder).vae.config.scaling_factor == AutoencoderKL().config.scaling_factor


def scheduler(folder: Path, made, keep=lambda key: True) -> None:
    described = {key: value for key, value in dict(made.config).items() if keep(key)}
    (folder / "scheduler/scheduler_config.json").write_text(
        json.dumps({"_class_name": type(made).__name__, **described})
    )


def test_the_noise_is_what_the_folder_s_own_scheduler_class_makes_of_its_file(folder):
    """LCMScheduler's defaults are Stable Diffusion's betas, those of the others are not."""
    scheduler(folder, LCMScheduler(), keep=lambda key: not key.startswith(("beta", "num_train", "prediction")))
    assert built(folder).prediction == "epsilon"
    scheduler(folder, LCMScheduler(), keep=lambda key: not key.startswith("beta_schedule"))
    built(folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace("LCMScheduler", "PNDMScheduler"))
    assert "set model.noise.steps=1000" in refused(built, folder)
    euler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler(folder, euler)
    said = refused(built, folder)
    mend = said.partition("; set ")[2].split()
    assert built(folder, *mend).alpha_bar[-1] == 0


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "which knows no betas"),
        ({"_class_name": "NoScheduler"}, "class NoScheduler"),
        ({"prediction_type": "flow_prediction"}, "prediction_type=flow_prediction, not epsilon, v_prediction, sample"),
        ({"beta_schedule": "exp"}, "scheduler cannot be read: exp"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(folder, facts, said):
    describe(folder, "scheduler/scheduler_config.json", **facts)
    assert said in refused(built, folder)


def test_clipping_that_the_folder_s_scheduler_asks_for_is_not_left_out_in_silence(folder):
    describe(folder, "scheduler/scheduler_config.json", clip_sample=True)
    with pytest.warns(UserWarning, match="scheduler says clip_sample; pictures are drawn here without"):
        module = built(folder)
    assert module.scheduler().config.clip_sample is False


# What is exported


def loaded_whole(directory: Path) -> dict[str, Tensor]:
    """The networks of an exported pipeline, each by the library that it is of, with all its keys and no other."""
    state = {}
    for part, network in CLASSES.items():
        _, report = network.from_pretrained(directory / part, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), part
        file = directory / part / f"{FILES[part]}.safetensors"
        state |= {f"{part}.{name}": value for name, value in read(file).items()}
    return state


@pytest.mark.parametrize("preset", ["stable_diffusion_lora", "dreambooth_lora"])
def test_what_did_not_learn_is_exported_as_it_was_loaded(plain, tmp_path, preset):
    """The text encoder learns whole beside an adapter on the U-Net, which is not in the exported U-Net."""
    settings = ["model.train_text_encoder=true", "model.text_adapter.rank=0", "model.export_merged=true"]
    module = move(built(plain, *settings, preset=preset))
    module.export(tmp_path)
    before = {name: value for name, value in loaded_whole(plain).items() if not name.startswith("text_encoder.")}
    after = loaded_whole(tmp_path)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    loaded_whole(tmp_path / "merged")

    ours = module.sample(Conditions(captions=PROMPTS), [7, 8], steps=4, guidance=3.0)
    pipeline = reference(tmp_path)
    assert (drawn(pipeline) - ours).abs().max() > 1e-3, "the update does nothing"
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(drawn(pipeline), ours, rtol=0, atol=2e-5)
    torch.testing.assert_close(drawn(reference(tmp_path / "merged")), ours, rtol=0, atol=2e-5)


def test_an_adapter_on_the_text_encoder_alone_leaves_it_as_it_was_loaded(plain, tmp_path):
    settings = ["model.adapter.rank=0", "model.train_text_encoder=true", "model.text_adapter.rank=2"]
    module = move(built(plain, *settings))
    module.export(tmp_path)
    ours = module.sample(Conditions(captions=PROMPTS), [7, 8], steps=4, guidance=3.0)
    loaded_whole(tmp_path)
    pipeline = reference(tmp_path)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(drawn(pipeline), ours, rtol=0, atol=2e-5)


# What is fetched of a repository

LISTING = [
    "README.md", "model_index.json", "v1-5-pruned.safetensors", "scheduler/scheduler_config.json",
    "tokenizer/merges.txt", "tokenizer/vocab.json", "text_encoder/config.json", "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.fp16.bin", "unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    "unet/diffusion_pytorch_model.non_ema.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.bin", "safety_checker/config.json", "safety_checker/model.safetensors",
]  # fmt: skip


def test_of_a_repository_that_is_fetched_which_is_read(plain):
    shards = {f"w{i}": f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    read = {"unet/diffusion_pytorch_model.safetensors.index.json": json.dumps({"weight_map": shards})}
    weights = built(plain).required_weights()[0]
    assert sorted(weights.wanted(LISTING, read.__getitem__)) == [
        "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.fp16.safetensors",
        "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json", "vae/config.json", "vae/diffusion_pytorch_model.bin",
    ]  # fmt: skip
