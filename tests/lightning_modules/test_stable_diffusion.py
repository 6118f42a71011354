"""Stable Diffusion against diffusers on the same small weights: text, loss, pictures, exports; and what is refused."""

import json
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, PriorTransformer, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from torch import Tensor

from datamodules.batches import Conditions, ImageBatch
from datamodules.stream import derive_seed
from jobs.run.config import load_config
from jobs.run.folder import build_module
from jobs.train import train
from lightning_modules.base import GenerativeModule
from lightning_modules.maths.diffusion import SampleRandom
from lightning_modules.parts.adapters import AdapterConfig, attach, merged
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.lightning_modules.moved import move
from tests.sd_folder import write_pipeline

PROMPTS = ["generate an image with 1 polyp.", "a pelvis, 103"]
LORA = ["model.adapter.rank=2"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    return {
        "sd1": write_pipeline(base / "sd1"),
        "sd2": write_pipeline(base / "sd2", prediction="v_prediction", version=2),
    }


def configured(folder, *settings: str):
    path = REPOSITORY / "configs/tiny/stable_diffusion.yaml"
    return load_config([path], [f"model.pretrained={folder}", "data.root=nowhere", *settings])


def built(folder, *settings: str) -> GenerativeModule:
    module = build_module(configured(folder, *settings))
    module.configure_model()
    return module.eval()


def reference(folder) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batch(count: int = 2) -> ImageBatch:
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    seeds = torch.tensor([derive_seed(i) for i in range(count)])
    return ImageBatch(images, Conditions(captions=PROMPTS[:count]), seeds, torch.zeros(count, dtype=torch.bool))


def drawn(pipeline, steps: int = 4, guidance: float = 3.0, seeds=(7, 8), **prompts) -> Tensor:
    """What plain diffusers draws, float32 (n, 3, H, W)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(
        PROMPTS, height=32, width=32, num_inference_steps=steps, guidance_scale=guidance, generator=generators,
        output_type="pt", **prompts,
    ).images  # fmt: skip
    return images.float()


# Against diffusers


@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_text_is_embedded_as_the_pipeline_does(folders, version):
    captions = [*PROMPTS, ""]
    pipeline = reference(folders[version])
    expected, _ = pipeline.encode_prompt(captions, "cpu", 1, False)
    torch.testing.assert_close(built(folders[version]).embed(captions).embeddings, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_that_of_diffusers_training_example(folders, prediction, gamma):
    setting = "null" if gamma is None else gamma
    module = built(folders["sd1"], f"model.prediction={prediction}", f"model.min_snr_gamma={setting}")
    pipeline, rows = reference(folders["sd1"]), batch()
    random = SampleRandom(rows.seeds)
    posterior = pipeline.vae.encode(rows.images * 2 - 1).latent_dist
    z = (posterior.mean + posterior.std * random.normal(4, 8, 8)) * pipeline.vae.config.scaling_factor
    noise, t = random.normal(4, 8, 8), random.integers(1000)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction)
    noisy = scheduler.add_noise(z, noise, t)
    output = pipeline.unet(noisy, t, pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]).sample
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(z, noise, t), "sample": z}[prediction]
    error = F.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3))
    if gamma is not None:
        snr = compute_snr(scheduler, t)
        clipped = snr.clamp(max=gamma)
        error = error * {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction]
    torch.testing.assert_close(module.losses(rows)["loss"], error.mean(), rtol=1e-5, atol=1e-6)


def test_noise_offset_shifts_whole_channels(folders):
    plain, offset = built(folders["sd1"]), built(folders["sd1"], "model.noise_offset=0.1")
    z_0, seeds = torch.randn(2, 4, 8, 8), [1, 2]
    white, shifted = plain.diffuse(z_0, SampleRandom(seeds)), offset.diffuse(z_0, SampleRandom(seeds))
    random = SampleRandom(seeds)
    random.normal(4, 8, 8), random.integers(1000)
    expected = 0.1 * random.normal(4)[:, :, None, None].expand(-1, -1, 8, 8)
    torch.testing.assert_close(shifted.noise - white.noise, expected, rtol=0, atol=1e-6)
    noisy = DDPMScheduler.from_config(offset.scheduler().config).add_noise(z_0, shifted.noise, shifted.t)
    torch.testing.assert_close(shifted.z_t, noisy)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_an_exported_folder_draws_the_same_pictures_in_plain_diffusers(folders, tmp_path, version, sampler):
    module = move(built(folders[version], f"model.sampler.name={sampler}"))
    module.export(tmp_path)
    ours = module.sample(Conditions(captions=PROMPTS), [7, 8], steps=4, guidance=3.0)
    torch.testing.assert_close(ours, drawn(reference(tmp_path)), rtol=0, atol=2e-5)


def test_negative_prompts_draw_the_same_pictures_in_plain_diffusers(folders):
    module, pipeline, away = built(folders["sd1"]), reference(folders["sd1"]), ["blurred, text", ""]
    pipeline.scheduler = module.scheduler()
    ours = module.sample(Conditions(captions=PROMPTS, negatives=away), [7, 8], steps=4, guidance=3.0)
    torch.testing.assert_close(ours, drawn(pipeline, negative_prompt=away), rtol=0, atol=2e-5)
    plain = module.sample(Conditions(captions=PROMPTS), [7, 8], steps=4, guidance=3.0)
    assert (ours[0] - plain[0]).abs().max() > 1e-4
    torch.testing.assert_close(ours[1], plain[1], rtol=0, atol=1e-6)


def test_zero_terminal_snr_draws_the_same_pictures_too(folders, tmp_path):
    module = built(folders["sd2"], "model.noise.zero_terminal_snr=true")
    assert module.alpha_bar[-1] == 0
    assert module.losses(batch())["loss"].isfinite()
    module.export(tmp_path)
    ours = module.sample(Conditions(captions=PROMPTS), [7, 8], steps=4, guidance=3.0)
    torch.testing.assert_close(ours, drawn(reference(tmp_path)), rtol=0, atol=2e-5)


def test_what_is_frozen_is_exported_as_it_was_loaded(folders, tmp_path):
    module = built(folders["sd1"])
    for parameter in module.vae.parameters():
        parameter.data = parameter.data.bfloat16()  # as mixed precision holds it
    module.export(tmp_path)
    before, after = reference(folders["sd1"]), reference(tmp_path)
    for part in ("vae", "text_encoder"):
        for name, value in getattr(before, part).state_dict().items():
            assert torch.equal(value, getattr(after, part).state_dict()[name]), name


# Adapters


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_an_exported_adapter_draws_the_same_pictures_in_plain_diffusers(folders, tmp_path, kind):
    settings = [*LORA, f"model.adapter.kind={kind}", "model.adapter.alpha=3", "model.export_merged=true"]
    settings += ["model.train_text_encoder=true", "model.text_adapter.rank=2", f"model.text_adapter.kind={kind}"]
    module = move(built(folders["sd1"], *settings))
    module.export(tmp_path)
    ours = module.sample(Conditions(captions=PROMPTS), [7, 8], steps=4, guidance=3.0)
    untouched = built(folders["sd1"]).sample(Conditions(captions=PROMPTS), [7, 8], steps=4, guidance=3.0)
    assert (ours - untouched).abs().max() > 1e-3, "the update does nothing"

    pipeline = reference(folders["sd1"])
    pipeline.scheduler = module.scheduler()
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(drawn(pipeline), ours, rtol=0, atol=2e-5)
    merged = reference(tmp_path / "merged")
    assert not [name for name, _ in merged.unet.named_parameters() if "lora" in name]
    torch.testing.assert_close(drawn(merged), ours, rtol=0, atol=2e-5)


def test_a_fresh_adapter_changes_nothing_and_learns_alone(folders):
    module = built(folders["sd1"], *LORA)
    torch.testing.assert_close(module.losses(batch())["loss"], built(folders["sd1"]).losses(batch())["loss"])
    learning = [name for name, p in module.named_parameters() if p.requires_grad]
    assert learning
    assert all("lora_" in name for name in learning)
    # Each adapted matrix (out, in) has rank · (in + out) weights.
    layers = [m for name, m in module.unet.named_modules() if name.endswith("base_layer")]
    assert len(layers) == 4 * 2 * 4  # q, k, v, out of self- and cross-attention in four transformer blocks
    expected = sum(2 * (layer.in_features + layer.out_features) for layer in layers)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == expected


def test_adapters_go_on_other_networks_too():
    """A diffusion prior: the update merged into a plain copy gives the adapted network's output."""
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_layers": 1,
        "embedding_dim": 8,
        "num_embeddings": 4,
    }
    torch.manual_seed(0)
    plain, adapted = PriorTransformer(**shape), PriorTransformer(**shape)
    adapted.load_state_dict(plain.state_dict())
    config = AdapterConfig(rank=2, alpha=3.0)
    attach(adapted, config, "model.adapter")
    assert [name for name, p in adapted.named_parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    inputs = {
        "hidden_states": torch.randn(2, 8),
        "timestep": torch.tensor([1, 900]),
        "proj_embedding": torch.randn(2, 8),
    }
    inputs["encoder_hidden_states"] = torch.randn(2, 4, 8)
    with torch.no_grad():
        before = plain(**inputs).predicted_image_embedding
        expected = adapted.eval()(**inputs).predicted_image_embedding
        whole = merged(plain, adapted, config).eval()(**inputs).predicted_image_embedding
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(whole, expected)


def test_an_adapter_of_no_layer_is_refused_with_the_layers_there_are(folders):
    with pytest.raises(UserError, match=r"model\.adapter\.targets=.*to_query.*to_q"):
        built(folders["sd1"], *LORA, "model.adapter.targets=[to_query]")


# The text encoder


def test_the_text_encoder_learns_if_asked(folders):
    module = built(folders["sd1"], "model.train_text_encoder=true")
    module.losses(batch())["loss"].backward()
    assert module.text_encoder.model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert module.text_digest() is None


def test_a_long_prompt_is_cut_with_a_warning_or_fills_more_windows(folders):
    long = "a b c d e f g h i j " * 12
    module = built(folders["sd1"])
    with pytest.warns(UserWarning, match="cut to 77 tokens"):
        cut = module.embed([long]).embeddings
    assert cut.shape == (1, 77, 16)
    torch.testing.assert_close(cut, reference(folders["sd1"]).encode_prompt([long], "cpu", 1, False)[0])

    windows = built(folders["sd1"], "model.prompt_chunks=2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embeddings = windows.embed([long]).embeddings
    assert embeddings.shape == (1, 154, 16)
    letters = long.split()
    for i, half in enumerate((letters[:75], letters[75:])):
        expected = reference(folders["sd1"]).encode_prompt([" ".join(half)], "cpu", 1, False)[0]
        torch.testing.assert_close(embeddings[:, i * 77 : (i + 1) * 77], expected, rtol=0, atol=1e-6)
    assert windows.sample(Conditions(captions=[long]), [1], steps=2).isfinite().all()


# Precision


def test_mixed_precision_holds_what_is_frozen_in_half_and_what_learns_in_float32(phantom, here):
    path = REPOSITORY / "configs/tiny/stable_diffusion_lora.yaml"
    config = load_config([path], [f"data.root={phantom}", "run_dir=run", "hardware.precision=bf16-mixed"])
    module = train(config).lightning_module
    dtypes = {p.requires_grad: {q.dtype for q in module.parameters() if q.requires_grad == p.requires_grad}
              for p in module.parameters()}  # fmt: skip
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


def test_gradient_checkpointing_changes_no_gradient(folders):
    gradients = []
    for setting in ("true", "false"):
        module = built(folders["sd1"], f"model.gradient_checkpointing={setting}").train()
        module.losses(batch())["loss"].backward()
        gradients.append(module.unet.conv_in.weight.grad)
    assert module.unet.is_gradient_checkpointing is False
    torch.testing.assert_close(*gradients)


# What is refused


@pytest.mark.parametrize(
    ("described", "mend"),
    [
        ({"beta_schedule": "linear"}, "was trained with other noise; set .*model.noise.schedule=linear"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "was trained with other noise; set .*model.noise.schedule=cosine"),
        ({"rescale_betas_zero_snr": True}, "was trained with other noise; set .*model.noise.zero_terminal_snr=true"),
        ({"num_train_timesteps": 500}, "was trained with other noise; set model.noise.steps=500"),
        ({"trained_betas": [0.01] * 1000}, "was trained with betas of its own, which model.noise cannot say"),
    ],
)
def test_a_folder_of_other_noise_is_refused_whatever_it_was_made_from(folders, tmp_path, described, mend):
    folder = tmp_path / "pipeline"
    shutil.copytree(folders["sd1"], folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | described))
    with pytest.raises(UserError, match=mend):
        built(folder)


def test_what_was_exported_with_zero_terminal_snr_is_trained_on_with_it_alone(folders, tmp_path):
    settings = ["model.noise.zero_terminal_snr=true", "model.prediction=v_prediction"]
    built(folders["sd1"], *settings).export(tmp_path / "export")
    built(tmp_path / "export", *settings)
    with pytest.raises(UserError, match="set .*model.noise.zero_terminal_snr=true"):
        built(tmp_path / "export", "model.prediction=v_prediction")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.pretrained=nobody/nothing"], "model.pretrained: nobody/nothing is not on this machine"),
        (["model.resolution=36", "data.resolution=36"], r"model\.resolution=36: must be a multiple of 8, .* 32"),
        (["model.resolution=64"], r"model\.resolution=64 and data\.resolution=32 must be the same"),
        (["model.noise.beta_end=0.02"], "trained with other noise; set .* model.noise.beta_end=0.012"),
        (["model.noise.zero_terminal_snr=true"], "set model.prediction=v_prediction"),
        (["model.prediction=noise"], "use one of epsilon, v_prediction, sample"),
        (["model.adapter.kind=lokr"], "use one of lora, dora, rslora"),
        (["model.text_adapter.rank=4"], "set model.train_text_encoder=true"),
    ],
)
def test_one_clear_line_for_what_cannot_be(folders, settings, message):
    with pytest.raises(UserError, match=message):
        built(folders["sd1"], *settings)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_without_a_part_is_named(folders, tmp_path, part):
    broken = shutil.copytree(folders["sd1"], tmp_path / "broken")
    shutil.rmtree(broken / part)
    with pytest.raises(UserError, match=f"{broken} has no folder {part}"):
        built(broken)


def test_a_damaged_or_strange_part_is_named(folders, tmp_path):
    broken = shutil.copytree(folders["sd1"], tmp_path / "broken")
    weights = broken / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"model.pretrained: {broken}/unet cannot be loaded"):
        built(broken)
    shutil.rmtree(broken / "unet")
    shutil.copytree(folders["sd2"] / "unet", broken / "unet")
    with pytest.raises(UserError, match="text embeddings of width 16, its U-Net takes 24"):
        built(broken)


def test_the_folder_says_what_its_u_net_predicts(folders):
    assert built(folders["sd2"]).prediction == "v_prediction"
    assert built(folders["sd2"], "model.prediction=epsilon").prediction == "epsilon"
    assert json.loads((folders["sd2"] / "scheduler/scheduler_config.json").read_text())["prediction_type"] != "epsilon"
