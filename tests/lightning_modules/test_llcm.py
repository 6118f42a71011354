"""LLCM against the definitions written out with diffusers' parts, and its exports in diffusers' pipelines."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline
from torch import Tensor

from datamodules.batches import Conditions
from jobs.run.config import load_config
from jobs.run.folder import build_module
from jobs.train import train
from lightning_modules.llcm import LLCM
from lightning_modules.maths.diffusion import SampleRandom
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.lightning_modules.test_stable_diffusion import PROMPTS, batch, drawn
from tests.sd_folder import write_pipeline

TINY = REPOSITORY / "configs/tiny/llcm.yaml"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("teachers")
    return {
        "epsilon": write_pipeline(base / "epsilon"),
        "v_prediction": write_pipeline(base / "v", prediction="v_prediction", version=2),
    }


def built(folder, *settings: str) -> LLCM:
    module = build_module(load_config([TINY], [f"model.pretrained={folder}", "data.root=nowhere", *settings]))
    module.configure_model()
    return module.eval()


def moved(module: LLCM) -> LLCM:
    """Student and target as training would leave them: unlike the teacher, and unlike each other."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in (module.student, module.target):
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def pipeline(folder, kind=StableDiffusionPipeline):
    loaded = kind.from_pretrained(folder, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_paper_s_with_diffusers_parts(folders, prediction):
    """Eqs. 4, 5 and 7: DDIM step of the guided teacher, boundary scalings of LCM, Huber distance."""
    folder = folders[prediction]
    module, rows = moved(built(folder)), batch()
    parts = pipeline(folder)
    random = SampleRandom(rows.seeds)
    posterior = parts.vae.encode(rows.images * 2 - 1).latent_dist
    z = (posterior.mean + posterior.std * random.normal(4, 8, 8)) * parts.vae.config.scaling_factor
    noise, index, share = random.normal(4, 8, 8), random.integers(50), random.uniform()
    w = 5 + 10 * share
    solver = DDIMScheduler.from_config(parts.scheduler.config, set_alpha_to_one=False)
    consistency = LCMScheduler.from_config(parts.scheduler.config)
    text, nothing = parts.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["", ""])

    total = 0.0
    for i in range(2):
        t = int(index[i]) * 20 + 19
        previous = max(0, t - 20)
        noisy = solver.add_noise(z[i : i + 1], noise[i : i + 1], torch.tensor([t]))
        conditional = parts.unet(noisy, t, text[i : i + 1]).sample
        unconditional = parts.unet(noisy, t, nothing[i : i + 1]).sample
        guided = conditional + w[i] * (conditional - unconditional)
        solver.set_timesteps(50)
        solver.final_alpha_cumprod = solver.alphas_cumprod[0]
        earlier = solver.step(guided, t, noisy).prev_sample
        embedding = parts.get_guidance_scale_embedding(w[i : i + 1], embedding_dim=8)

        def consistent(network, z_t, step, embedding=embedding, i=i):
            output = network(z_t, step, text[i : i + 1], timestep_cond=embedding).sample
            a = solver.alphas_cumprod[step]
            if prediction == "epsilon":
                original = (z_t - (1 - a).sqrt() * output) / a.sqrt()
            else:
                original = a.sqrt() * z_t - (1 - a).sqrt() * output
            consistency.sigma_data = 0.5
            c_skip, c_out = consistency.get_scalings_for_boundary_condition_discrete(step)
            return c_skip * z_t + c_out * original

        ours, goal = consistent(module.student, noisy, t), consistent(module.target, earlier, previous)
        total += ((ours - goal).square() + 0.001**2).sqrt().sub(0.001).mean()
    torch.testing.assert_close(module.losses(rows)["loss"], total / 2, rtol=2e-4, atol=1e-6)


def test_the_student_starts_as_the_teacher_whatever_the_guidance(folders):
    module = built(folders["epsilon"])
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([19, 999])
    context = module.condition(Conditions(captions=PROMPTS))
    teacher = module.predict(z, t, context)
    for guidance in (1.0, 12.0):
        assert torch.equal(module.denoise(z, t, context, None, guidance).model_output, teacher)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [StableDiffusionPipeline, LatentConsistencyModelPipeline])
def test_the_exported_folder_samples_the_same_in_few_steps(folders, tmp_path, kind, steps):
    module = moved(built(folders["epsilon"]))
    module.export(tmp_path)
    ours = module.sample(Conditions(captions=PROMPTS), [7, 8], steps=steps, guidance=8.0)
    loaded = pipeline(tmp_path, kind)
    assert isinstance(loaded.scheduler, LCMScheduler)
    torch.testing.assert_close(drawn(loaded, steps, 8.0), ours, rtol=0, atol=2e-5)


def test_guidance_is_an_input(folders):
    module = moved(built(folders["epsilon"]))
    asked = Conditions(captions=PROMPTS)
    low, high = (module.sample(asked, [7, 8], steps=2, guidance=g) for g in (6.0, 16.0))
    assert not torch.allclose(low, high)


@pytest.mark.parametrize("solver", ["leapfrog", "ddim", "midpoint"])
def test_solvers_differ_where_they_should(folders, solver):
    """The published leapfrog is DDIM; midpoint is not, and asks the teacher twice."""
    module, reference = (moved(built(folders["epsilon"], f"model.solver={name}")) for name in (solver, "ddim"))
    calls = []
    module.unet.register_forward_hook(lambda *_: calls.append(1))
    same = torch.equal(module.losses(batch())["loss"], reference.losses(batch())["loss"])
    assert same == (solver != "midpoint")
    assert len(calls) == (2 if solver == "midpoint" else 1)


def test_leapfrog_with_another_h_is_another_step(folders):
    plain, longer = (moved(built(folders["epsilon"], f"model.leapfrog_h={h}")) for h in (0.5, 0.6))
    assert not torch.equal(plain.losses(batch())["loss"], longer.losses(batch())["loss"])


def test_the_target_is_the_student_s_average_and_nothing_else_moves(phantoms, here):
    settings = [f"data.root={phantoms['canine_hip']}", "run_dir=run", "model.target_decay=0.9", "model.optim.lr=0.01"]
    settings += [
        "train.max_steps=3",
        "train.validate_every_steps=3",  # so that the last weights are the best
        "ema.decay=0",
        "evaluation.images=0",
        "checkpoint.monitor=val/loss",
        "evaluation.grid=0",
    ]
    students: list[dict[str, Tensor]] = []
    step = LLCM.optimizer_step

    def remember(self, *args, **kwargs):
        students.append(copy.deepcopy(self.student.state_dict()) if not students else None)
        step(self, *args, **kwargs)
        students.append(copy.deepcopy(self.student.state_dict()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLCM, "optimizer_step", remember)
        module = train(load_config([TINY], settings)).lightning_module
    students = [state for state in students if state is not None]
    assert len(students) == 4
    name = "conv_in.weight"
    average = students[0][name]
    for state in students[1:]:
        average = 0.9 * average + 0.1 * state[name]
    torch.testing.assert_close(module.target.state_dict()[name], average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(module.target.state_dict()[name], students[-1][name])


def test_accumulated_micro_batches_average_once(phantoms, here):
    calls = []
    settings = [
        f"data.root={phantoms['canine_hip']}",
        "run_dir=run",
        "evaluation.images=0",
        "checkpoint.monitor=val/loss",
    ]
    step = LLCM.optimizer_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLCM, "optimizer_step", lambda self, *a, **k: (calls.append(1), step(self, *a, **k))[1])
        train(load_config([TINY], [*settings, "train.device_batch_size=2", "evaluation.grid=0"]))
    assert len(calls) == 2


def test_mixed_precision_keeps_the_average_whole(phantoms, here):
    """In bfloat16 an average of decay 0.95 would stand still: the changes are smaller than its last bit."""
    settings = [f"data.root={phantoms['canine_hip']}", "run_dir=run", "hardware.precision=bf16-mixed"]
    module = train(load_config([TINY], settings)).lightning_module
    for network, dtype in (("unet", torch.bfloat16), ("vae", torch.bfloat16), ("target", torch.float32)):
        assert {p.dtype for p in getattr(module, network).parameters()} == {dtype}, network
    assert {p.dtype for p in module.student.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.solver=euler"], "use one of leapfrog, ddim, midpoint"),
        (["model.solver=ddim", "model.leapfrog_h=0.6"], "the solver ddim has no h"),
        (["model.sampler.name=ddim"], "a consistency model samples with lcm"),
        (["model.solver_steps=30"], "must divide model.noise.steps=1000"),
        (["model.target_decay=1.0"], r"model.target_decay=1.0: must be in \[0, 1\)"),
    ],
)
def test_one_clear_line_for_what_cannot_be(folders, settings, message):
    with pytest.raises(UserError, match=message):
        built(folders["epsilon"], *settings)
