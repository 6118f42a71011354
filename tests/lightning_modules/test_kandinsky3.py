"""Kandinsky 3 against diffusers on the same small weights: text, loss, each step, pictures, exports; and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, Kandinsky3Pipeline
from diffusers.training_utils import compute_snr
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from datamodules.batches import Conditions, ImageBatch
from datamodules.stream import derive_seed
from jobs.run.config import load_config
from jobs.run.folder import build_module
from lightning_modules.base import GenerativeModule, count_parameters
from lightning_modules.maths.diffusion import SampleRandom
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.kandinsky3_folder import write_kandinsky3
from tests.kandinsky22_folders import write_decoder, write_prior
from tests.lightning_modules.moved import move

LONG = "generate an image with " + "polyps and " * 20
PROMPTS = ["a polyp", "generate an image with 1 polyp of size <5mm.", LONG]  # 9, 46 and 128 tokens
CONDITIONS = Conditions(captions=PROMPTS)
SEEDS = [7, 8, 9]
SCHEDULER = "scheduler/scheduler_config.json"
STEPS, GUIDANCE = 3, 3.0  # of the tiny preset, of `built`


def changed(folder: Path, to: Path, file: str, **said) -> Path:
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | said), encoding="utf-8")
    return to


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_kandinsky3(tmp_path_factory.mktemp("kandinsky3") / "pipeline")


@pytest.fixture(scope="session")
def gentle(folder, tmp_path_factory) -> Path:
    """The same with noise that leaves a signal. The last of the cosine betas multiplies rounding by 20,000, so that of
    three steps no two ways to add up the same numbers draw the same picture; its steps are compared each by itself."""
    to = tmp_path_factory.mktemp("kandinsky3") / "gentle"
    return changed(folder, to, SCHEDULER, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


GENTLE = [f"model.noise.{key}" for key in ("schedule=scaled_linear", "beta_start=0.00085", "beta_end=0.012")]


@pytest.fixture(scope="module")
def pipeline(folder) -> Kandinsky3Pipeline:
    return loaded(folder)


def loaded(folder: Path) -> Kandinsky3Pipeline:
    pipeline = Kandinsky3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def built(folder, *settings: str) -> GenerativeModule:
    told = [
        f"model.pretrained={folder}",
        "data.root=nowhere",
        f"model.sampler.steps={STEPS}",
        "model.sampler.guidance=3",
    ]
    config = load_config([REPOSITORY / "configs/tiny/kandinsky3_whole.yaml"], [*told, *settings])
    module = build_module(config)
    module.configure_model()
    return module.eval()


def drawn(pipeline, prompts=PROMPTS, seeds=SEEDS, guidance: float = GUIDANCE, **options) -> Tensor:
    """What plain diffusers draws, a prompt at a time, float32 (n, 3, H, W); `guidance` is ours, one more than its own.

    Its latents have an eighth of the height; here they have half.
    """
    pictures = [
        pipeline(
            prompt, num_inference_steps=STEPS, guidance_scale=guidance - 1, height=128, width=128,
            generator=torch.Generator().manual_seed(seed), output_type=options.pop("output_type", "np"), **options,
        ).images
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]  # fmt: skip
    return torch.cat([torch.as_tensor(picture).permute(0, 3, 1, 2) for picture in pictures])


def batch() -> ImageBatch:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return ImageBatch(images, CONDITIONS, torch.tensor([derive_seed(i) for i in range(3)]), torch.zeros(3).bool())


# Against diffusers


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_each_picture_of_a_batch_is_that_of_its_prompt_alone(gentle, guidance):
    """Prompts of different lengths together, against the pipeline that is given one at a time."""
    module, pipeline = built(gentle, *GENTLE), loaded(gentle)
    pipeline.scheduler = module.scheduler()
    expected = drawn(pipeline, guidance=guidance)
    ours = module.sample(CONDITIONS, SEEDS, guidance=guidance)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    together = pipeline(
        PROMPTS[:2], num_inference_steps=STEPS, guidance_scale=guidance - 1, height=128, width=128, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS[:2]],
    ).images  # fmt: skip
    alone = expected[:2].permute(0, 2, 3, 1)
    assert (torch.from_numpy(together) - alone)[0].abs().max() > 1e-3, "the pipeline's pictures depend on their batch"


def test_text_is_embedded_as_the_pipeline_does(folder, pipeline):
    module = built(folder)
    with pytest.warns(UserWarning, match="cut to 128 tokens: 'generate an image"):
        context = module.embed([*PROMPTS, ""])
    assert context.mask.sum(1).tolist() == [9, 46, 128, 0]
    for prompt, embeddings, mask in zip(PROMPTS, context.embeddings, context.mask, strict=False):
        expected, _, attended, _ = pipeline.encode_prompt(prompt, False, _cut_context=True)
        real = attended[0].bool()
        torch.testing.assert_close(embeddings[mask], expected[0][real], rtol=0, atol=1e-6)
        assert not expected[0][~real].any() and not embeddings[~mask].any()
    _, nothing, _, mask = pipeline.encode_prompt("a polyp", True, _cut_context=True)
    assert not nothing.any() and not mask.any() and not context.embeddings[3].any(), "no words are zeros"


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_that_of_the_pipelines_networks(folder, pipeline, gamma):
    """Noised by diffusers' scheduler, each prompt by itself."""
    module = built(folder, f"model.min_snr_gamma={'null' if gamma is None else gamma}")
    rows = batch()
    random = SampleRandom(rows.seeds)
    latents = pipeline.movq.encode(rows.images * 2 - 1).latents
    random.normal(4, 16, 16)  # the posterior's, of an encoder that has no spread
    noise, t = random.normal(4, 16, 16), random.integers(1000)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noisy = scheduler.add_noise(latents, noise, t)
    torch.testing.assert_close(module.diffuse(latents, _again(rows)).z_t, noisy, rtol=0, atol=1e-5)
    errors = []
    for i, prompt in enumerate(PROMPTS):
        text, _, mask, _ = pipeline.encode_prompt(prompt, False, _cut_context=True)
        output = pipeline.unet(noisy[[i]], t[[i]], encoder_hidden_states=text, encoder_attention_mask=mask).sample
        errors.append((output - noise[[i]]).square().mean())
    error = torch.stack(errors)
    if gamma is not None:
        snr = compute_snr(scheduler, t)
        error = error * snr.clamp(max=gamma) / snr
    torch.testing.assert_close(module.losses(rows)["loss"], error.mean(), rtol=1e-5, atol=1e-6)


def _again(rows: ImageBatch) -> SampleRandom:
    random = SampleRandom(rows.seeds)
    random.normal(4, 16, 16)
    return random


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_each_step_of_a_row_is_the_pipelines(folder, sampler, tmp_path):
    module = built(folder, f"model.sampler.name={sampler}", "model.sampler.steps=5")
    pipeline = loaded(folder)
    scheduler = module.scheduler()
    scheduler.save_pretrained(tmp_path)
    pipeline.scheduler = type(scheduler).from_pretrained(tmp_path)
    if sampler == "ddpm":
        assert (scheduler.config.variance_type, scheduler.config.clip_sample_range) == ("fixed_large", 2.0)
    ours, denoise = [], module.denoise
    module.denoise = lambda z_t, *rest: ours.append(z_t) or denoise(z_t, *rest)
    conditions = Conditions(captions=PROMPTS[:2])
    ours.append(module.draw(module.guided_context(conditions), SEEDS[:2]))
    theirs: list[Tensor] = []

    def keep(pipeline, i, t, kept):
        theirs.append(kept["latents"])
        return {"latents": ours[i + 1][1:]}  # so that each step is compared by itself

    pipeline(
        PROMPTS[1], num_inference_steps=5, guidance_scale=GUIDANCE - 1, height=128, width=128, output_type="latent",
        generator=torch.Generator().manual_seed(SEEDS[1]), callback_on_step_end=keep,
    )  # fmt: skip
    assert len(theirs) == 5
    for t, z, expected in zip(pipeline.scheduler.timesteps, ours[1:], theirs, strict=True):
        scale = max(1, expected.abs().max().item())  # where z_0 has no bounds, the noisiest step makes it large
        torch.testing.assert_close(
            z[1:], expected, rtol=0, atol=2e-5 * scale, msg=lambda text, t=t: f"step {t}: {text}"
        )


# Exports


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_an_exported_update_draws_the_same_pictures_in_plain_diffusers(gentle, tmp_path, kind):
    settings = [f"model.adapter.{key}" for key in ("rank=2", "alpha=3", f"kind={kind}")]
    module = move(built(gentle, *GENTLE, *settings, "model.export_merged=true"))
    module.export(tmp_path)
    prompts, seeds = PROMPTS[:2], SEEDS[:2]
    ours = module.sample(Conditions(captions=prompts), seeds)
    plain = loaded(gentle)
    plain.scheduler = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert (ours - drawn(plain, prompts, seeds)).abs().max() > 1e-3, "the update does nothing"
    plain.unet = PeftModel.from_pretrained(plain.unet, tmp_path).merge_and_unload()
    torch.testing.assert_close(drawn(plain, prompts, seeds), ours, rtol=0, atol=2e-5)
    whole = loaded(tmp_path / "merged")
    assert not [name for name, _ in whole.unet.named_parameters() if "lora" in name]
    torch.testing.assert_close(drawn(whole, prompts, seeds), ours, rtol=0, atol=2e-5)


def test_a_whole_network_is_exported_as_a_pipeline_beside_what_was_loaded(gentle, tmp_path):
    module = move(built(gentle, *GENTLE))
    module.export(tmp_path)
    whole = loaded(tmp_path)
    ours = module.sample(CONDITIONS, SEEDS)
    torch.testing.assert_close(drawn(whole), ours, rtol=0, atol=2e-5)
    again = built(tmp_path, *GENTLE)
    torch.testing.assert_close(again.sample(CONDITIONS, SEEDS), ours, rtol=0, atol=1e-5)
    assert (again.encoder_digest(), again.text_digest()) == (module.encoder_digest(), module.text_digest())


def test_pickles_are_exported_as_safetensors(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "pickled")
    for part, name in (("movq", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = source / part / f"{name}.safetensors"
        torch.save(
            load_file(file),
            source / part / f"{name.replace('model', 'model') if part == 'movq' else 'pytorch_model'}.bin",
        )
        file.unlink()
    built(source).export(tmp_path / "export")
    assert not list((tmp_path / "export").rglob("*.bin"))
    exported, plain = loaded(tmp_path / "export"), loaded(folder)
    for part in ("movq", "text_encoder"):
        ours = getattr(exported, part).state_dict()
        assert all(torch.equal(value, ours[name]) for name, value in getattr(plain, part).state_dict().items())


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(folder):
    gradients, kept = [], []
    for setting in ("true", "false"):
        module = built(folder, f"model.gradient_checkpointing={setting}").train()
        bytes_kept: dict[int, int] = {}

        def note(tensor, bytes_kept=bytes_kept):
            bytes_kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = module.losses(batch())["loss"]
        kept.append(sum(bytes_kept.values()))
        loss.backward()
        gradients.append({name: p.grad for name, p in module.unet.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, msg=name)
    assert kept[0] < 0.7 * kept[1]


# Sizes and types


def test_the_published_networks_have_the_published_sizes():
    """And under mixed precision what is held is at most 1.2 times all weights in bfloat16."""
    config = load_config([REPOSITORY / "configs/kandinsky3.yaml"], ["model.pretrained=random"])
    module = build_module(config)
    module.frozen_dtype = torch.bfloat16
    with torch.device("meta"):
        module.configure_model()
    assert round(count_parameters(module)[0] / 1e6, 2) == 53.48
    networks = [module.unet, module.movq, module.text_encoder.model]
    sizes = [sum(p.numel() for name, p in network.named_parameters() if "lora_" not in name) for network in networks]
    assert [round(size / 1e6, 1) for size in sizes] == [3055.3, 270.7, 8721.8]
    held = sum(p.numel() * p.element_size() for p in module.parameters())
    assert held <= 1.2 * 2 * sum(sizes)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16])
def test_what_is_frozen_is_loaded_in_the_type_that_it_is_held_in(folder, held, kind):
    """The U-Net under an update too; T5, which float16 overflows, is bfloat16 then."""
    config = load_config(
        [REPOSITORY / "configs/tiny/kandinsky3.yaml"],
        [f"model.pretrained={folder}", "data.root=nowhere", f"model.adapter.kind={kind}"],
    )
    module = build_module(config)
    module.frozen_dtype = held
    module.configure_model()
    types = {
        p.dtype for name, p in module.named_parameters() if not name.startswith("text_encoder") and not p.requires_grad
    }
    assert types == {held}
    assert {p.dtype for p in module.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    rows = batch()
    exact = built(folder).losses(rows)["loss"]
    torch.testing.assert_close(module.losses(rows)["loss"], exact, rtol=0.05, atol=0)
    for name, layer in module.unet.named_modules():
        for vector in getattr(layer, "lora_magnitude_vector", {}).values():
            lengths = layer.get_base_layer().weight.float().norm(dim=1)
            torch.testing.assert_close(vector.weight.data, lengths, msg=name)


# What is refused


@pytest.mark.parametrize(
    ("file", "said", "message"),
    [
        (SCHEDULER, {"prediction_type": "sample"}, "says prediction_type=sample, not epsilon"),
        (SCHEDULER, {"beta_schedule": "linear"}, "was trained with other noise; set .*model.noise.schedule=linear"),
        (SCHEDULER, {"variance_type": "learned_range"}, "variance_type=learned_range: the U-Net predicts the noise"),
        ("text_encoder/config.json", {"d_model": 24}, "has d_model=24, the U-Net encoder_hid_dim=16"),
        ("text_encoder/config.json", {"model_type": "clip"}, "is of the kind clip, not T5's"),
        ("unet/config.json", {"_class_name": "VQModel"}, "is a VQModel, not a Kandinsky3UNet"),
        ("unet/config.json", {"in_channels": 8}, "has in_channels=8, latents have 4 channels"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_what_the_method_takes(folder, tmp_path, file, said, message):
    with pytest.raises(UserError, match=message) as refused:
        built(changed(folder, tmp_path / "other", file, **said))
    assert str(refused.value).startswith("model.pretrained: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("write", [write_prior, write_decoder])
def test_a_folder_of_kandinsky_22_is_named(tmp_path, write):
    with pytest.raises(UserError, match=r"^model\.pretrained: .* is a stage of Kandinsky 2.2: name a Kandinsky 3, as "):
        built(write(tmp_path / "other"))


def test_an_absent_tokenizer_is_named(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    for file in (broken / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(UserError, match=r"^model\.pretrained: .*/tokenizer has no words: copy or fetch its spiece"):
        built(broken)
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(UserError, match="has no folder tokenizer; it must be a pipeline of Kandinsky 3"):
        built(broken)


def test_an_export_of_an_update_alone_names_what_to_take(folder, tmp_path):
    built(folder, "model.adapter.rank=2").export(tmp_path / "run/export")
    with pytest.raises(UserError, match=r"is a low-rank update alone; name that run's export/merged"):
        built(tmp_path / "run/export")
    with pytest.raises(UserError, match=r"is a run; name its export, .*run/export"):
        built(tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.sampler.name=lcm", "^model.sampler.name=lcm: Kandinsky 3 is no consistency model"),
        ("model.noise.zero_terminal_snr=true", "^model.noise.zero_terminal_snr: Kandinsky 3 was trained without"),
        ("model.adapter={rank: 2, targets: [q]}", r"^model\.adapter\.targets=.*to_q"),
    ],
)
def test_one_clear_line_for_what_cannot_be(folder, setting, message):
    with pytest.raises(UserError, match=message):
        built(folder, setting)


def test_sides_that_the_pipeline_does_not_make(folder):
    with pytest.raises(UserError, match=r"^model\.resolution=24: must be a multiple of 16"):
        built(folder, "model.resolution=24", "data.resolution=24")
    with pytest.raises(UserError, match="negative prompts need a method that leads away from words"):
        built(folder).sample(Conditions(captions=PROMPTS, negatives=PROMPTS), SEEDS)
