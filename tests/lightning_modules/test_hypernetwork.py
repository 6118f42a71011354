"""The hypernetwork against its definition, plain Stable Diffusion and the web UI's own layout."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from datamodules.base import ImageDataModule
from datamodules.batches import Conditions, ImageBatch, collate
from jobs.run.config import load_config
from jobs.run.folder import build_data, build_module
from jobs.train import train
from lightning_modules.hypernetwork import HypernetworkConfig, HypernetworkModule, load_hypernetwork, web_ui_state
from lightning_modules.nets.hypernetwork import ACTIVATIONS, INITIALISATIONS, Hypernetwork
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.sd_folder import write_pipeline

TINY = REPOSITORY / "configs/tiny/hypernetwork.yaml"
BLOOD_CELLS = REPOSITORY.parent / "shared" / "data" / "blood-cells"
PROMPTS = Conditions(captions=["a smear of lymphocytes", "a smear of monocytes"])


def made(*settings: str) -> HypernetworkModule:
    torch.manual_seed(0)
    module = build_module(load_config([TINY], list(settings)))
    module.configure_model()
    for parameter in module.hypernetwork.parameters():
        nn.init.normal_(parameter, std=0.2)  # as initialised it changes a context too little to tell much by
    return module.eval()


def batch() -> ImageBatch:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return ImageBatch(images, PROMPTS, torch.tensor([5, 6]), torch.zeros(2, dtype=torch.bool))


def output(unet: nn.Module, text: Tensor | None = None) -> Tensor:
    """The U-Net's answer to fixed latents, at two steps, with a text of width 24 unless another is given."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 7, 24, generator=generator) if text is None else text
    return unet(z, torch.tensor([10, 700]), encoder_hidden_states=text).sample


class Reference:
    """Attention from its definition: queries of x, keys and values each of its own changed context."""

    def __init__(self, state: dict[str, Tensor], multiplier: float, linears: tuple[int, ...]):
        self.state, self.multiplier, self.linears = state, multiplier, linears

    def changed(self, kind: str, context: Tensor) -> Tensor:
        prefix = f"{context.shape[-1]}.{kind}.linear"
        if f"{prefix}.0.weight" not in self.state:
            return context
        hidden = context
        for position in self.linears:
            if position:
                hidden = hidden.relu()
            hidden = hidden @ self.state[f"{prefix}.{position}.weight"].T + self.state[f"{prefix}.{position}.bias"]
        return context + self.multiplier * hidden

    def __call__(self, attention, x: Tensor, encoder_hidden_states: Tensor | None = None, **_) -> Tensor:
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q = attention.to_q(x)
        k, v = attention.to_k(self.changed("k", context)), attention.to_v(self.changed("v", context))
        q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return attention.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


# The change itself


@pytest.mark.parametrize("multiplier", [1.0, 0.3, -2.0])
def test_the_unet_is_the_one_of_the_definition(multiplier):
    module = made("model.structure=[1,2,1]", "model.dropout=[]")
    module.hypernetwork.set_multiplier(multiplier)
    plain = module.load_unet()
    plain.set_attn_processor(Reference(module.hypernetwork.state_dict(), multiplier, linears=(0, 2)))
    torch.testing.assert_close(output(module.unet), output(plain), rtol=1e-5, atol=1e-6)
    assert (output(module.unet) - output(module.load_unet())).abs().max() > 1e-2


@pytest.mark.parametrize("width", [24, 8, 16])
@pytest.mark.parametrize("kind", ["k", "v"])
def test_each_network_does_its_part(width, kind):
    module = made()
    before = output(module.unet)
    for parameter in module.hypernetwork[str(width)][kind].parameters():
        nn.init.zeros_(parameter)
    assert (output(module.unet) - before).abs().max() > 1e-5


def test_a_multiplier_of_nought_is_plain_stable_diffusion():
    module = made("model.multiplier=0")
    plain = without_hooks()
    assert torch.equal(module.sample(PROMPTS, [1, 2]), plain.sample(PROMPTS, [1, 2]))


def without_hooks() -> HypernetworkModule:
    """The tiny module with its U-Net as it was loaded: plain Stable Diffusion."""
    plain = made()
    plain.unet = plain.load_unet().to(memory_format=torch.channels_last)
    return plain.eval()


def test_sampling_has_the_multiplier_and_training_has_one():
    weak, strong = made("model.multiplier=0.5"), made("model.multiplier=1")
    assert torch.equal(weak.losses(batch())["loss"], strong.losses(batch())["loss"])
    first = weak.sample(PROMPTS, [1, 2])
    assert (first - strong.sample(PROMPTS, [1, 2])).abs().max() > 1e-3
    weak.hypernetwork.set_multiplier(1.0)
    assert torch.equal(weak.losses(batch())["loss"], strong.losses(batch())["loss"])
    assert torch.equal(weak.sample(PROMPTS, [1, 2]), first)


def test_after_a_sample_that_fails_training_has_one_again():
    module = made("model.multiplier=0.5")
    before = module.losses(batch())["loss"]
    with pytest.raises(ValueError, match="scheduler"):
        module.sample(PROMPTS, [1, 2], steps=5000)
    assert torch.equal(module.losses(batch())["loss"], before)


# What learns


def test_only_the_hypernetwork_learns_and_all_of_it():
    module = made().train()
    module.losses(batch())["loss"].backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == name.startswith("hypernetwork."), name
    weights = {name: p.grad for name, p in module.hypernetwork.named_parameters() if name.endswith("weight")}
    assert all(gradient.abs().max() > 0 for gradient in weights.values())
    assert not any("hypernetwork" in name for name in module.unet.state_dict())


def gradients(module: HypernetworkModule) -> list[Tensor]:
    torch.manual_seed(3)  # dropout
    module.losses(batch())["loss"].backward()
    return [parameter.grad for parameter in module.hypernetwork.parameters()]


def test_gradient_checkpointing_changes_no_gradient():
    expected = gradients(made().train())
    found = gradients(made("model.gradient_checkpointing=true").train())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiling_changes_no_gradient_and_keeps_the_multiplier_free():
    plain, compiled = made(), made()
    compiled.compile(backend="eager", fullgraph=True)
    for found, expected in zip(gradients(compiled), gradients(plain), strict=True):
        torch.testing.assert_close(found, expected)
    for module in (plain, compiled):
        module.hypernetwork.set_multiplier(0.5)
    torch.testing.assert_close(compiled.losses(batch())["loss"], plain.losses(batch())["loss"])


def test_a_copy_has_hooks_of_its_own():
    module = made()
    copied, before = copy.deepcopy(module), output(module.unet)
    for parameter in copied.hypernetwork.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(output(module.unet), before)
    torch.testing.assert_close(output(copied.unet), output(module.load_unet()))


def test_the_presets_count_on_sd_1_and_sd_2():
    """4w² + 3w weights for each of two networks of each width, w → 2w → w."""
    for text, left_out in ((768, 1024), (1024, 768)):
        with torch.device("meta"):
            module = build_module(
                load_config(
                    [REPOSITORY / "configs/hypernetwork.yaml"],
                    [
                        "model.pretrained=random",
                        f"model.architecture.text_width={text}",
                        "model.architecture.text_heads=8",
                    ],
                )
            )
            module.configure_model()
        widths = {int(width) for width in module.hypernetwork}
        assert widths == {768, 1024, 320, 640, 1280} - {left_out}
        count = sum(p.numel() for p in module.hypernetwork.parameters())
        assert count == sum(2 * (4 * w * w + 3 * w) for w in widths)


# The networks


def linears(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def test_layers_stand_in_the_web_uis_order():
    network = Hypernetwork([8], [1, 2, 3, 1], "elu", False, True, [0, 0.3, 0, 0])
    kinds = [type(layer).__name__ for layer in network["8"]["k"].linear]
    assert kinds == ["Linear", "ELU", "LayerNorm", "Dropout", "Linear", "ELU", "LayerNorm", "Linear", "LayerNorm"]
    assert [(m.in_features, m.out_features) for m in linears(network["8"]["v"])] == [(8, 16), (16, 24), (24, 8)]
    ended = Hypernetwork([8], [1, 1], "tanh", activate_output=True)
    assert [type(layer).__name__ for layer in ended["8"]["k"].linear] == ["Linear", "Tanh"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    formulas = {
        "linear": lambda x: x,
        "relu": lambda x: x.clamp(min=0),
        "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
        "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
        "swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
        "tanh": lambda x: (1 - (-2 * x).exp()) / (1 + (-2 * x).exp()),
        "sigmoid": lambda x: 1 / (1 + (-x).exp()),
        "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
        "silu": lambda x: x / (1 + (-x).exp()),
        "mish": lambda x: x * (1 + x.exp()).log().tanh(),
    }
    network = Hypernetwork([8], activation=activation)["8"]["k"]
    for layer in linears(network):
        nn.init.normal_(layer.weight)
    x, (first, last) = torch.randn(5, 8), linears(network)
    torch.testing.assert_close(network(x), x + last(formulas[activation](first(x))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_weights_start_at_their_spread(initialisation):
    torch.manual_seed(0)
    network = Hypernetwork([512], [1, 2, 1], "relu", layer_norm=True, initialisation=initialisation)
    first = linears(network)[0]  # 512 -> 1024
    expected = {"normal": 0.01, "xavier": (2 / (512 + 1024)) ** 0.5, "kaiming": (2 / 512) ** 0.5}
    assert abs(first.weight.std() / expected[initialisation.split("_")[0]] - 1) < 0.01
    bounded = first.weight.abs().max() < 1.8 * first.weight.std()
    assert bounded == initialisation.endswith("uniform")
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert abs(module.weight.std() / 0.01 - 1) < 0.2
            assert abs(module.weight.mean()) < 0.002


# Export


def pictures(pipe: StableDiffusionPipeline, module: HypernetworkModule, seeds: list[int]) -> Tensor:
    """What the pipeline draws from the noise that `sample` starts with."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = randn_tensor((len(seeds), *module.latent_shape()), generator=generators)
    config = module.config.sampler
    found = pipe(
        PROMPTS.captions,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        latents=latents,
        generator=generators,
        output_type="pt",
    )
    return found.images


@pytest.fixture(scope="module", params=[1, 2])
def pretrained(request, tmp_path_factory) -> Path:
    """A pipeline folder of Stable Diffusion 1.x, whose text is as wide as its middle level, and of 2.x."""
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "sd", version=request.param)


@pytest.fixture
def exported(pretrained, tmp_path) -> tuple[HypernetworkModule, StableDiffusionPipeline, Path]:
    """A module, the plain pipeline it was made on, and its export."""
    module = made(f"model.pretrained={pretrained}")
    module.export(tmp_path / "export")
    pipe = StableDiffusionPipeline.from_pretrained(pretrained, scheduler=module.scheduler(), safety_checker=None)
    return module, pipe, tmp_path / "export"


def test_plain_diffusers_draws_the_same_pictures(exported):
    module, pipe, folder = exported
    ours, plain = module.sample(PROMPTS, [1, 2]), pictures(pipe, module, [1, 2])
    network = load_hypernetwork(pipe.unet, folder)
    torch.testing.assert_close(pictures(pipe, module, [1, 2]), ours, atol=1e-5, rtol=0)
    assert (plain - ours).abs().max() > 1e-3
    network.set_multiplier(0)
    assert torch.equal(pictures(pipe, module, [1, 2]), plain)


def test_a_loaded_hypernetwork_is_a_frozen_part_of_the_unet(exported):
    _, pipe, folder = exported
    pipe.unet.to(torch.float64)
    network = load_hypernetwork(pipe.unet, folder, multiplier=0.25)
    parameters = list(network.parameters())
    assert not any(p.requires_grad for p in parameters)
    assert {p.dtype for p in parameters} == {torch.float64}
    assert not network.training
    assert {module.multiplier for module in network.modules() if hasattr(module, "multiplier")} == {0.25}
    pipe.unet.to(torch.float32)
    assert {p.dtype for p in parameters} == {torch.float32}


def test_two_hypernetworks_change_the_context_in_turn(exported):
    module, pipe, folder = exported
    text = torch.randn(2, 7, pipe.unet.config.cross_attention_dim)
    for multiplier in (0.5, 2.0):
        load_hypernetwork(pipe.unet, folder, multiplier)
    twice, networks = module.load_unet(), [copy.deepcopy(module.hypernetwork) for _ in range(2)]
    for network, multiplier in zip(networks, (0.5, 2.0), strict=True):
        network.set_multiplier(multiplier)

    def changed(kind):
        def before(layer, inputs):
            first, second = (network[str(layer.in_features)][kind] for network in networks)
            return (second(first(inputs[0])),)

        return before

    for attention in (m for m in twice.modules() if hasattr(m, "to_k")):
        for kind in ("k", "v"):
            getattr(attention, f"to_{kind}").register_forward_pre_hook(changed(kind))
    torch.testing.assert_close(output(pipe.unet, text), output(twice, text))


def web_ui_network(state: dict, width: int, which: int) -> nn.Sequential:
    """The network that the web UI builds from a .pt file, put together from the description of that layout."""
    sizes, layers = [int(width * m) for m in state["layer_structure"]], []
    activation = {"linear": None, "relu": nn.ReLU, "swish": nn.Hardswish}[state["activation_func"]]
    for i in range(len(sizes) - 1):
        layers.append(nn.Linear(sizes[i], sizes[i + 1]))
        if activation and (i < len(sizes) - 2 or state["activate_output"]):
            layers.append(activation())
        if state["is_layer_norm"]:
            layers.append(nn.LayerNorm(sizes[i + 1]))
        if state["dropout_structure"][i + 1] > 0:
            layers.append(nn.Dropout(state["dropout_structure"][i + 1]))
    network = nn.Module()
    network.linear = nn.Sequential(*layers)
    network.load_state_dict(state[width][which])
    return network.linear.eval()


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("model.activation=swish", "model.activate_output=true", "model.layer_norm=true"),
        ("model.structure=[1,2,1]", "model.dropout=[]", "model.activation=linear"),
    ],
)
def test_the_export_becomes_a_web_ui_file(settings, tmp_path):
    module = made(*settings)
    module.export(tmp_path)
    torch.save(web_ui_state(tmp_path, "cells"), tmp_path / "cells.pt")
    state = torch.load(tmp_path / "cells.pt", weights_only=True)
    assert state["name"] == "cells"
    assert state["weight_initialization"] == "Normal"
    assert {key for key in state if isinstance(key, int)} == {24, 8, 16}
    assert state["use_dropout"] == any(state["dropout_structure"])
    for width in (24, 8, 16):
        x = torch.randn(3, width)
        for which, kind in enumerate(("k", "v")):
            own = module.hypernetwork[str(width)][kind]
            torch.testing.assert_close(x + web_ui_network(state, width, which)(x), own(x))


# Mistakes


def test_a_hypernetwork_for_another_unet_is_refused(tmp_path):
    made().export(tmp_path)
    other = made("model.architecture.text_width=32", "model.widths=[32]").load_unet()
    with pytest.raises(UserError, match="contexts of width 24; those of this U-Net are 8, 16, 32"):
        load_hypernetwork(other, tmp_path)


@pytest.mark.parametrize("damage", ["absent", "cut", "misfit", "no json", "no key"])
def test_a_damaged_export_is_refused(damage, tmp_path):
    module, folder = made(), tmp_path / "export"
    module.export(folder)
    weights, config = folder / "hypernetwork.safetensors", folder / "config.json"
    if damage == "absent":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "misfit":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"structure": [1, 3, 1, 1]}))
    else:
        config.write_text("{" if damage == "no json" else "{}")
    with pytest.raises(UserError, match=r"export holds no hypernetwork") as refused:
        load_hypernetwork(module.load_unet(), folder)
    assert "\n" not in str(refused.value)


def test_widths_that_the_unet_has_not_are_refused_when_none_is_left():
    with pytest.raises(UserError, match=r"model.widths=\[768\].* there are 8, 16, 24"):
        made("model.widths=[768]")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": [1, 2]}, "must begin and end with 1"),
        ({"structure": [2, 1]}, "must begin and end with 1"),
        ({"structure": [1, 0.001, 1]}, "a layer of width 768 would be empty"),
        ({"dropout": [0, 0.3]}, "give 3 probabilities below 1"),
        ({"dropout": [0, 0.3, 0.3]}, "0 for the first and the last"),
        ({"dropout": [0.3, 0.3, 0]}, "0 for the first and the last"),
    ],
)
def test_mistakes_in_the_config(settings, message):
    with pytest.raises(UserError) as refused:
        HypernetworkConfig(**settings)
    assert message in str(refused.value)


# Real pictures


@pytest.mark.skipif(not BLOOD_CELLS.is_dir(), reason="needs ../shared/data")
def test_two_passes_over_blood_cells(here):
    (here / "prompts.txt").write_text("a stained smear of [filewords], in the style of [name]\n")
    config = load_config(
        [TINY],
        [
            "data.name=cytology", f"data.root={BLOOD_CELLS}", f"data.template={here / 'prompts.txt'}",
            "data.validation_images=219", "data.balance=false", "run_dir=run", "train.max_steps=null",
            "train.max_epochs=2", "train.validate_every_steps=null", "train.global_batch_size=8",
            "train.device_batch_size=8", "model.optim.lr=0.02", "train.gradient_clip_norm=1.0",
            "evaluation.images=0", "checkpoint.monitor=val/loss", "ema.decay=0",
        ],
    )  # fmt: skip
    torch.manual_seed(0)
    untrained = build_module(config)
    untrained.configure_model()
    data, counts = build_data(config, untrained)
    assert counts["pictures of neutrophil"] == 176
    before = mean_loss(untrained, data)
    trained = train(config).lightning_module
    assert mean_loss(trained, data) < 0.97 * before
    assert list((here / "run/grids").iterdir())
    unet = trained.load_unet()
    load_hypernetwork(unet, here / "run/export", multiplier=1.0)
    torch.testing.assert_close(output(unet), output(trained.eval().unet), rtol=1e-4, atol=1e-5)


def mean_loss(module: HypernetworkModule, data: ImageDataModule) -> float:
    rows = data.validation_set()
    with torch.no_grad():
        return float(module.eval().losses(collate([rows[i] for i in range(64)]))["loss"])
