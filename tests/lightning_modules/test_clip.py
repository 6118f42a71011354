"""CLIP against transformers and closed forms, its guidance against the formula spelt out, and what it refuses."""

import json
import math
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist
from transformers import CLIPModel, CLIPProcessor

from callbacks.retrieval import logged_by
from datamodules.batches import Conditions, ImageBatch, Sample
from jobs.run.config import load_config
from jobs.run.folder import build_data, build_module
from jobs.train import check_support, train
from lightning_modules.base import GenerativeModule
from lightning_modules.maths.contrastive import contrastive_loss, matches, spherical_distance
from lightning_modules.parts.clip import CLIPShapeConfig, load_clip
from lightning_modules.parts.image_prompt import ImageEncoder, load_image_encoder
from medsynth.errors import UserError
from tests.clip_folder import SIDE, write_clip
from tests.conftest import REPOSITORY
from tests.processes import together
from tests.sd_folder import write_pipeline

PRESET = REPOSITORY / "configs/tiny/clip.yaml"
CAPTIONS = ["one polyp", "no polyps", "a green box", "text", "an instrument"]


@pytest.fixture(scope="module")
def folder(once):
    return once("clip-folder", lambda to: write_clip(to / "clip")) / "clip"


@pytest.fixture(scope="module")
def pipelines(once):
    """Stable Diffusions that predict the noise, and v."""

    def make(to):
        for kind in ("epsilon", "v_prediction"):
            write_pipeline(to / kind, prediction=kind)

    return once("clip-generators", make)


def built(*settings: str) -> GenerativeModule:
    module = build_module(load_config([PRESET], ["data.root=none", *settings]))
    module.configure_model()
    return module.eval()


def pictures(count: int = 5, side: int = SIDE) -> Tensor:
    """uint8, at the side that the CLIP takes: others are resized by Pillow there, and by torch here."""
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def batch(captions: list[str], ids: list[int] | None = None, levels: Tensor | None = None) -> ImageBatch:
    rows = len(captions)
    levels = pictures(rows) if levels is None else levels
    ids = list(range(rows)) if ids is None else ids
    seeds = torch.arange(rows)
    return ImageBatch(levels / 255, Conditions(captions), seeds, torch.zeros(rows).bool(), torch.tensor(ids))


def test_the_loss_is_transformers_own_where_nothing_repeats(folder):
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=CAPTIONS, images=list(pictures()), return_tensors="pt", padding=True)
    expected = model(**inputs, return_loss=True)
    module = built(f"model.pretrained={folder}")
    losses = module.losses(batch(CAPTIONS))
    torch.testing.assert_close(losses["loss"], expected.loss, rtol=1e-5, atol=1e-6)
    assert losses["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-3)
    torch.testing.assert_close(module.caption_embeddings(CAPTIONS), expected.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(module.picture_embeddings(pictures() / 255), expected.image_embeds, rtol=0, atol=1e-5)


def test_what_repeats_in_a_batch_is_no_negative():
    """Rows 0 and 2 have one caption, rows 1 and 2 one picture: each of the sums by itself."""
    found = matches(torch.tensor([7, 8, 7, 9]), torch.tensor([1, 2, 2, 3]))
    positives = [[0, 2], [1, 2], [0, 1, 2], [3]]
    assert found.int().tolist() == [[int(j in own) for j in range(4)] for own in positives]
    u, v = torch.nn.functional.normalize(torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)), dim=-1)
    scale, total = math.exp(1.5), 0.0
    for i, own in enumerate(positives):
        for rows in (scale * v @ u[i], scale * u @ v[i]):
            total -= sum(rows[j].item() - rows.logsumexp(0).item() for j in own) / len(own)
    loss = contrastive_loss(v, u, torch.tensor(1.5), found)
    assert loss.item() == pytest.approx(total / 8, rel=1e-5)


def test_rows_without_words_and_padding_are_left_out(folder):
    module = built(f"model.pretrained={folder}")
    whole, levels = module.losses(batch(CAPTIONS[:3]))["loss"], pictures(5)
    with_empty = batch([*CAPTIONS[:3], "", CAPTIONS[4]], levels=torch.cat([pictures(3), levels[3:]]))
    with_empty.seeds[4] = -1
    torch.testing.assert_close(module.losses(with_empty)["loss"], whole, rtol=1e-6, atol=1e-7)
    nothing = module.losses(batch(["", ""]))["loss"]
    nothing.backward()
    assert nothing == 0
    assert all(p.grad is not None and not p.grad.any() for p in module.clip.parameters())


def gradients(module: GenerativeModule) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.clip.named_parameters() if p.requires_grad}


REPEATED = ["one polyp", "", "no polyps", "one polyp", "text"]  # the picture of 2 is that of 4
IDS = [0, 1, 2, 3, 2]


def of_one_process(rank: int, folder, out) -> None:
    """Three rows in the first, two in the second: gradients are averaged, as ddp does."""
    dist.init_process_group("gloo")
    module = built(f"model.pretrained={folder}")
    assert module.losses(batch(["", ""]))["loss"] == 0, "neither has a row"
    rows = [[0, 1, 2], [3, 4]][rank]
    loss = module.losses(batch(REPEATED, IDS)[rows])["loss"]
    loss.backward()
    for gradient in gradients(module).values():
        dist.all_reduce(gradient)
        gradient /= 2
    torch.save({"loss": loss.detach(), **gradients(module)}, out / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradient_of_one(folder, tmp_path):
    together(2, of_one_process, folder, tmp_path, log=tmp_path / "log")
    module = built(f"model.pretrained={folder}")
    loss = module.losses(batch(REPEATED, IDS))["loss"]
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found.pop("loss"), loss.detach(), rtol=0, atol=1e-6)
        for name, gradient in gradients(module).items():
            exact = 1e-6 * gradient.abs().max().item() + 1e-7
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=exact, msg=name)


def learned(_, phantom, run: str, *settings: str) -> None:
    places = [f"data.root={phantom}", f"run_dir={run}", f"tracking.uri=sqlite:///{run}.db", "data.validation_images=3"]
    places += ["train.max_steps=3", "train.validate_every_steps=3", "evaluation.images=0", "evaluation.grid=0"]
    train(load_config([PRESET], [*places, "checkpoint.monitor=val/loss", "model.optim.eps=1e-4", *settings]))


def test_two_processes_learn_and_validate_as_one(phantom, here):
    """Under ddp, where the processes' last batches of validation are of different sizes, and one is padding."""
    learned(0, phantom, "one")
    ddp = ["hardware.devices=2", "hardware.strategy=ddp", "train.device_batch_size=2"]
    together(2, learned, phantom, "two", *ddp, log=here / "log")
    one, two = (load_file(f"{run}/checkpoints/last.ckpt/weights.safetensors") for run in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
    scores = [logged(here / run) for run in ("one", "two")]
    names = logged_by(build_module(load_config([PRESET], ["data.root=none"])))
    assert [scores[1][name] for name in names] == [scores[0][name] for name in names]
    assert scores[1]["val/loss"] == pytest.approx(scores[0]["val/loss"], rel=1e-4)


def logged(run: Path) -> dict[str, float]:
    events = [json.loads(line) for line in (run / "tracking/events.jsonl").read_text().splitlines()]
    return {name: value for event in events for name, value in event.get("values", {}).items()}


@pytest.mark.parametrize(("start", "end"), [(9.0, math.log(100)), (-3.0, 0.0)])
def test_the_logit_scale_stays_in_its_range(phantom, start, end):
    config = load_config([PRESET], [f"data.root={phantom}"])
    module = build_module(config)
    module.configure_model()
    torch.nn.init.constant_(module.clip.network.logit_scale, start)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=build_data(config, module)[0])
    assert module.clip.network.logit_scale.item() == pytest.approx(end)


def test_an_update_alone_learns(folder):
    module = built(f"model.pretrained={folder}", "model.adapter.rank=2")
    module.losses(batch(CAPTIONS))["loss"].backward()
    assert gradients(module) and all("lora" in name for name in gradients(module))
    assert all(p.grad is None for p in module.generator.parameters())


@pytest.mark.parametrize("rank", [0, 2])
def test_activations_that_are_computed_again_give_the_same_gradient(rank, folder):
    found = []
    for again in ("false", "true"):
        torch.manual_seed(0)  # of an update, which learns from nothing
        module = built(
            f"model.pretrained={folder}", f"model.adapter.rank={rank}", f"model.gradient_checkpointing={again}"
        )
        module.train()
        assert module.clip.network.is_gradient_checkpointing == (again == "true")
        module.losses(batch(CAPTIONS))["loss"].backward()
        found.append(gradients(module))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
    assert any(gradient.any() for gradient in found[0].values())


# Drawing


def test_the_distance_is_half_the_square_of_the_angle():
    angles = torch.tensor([0.1, 1.0, 3.0])
    x, y = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(spherical_distance(x, y), angles.square() / 2, rtol=1e-5, atol=1e-6)
    opposite = torch.tensor([-1.0, 0.0], requires_grad=True)
    spherical_distance(opposite, y).backward()
    assert opposite.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_guided_noise_is_that_of_the_formula(kind, folder, pipelines):
    """In one picture at a time, spelt out with the pipeline's own networks."""
    module = built(f"model.pretrained={folder}", f"model.generator={pipelines / kind}", "model.cutouts=0",
                   "model.guidance_scale=7")  # fmt: skip
    generator, captions = module.generator, CAPTIONS[:2]
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([900, 300])
    context = generator.guided_context(Conditions(captions), 3.0)
    with generator.led(module._distance_to(captions, [1, 2])):
        found = generator.denoise(z, t, context, None, 3.0)
    for i in range(2):
        a = generator.alpha_bar[t[i]]
        z_i = z[i : i + 1].clone().requires_grad_()
        words = context.embeddings[[i, 2 + i]]
        outputs = [generator.unet(z_i, t[i], encoder_hidden_states=w[None]).sample for w in words]
        if kind == "v_prediction":
            outputs = [a.sqrt() * v + (1 - a).sqrt() * z_i for v in outputs]
        x_0 = (z_i - (1 - a).sqrt() * outputs[1]) / a.sqrt()
        s = (1 - a).sqrt() * x_0 + (1 - (1 - a).sqrt()) * z_i
        picture = (generator.vae.decode(s / 0.18215).sample / 2 + 0.5).clamp(0, 1)
        x, y = module.picture_embeddings(picture), module.caption_embeddings(captions[i : i + 1]).detach()
        loss = 7 * 2 * torch.arcsin((x - y).norm() / 2) ** 2
        noise = outputs[0] + 3 * (outputs[1] - outputs[0]) + (1 - a).sqrt() * torch.autograd.grad(loss, z_i)[0]
        if kind == "v_prediction":
            noise = (noise - (1 - a).sqrt() * z_i) / a.sqrt()
        torch.testing.assert_close(found.model_output[i : i + 1], noise.detach(), rtol=1e-4, atol=1e-5)


def test_guidance_leads_nearer_to_the_prompt_and_none_is_the_plain_generator(folder, pipelines):
    settings = [f"model.pretrained={folder}", f"model.generator={pipelines / 'epsilon'}", "model.cutouts=0",
                "model.sampler.steps=6"]  # fmt: skip
    module, asked, seeds = built(*settings), Conditions([*CAPTIONS[:3], ""]), [1, 2, 3, 4]
    led = module.sample(asked, seeds)
    plain = module.generator.sample(asked, seeds)
    targets = module.caption_embeddings(CAPTIONS[:3])
    distances = [spherical_distance(module.picture_embeddings(drawn[:3]), targets) for drawn in (led, plain)]
    assert (distances[0] < distances[1]).all(), distances
    assert torch.equal(led[3], plain[3]), "nothing was asked for"
    unled = built(*settings, "model.guidance_scale=0")
    assert torch.equal(unled.sample(asked, seeds), plain)


def test_pictures_are_the_same_in_inference_mode(folder):
    module, asked = built(f"model.pretrained={folder}"), Conditions(CAPTIONS[:2])
    outside = module.sample(asked, [1, 2])
    with torch.inference_mode():
        assert torch.equal(module.sample(asked, [1, 2]), outside)


def test_mixed_precision_draws_and_learns(phantom, here):
    """The generator in bfloat16; evaluation in inference mode under autocast, which keeps cast weights."""
    settings = [f"data.root={phantom}", "run_dir=run", "hardware.precision=bf16-mixed", "evaluation.images=0",
                "checkpoint.monitor=val/text_to_image_recall_1", "checkpoint.mode=max", "data.validation_images=2",
                "evaluation.grid=2"]  # fmt: skip
    module = train(load_config([PRESET], settings)).lightning_module
    assert {p.dtype for p in module.generator.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.clip.parameters()} == {torch.float32}
    values = logged(here / "run")
    assert all(0 <= values[name] <= 1 for name in logged_by(module))
    assert list((here / "run/grids").glob("*.png"))


# What is exported


@pytest.mark.parametrize("kind", ["whole", "lora", "dora", "rslora"])
def test_the_export_embeds_alike_in_transformers(kind, folder, tmp_path):
    update = [] if kind == "whole" else ["model.adapter.rank=2", f"model.adapter.kind={kind}", "model.adapter.alpha=3"]
    module = built(f"model.pretrained={folder}", *update)
    with torch.no_grad():
        for p in module.clip.parameters():
            if p.requires_grad and p.ndim:
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    module.export(tmp_path)
    processor = CLIPProcessor.from_pretrained(tmp_path / "clip")
    inputs = processor(text=CAPTIONS, images=list(pictures()), return_tensors="pt", padding=True)
    models = [CLIPModel.from_pretrained(tmp_path / "clip")]
    assert (tmp_path / "adapter").exists() == (kind != "whole")
    if kind != "whole":
        models.append(PeftModel.from_pretrained(CLIPModel.from_pretrained(folder), tmp_path / "adapter"))
    expected = module.caption_embeddings(CAPTIONS), module.picture_embeddings(pictures() / 255)
    untouched = CLIPModel.from_pretrained(folder)(**inputs)
    for model in models:
        found = model.eval()(**inputs)
        torch.testing.assert_close(found.text_embeds, expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.image_embeds, expected[1], rtol=0, atol=1e-5)
        assert not torch.allclose(found.text_embeds, untouched.text_embeds, atol=1e-3)
    again = load_clip(str(tmp_path / "clip"), CLIPShapeConfig(), "model.pretrained")
    torch.testing.assert_close(again.captions(CAPTIONS), expected[0], rtol=0, atol=1e-5)
    image_side = ImageEncoder(*load_image_encoder(str(tmp_path / "clip"), "model.image_encoder"))
    embedded = torch.nn.functional.normalize(image_side(pictures() / 255), dim=-1)
    torch.testing.assert_close(embedded, expected[1], rtol=0, atol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "clip_text_model"}, "is the text side of a CLIP alone; name a whole CLIP"),
        ({"model_type": "bert"}, "is of the kind bert; name a whole CLIP"),
        ({"projection_dim": 13}, "text_projection.weight"),
        ({"eos": 5}, "looks for the end of a text at token 5, and a tokenizer that ends it with"),
    ],
    ids=["half", "bert", "width", "end"],
)
def test_a_folder_of_something_else_is_refused(folder, tmp_path, change, line):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    described = json.loads((other / "config.json").read_text())
    if "eos" in change:
        described["text_config"]["eos_token_id"] = change["eos"]
    else:
        described |= change
    (other / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=line) as refused:
        built(f"model.pretrained={other}")
    assert str(refused.value).startswith(f"model.pretrained: {other}")


def test_a_pipeline_in_the_place_of_a_clip_and_the_reverse(folder, pipelines):
    with pytest.raises(UserError, match="model.pretrained: .*epsilon is a pipeline of diffusers, not a CLIP"):
        built(f"model.pretrained={pipelines / 'epsilon'}")
    with pytest.raises(UserError, match="model.generator: .*model.safetensors is no Stable Diffusion in one file"):
        built(f"model.generator={folder}")
    with pytest.raises(UserError, match="model.generator: .* other noise; set .*model.noise.beta_end=0.012"):
        built(f"model.generator={pipelines / 'epsilon'}", "model.noise.beta_end=0.02")


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("model.noise.zero_terminal_snr=true", "set it to false, or model.guidance_scale=0"),
        ("model.sampler.name=lcm", "no consistency model"),
        ("model.clip.text_heads=3", "must divide text_width=32"),
        ("model.clip.patch_size=99", "exceeds image_size=16"),
    ],
)
def test_values_that_do_not_go_together(setting, line):
    with pytest.raises(UserError, match=line):
        build_module(load_config([PRESET], ["data.root=none", setting]))


def test_accumulation_and_a_batch_of_one_are_refused(phantom):
    config = load_config([PRESET], [f"data.root={phantom}", "train.device_batch_size=2"])
    with pytest.raises(
        UserError, match="clip takes each step over one batch, micro-batches do not add up to it; set 4"
    ):
        check_support(config, build_module(config))
    config = load_config([PRESET], [f"data.root={phantom}", "train.device_batch_size=1", "train.global_batch_size=1"])
    with pytest.raises(UserError, match="train.global_batch_size=1: clip learns by comparing .* set 2 or more"):
        check_support(config, build_module(config))


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        ([("a", 1), ("a", 2), ("", 3)], "all training samples have one caption, 'a': there is nothing to contrast"),
        ([("a", 1), ("b", 1), ("", 3)], "all training samples have one picture: there is nothing to contrast"),
        ([("", 1), ("", 2)], "no training sample has a caption"),
        ([("a", 1), ("a", 2), ("b", 2)], None),
        ([("a", None), ("b", None)], None),
    ],
)
def test_nothing_to_contrast_is_refused(pairs, line):
    samples = [Sample(None, caption, picture_id=identity) for caption, identity in pairs]
    module = build_module(load_config([PRESET], ["data.root=none"]))
    if line is None:
        module.check_samples(iter(samples))
        return
    with pytest.raises(UserError, match=line):
        module.check_samples(iter(samples))


def test_one_caption_for_all_pictures_is_told_before_the_first_step(phantom, here):
    shutil.copytree(phantom, "data")
    table = here / "data/prompt-gt.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join([rows[0], *(f"{row.partition(';')[0]};a polyp" for row in rows[1:])]) + "\n")
    with pytest.raises(UserError, match="all training samples have one caption, 'a polyp'"):
        train(load_config([PRESET], ["data.root=data", "run_dir=run"]))
    assert not (here / "run").exists()
