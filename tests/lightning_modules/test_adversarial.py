"""The family of adversarial methods: loops written out, processes, swaps, exports, faults."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file

from callbacks.ema import EMA, EMAConfig
from datamodules.batches import Conditions
from jobs.drawing.asked import ask
from jobs.drawing.request import Request
from jobs.run.config import load_config
from jobs.run.strategies import Replicated
from jobs.sample import main as sample
from jobs.train import check_support, train
from lightning_modules.families import adversarial as family
from lightning_modules.maths.augmentation import diff_augment
from lightning_modules.maths.diffusion import SampleRandom
from lightning_modules.nets.norms import recomputed_statistics
from lightning_modules.nets.spectral import normalised, without_spectral_norm
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.lightning_modules.adversarial_runs import METHODS, batches, built, fit, part, with_a_nan
from tests.processes import together

EVERY = pytest.mark.parametrize("method", METHODS)
CALM = "model.optim.eps=1e-3"  # Adam divides rounding by rounding where a gradient is nearly nothing


def difference(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    return max(
        float((a - b).abs().max())
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        if a.is_floating_point()
    )


# One step after the other, as each paper's algorithm has it, in plain torch on the same weights


def written_out(method: str, module, given) -> dict[str, float]:
    """Train the networks of `module` by a plain loop; the scalars that it keeps."""
    g, d, config = module.generator.train(), module.discriminator.train(), module.config
    optim, scalars = config.optim, {"k": 0.0, "log_z": 0.0, "p": 0.0 if config.augmentation == "ada" else 1.0}
    settings = {"lr": optim.lr, "eps": optim.eps}
    if optim.name == "rmsprop":
        of_d, of_g = (torch.optim.RMSprop(n.parameters(), alpha=optim.betas[1], **settings) for n in (d, g))
    else:
        rates = (config.discriminator_lr or optim.lr, optim.lr)
        betas = tuple(optim.betas)
        of_d, of_g = (
            torch.optim.Adam(n.parameters(), betas=betas, eps=optim.eps, lr=lr)
            for n, lr in zip((d, g), rates, strict=True)
        )
    critic_steps = {"wgan": [3, 2, 2, 3], "wgan_gp": [2] * 9}.get(method, [1] * 9)
    left = critic_steps.pop(0)
    for batch in given:
        x = batch.images * 2 - 1
        random = SampleRandom(batch.seeds)
        z = random.normal(config.latent) if config.noise == "normal" else random.uniform(config.latent) * 2 - 1
        told = (batch.conditions.labels,) if method == "cell_gan" else ()
        fake = g(z, *told)
        if config.augmentation != "none":
            x, fake = (diff_augment(each, random.uniform(12), p=scalars["p"]) for each in (x, fake))
        real_out, fake_out = d(x, *told), d(fake.detach(), *told)
        if method == "cell_gan":
            loss = F.relu(1 - real_out).mean() + F.relu(1 + fake_out).mean()
        elif method == "began":
            real_out, fake_out = (x - real_out).abs().mean(), (fake.detach() - fake_out).abs().mean()
            loss = real_out - scalars["k"] * fake_out
        elif method in ("wgan", "wgan_gp"):
            loss = fake_out.mean() - real_out.mean()
            if method == "wgan_gp":
                share = random.uniform().view(-1, 1, 1, 1)
                between = (share * x + (1 - share) * fake.detach()).requires_grad_()
                slope = torch.autograd.grad(d(between).sum(), between, create_graph=True)[0]
                loss = loss + 10 * ((slope.square().sum(dim=(1, 2, 3)).sqrt() - 1) ** 2).mean()
        else:
            ones, zeros = torch.ones_like(real_out), torch.zeros_like(real_out)
            loss = F.binary_cross_entropy_with_logits(real_out, ones)
            loss = loss + F.binary_cross_entropy_with_logits(fake_out, zeros)
        of_d.zero_grad()
        loss.backward()
        of_d.step()
        if method == "wgan":
            with torch.no_grad():
                for p in d.parameters():
                    p.clamp_(-config.clip, config.clip)
        left -= 1
        if left == 0:
            left = critic_steps.pop(0)
            judged = d(fake, *told)
            of_g.zero_grad()
            if method == "began":
                (fake - judged).abs().mean().backward()
            elif method == "bgan":
                (0.5 * ((judged - scalars["log_z"]) ** 2).mean()).backward()
            elif method == "dcgan":
                F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged)).backward()
            else:
                (-judged.mean()).backward()
            of_g.step()
        if method == "began":
            moved = scalars["k"] + config.balance_rate * (config.gamma * real_out - fake_out).item()
            scalars["k"] = min(max(moved, 0.0), 1.0)
        if config.augmentation == "ada":
            up = 1 if real_out.sign().mean() > config.ada_target else -1
            scalars["p"] = min(max(scalars["p"] + up * len(x) / config.ada_pictures, 0.0), 0.8)
        if method == "bgan":
            estimate = fake_out.exp().mean().log().item()
            scalars["log_z"] = 0.9 * scalars["log_z"] + 0.1 * estimate
    return scalars


ADA = ["model.augmentation=ada", "model.ada_target=-0.9", "model.ada_pictures=40"]
VARIED = [("cell_gan", ["model.augmentation=diffaugment"]), ("dcgan", ADA), ("bgan", ADA)]


@pytest.mark.parametrize(("method", "augmentation"), [*((method, []) for method in METHODS), *VARIED])
def test_a_run_is_the_papers_loop_written_out(method, augmentation):
    """Weights, statistics, spectral vectors and scalars; one step a batch whoever moves."""
    given, settings = batches(7), [CALM, "model.optim.schedule=constant", *augmentation]
    ours, theirs = built(method, *settings), built(method, *settings)
    trainer = fit(ours, given)
    assert trainer.global_step == len(given)
    scalars = written_out(method, theirs, given)
    assert difference(ours.generator, theirs.generator) < 1e-6
    assert difference(ours.discriminator, theirs.discriminator) < 1e-6
    assert difference(ours.generator, built(method, *settings).generator) > 1e-5, "it has moved"
    for name, value in ours.scalars.named_buffers():
        if name in scalars:
            assert value.item() == pytest.approx(scalars[name], abs=1e-5)
            assert value != 0


# Several processes


def in_processes(rank: int, processes: int, folder) -> None:
    for method in METHODS:
        module = built(method, CALM, *(ADA if method == "bgan" else []))
        strategy = {"strategy": Replicated(True), "devices": processes} if processes > 1 else {}
        fit(module, [part(batch, rank, processes) for batch in batches(3)], **strategy)
        torch.save({k: v.clone() for k, v in module.state_dict().items()}, folder / f"{method}-{processes}-{rank}.pt")


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    for processes in (1, 2, 3):
        together(processes, in_processes, processes, folder, log=folder / f"log-{processes}", seconds=240)
    return folder


@EVERY
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_learn_what_one_learns(method, processes, shared_runs):
    """Weights, running statistics, spectral vectors, k and log Z, all to 1e-6, and the same bits in each process."""
    alone = torch.load(shared_runs / f"{method}-1-0.pt")
    several = [torch.load(shared_runs / f"{method}-{processes}-{rank}.pt") for rank in range(processes)]
    for name, value in alone.items():
        if name == "scalars.generator":  # this process's newest loss, which is reduced where it is logged
            continue
        torch.testing.assert_close(several[0][name], value, rtol=1e-6, atol=1e-6, msg=name)
        assert all(torch.equal(several[0][name], other[name]) for other in several), name


# What the average is drawn with


def test_vectors_and_statistics_fit_the_average_after_the_swap():
    module = built("cell_gan", "model.optim.lr=2e-2", "model.discriminator_lr=2e-2")
    ema = EMA(EMAConfig(decay=0.9, warmup=False))
    fit(module, batches(12), callbacks=[ema])
    z, labels = SampleRandom(list(range(1000, 1512))).normal(module.config.latent), torch.arange(512) % 2
    module.eval()
    live = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with ema.swapped(), torch.no_grad():
        fitted = [abs(sigma - 1) for sigma in sigmas(module)]
        drawn = module.draw(z, labels).std().item()
        for name, buffer in module.named_buffers():
            buffer.copy_(live[name])
        unfitted = [abs(sigma - 1) for sigma in sigmas(module)]
        without = module.draw(z, labels).std().item()
        module.after_swap()
        with recomputed_statistics(module.generator):  # by the statistics of these very pictures
            whole = module.draw(z, labels).std().item()
    assert max(fitted) < 1e-3 < max(unfitted)
    assert drawn == pytest.approx(whole, rel=0.05)
    assert abs(without - whole) > 0.2 * whole, "the live vectors and statistics are of other weights"


def sigmas(module) -> list[float]:
    """The largest singular value of each weight that is computed with, of both networks."""
    found = []
    for network in (module.generator, module.discriminator):
        layers = dict(network.named_modules())
        for name, norm, _ in normalised(network):
            found.append(float(torch.linalg.matrix_norm(norm._reshape_weight_to_matrix(layers[name].weight), 2)))
    return found


# What is exported


@pytest.mark.parametrize("method", ["cell_gan", "dcgan", "wgan_gp", "began"])
def test_what_is_exported_draws_the_same_pictures_in_plain_torch(method, tmp_path):
    module = built(method)
    fit(module, batches(4))
    module.eval().after_swap()
    module.export(tmp_path)
    program = torch.export.load(tmp_path / "generator.pt2").module()
    plain = without_spectral_norm(built(method).generator)
    plain.load_state_dict(load_file(tmp_path / "generator.safetensors"))
    for count in (1, 3):
        labels = torch.arange(count) % 2
        inputs = (module.latents(SampleRandom(list(range(count)))), labels)[: 2 if method == "cell_gan" else 1]
        expected = module.sample(Conditions(labels=labels), list(range(count)))
        torch.testing.assert_close(program(*inputs), expected, atol=2e-5, rtol=0)
        torch.testing.assert_close((plain(*inputs) / 2 + 0.5).clamp(0, 1), expected, atol=2e-5, rtol=0)


# Faults, and steps that are left out


@pytest.mark.parametrize("method", ["cell_gan", "wgan", "bgan", "began"])
def test_a_discriminators_step_that_is_not_finite_changes_nothing(method):
    """As if it had not been: its weights, all statistics, k and log Z; the generator's own step may be finite."""
    given = batches(3)
    ours, theirs = built(method, "model.optim.schedule=constant"), built(method, "model.optim.schedule=constant")
    fit(ours, [given[0], with_a_nan(given[1])])
    fit(theirs, given[:1])
    before = theirs.state_dict()
    kept = [name for name, _ in ours.discriminator.named_parameters(prefix="discriminator")]
    kept += [name for name, _ in ours.named_buffers() if not name.endswith(("._u", "._v"))]
    assert all(value.isfinite().all() for value in ours.state_dict().values())
    assert not [name for name in kept if not torch.equal(ours.state_dict()[name], before[name])]


def test_each_player_is_clipped_by_itself_and_by_its_own_norm(monkeypatch):
    norms = []
    clip = family.Adversarial.configure_gradient_clipping

    def noting(self, optimizer, *arguments):
        clip(self, optimizer, *arguments)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

    monkeypatch.setattr(family.Adversarial, "configure_gradient_clipping", noting)
    module = built("cell_gan")
    module.gradient_clip_norm = 1e-2
    fit(module, batches(2))
    assert norms == pytest.approx([1e-2] * 4, rel=1e-3)


@pytest.mark.parametrize("method", ["cell_gan", "wgan_gp"])
def test_mixed_precision_learns_in_float32(method):
    module = built(method)
    fit(module, batches(3), precision="bf16-mixed")
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert all(value.isfinite() for value in module.step_losses.values())
    assert difference(module.generator, built(method).generator) > 1e-6


def test_it_is_said_once_where_the_discriminator_has_won(monkeypatch):
    monkeypatch.setattr(family, "CERTAIN_STEPS", 3)
    monkeypatch.setattr(family, "_LOOKED_AT", 1)
    monkeypatch.setattr(family.Adversarial, "told", staticmethod(lambda *_: {"accuracy": torch.tensor(1.0)}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(built("dcgan"), batches(6))
    assert len([each for each in said if "told every picture in 3 steps" in str(each.message)]) == 1
    monkeypatch.setattr(family.Adversarial, "told", staticmethod(lambda *_: {"accuracy": torch.tensor(0.99)}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(built("dcgan"), batches(6))
    assert not [each for each in said if "told every picture" in str(each.message)]


def test_classes_that_are_not_there_are_refused():
    module = built("cell_gan")
    with pytest.raises(UserError, match="there is a class 2, counted from 0; set it to"):
        module.sample(Conditions(labels=torch.tensor([0, 2])), [1, 2])
    with pytest.raises(UserError, match="there are no labels"):
        module.sample(Conditions(captions=["a cell"]), [1])


def test_networks_that_cannot_draw_the_size_are_refused():
    with pytest.raises(UserError, match="resolution=24: these networks draw pictures of a side of 8, 16, 32"):
        built("dcgan", "data.resolution=24")
    with pytest.raises(UserError, match="resolution=32: networks of 3 widths have pictures of 16 pixels"):
        built("cell_gan", "data.resolution=32")


def test_ada_is_refused_without_logits():
    with pytest.raises(UserError, match="augmentation=ada: WGAN gives no logits; take diffaugment or none"):
        built("wgan", "model.augmentation=ada")


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed2"])
def test_strategies_that_share_weights_in_parts_are_refused(strategy, here):
    config = load_config([REPOSITORY / "configs/tiny/dcgan.yaml"], ["data.root=data", f"hardware.strategy={strategy}"])
    with pytest.raises(UserError, match=f"strategy={strategy}: dcgan trains with auto, ddp"):
        check_support(config, built("dcgan"))


def test_a_method_without_conditions_draws_a_number_of_pictures(here, phantoms):
    config = load_config([REPOSITORY / "configs/tiny/dcgan.yaml"], [f"data.root={phantoms['cytology']}", "run_dir=run"])
    module = train(config).lightning_module
    result = CliRunner().invoke(sample, ["run", "--count", "3", "--out", "out", "--seed", "5"])
    assert result.exception is None, result.exception
    assert len({(here / f"out/{i:06d}.png").read_bytes() for i in range(3)}) == 3
    assert type(module).supports.unconditional
    for arguments in (["--prompt", "a cell"], ["--validation", "2"], ["--labels", "mild"]):
        result = CliRunner().invoke(sample, ["run", *arguments, "--out", "other"])
        assert "dcgan draws for no conditions: give --count N" in str(result.exception)
    config.method, config.run_dir = "cell_gan", "run"
    request, other = Request(count=2), built("cell_gan")
    with pytest.raises(UserError, match="--count: run: cell_gan draws for labels: say which"):
        ask(request, Path("run"), config, other, None)
