"""The average of the weights against closed forms and PyTorch's own, and what validation and checkpoints see of it."""

from fractions import Fraction
from itertools import count

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.ema import EMA, EMAConfig, load_ema_weights
from medsynth.errors import UserError

LR = 0.125  # exact in binary: the weights of a `Descent` are known exactly


class Toy(L.LightningModule):
    """A small network, a frozen one, and in validation a record of the weights seen."""

    def __init__(self, optimizer=torch.optim.Adam, lr=0.01):
        super().__init__()
        self.optimizer, self.lr, self.seen, self.trained = optimizer, lr, [], []
        torch.manual_seed(0)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def after_swap(self):
        pass

    def trainable_modules(self):
        return {"net": self.net}

    def configure_optimizers(self):
        return self.optimizer(self.net.parameters(), lr=self.lr)

    def training_step(self, batch, _):
        return self.net(self.frozen(batch[0].to(self.dtype))).square().sum()

    def on_train_batch_end(self, *_):
        self.trained.append(weights(self.net))

    def validation_step(self, batch, _):
        self.seen.append(weights(self.net))

    def train_dataloader(self):
        pictures = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(pictures), batch_size=2)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(2, 3)), batch_size=2)


class Descent(Toy):
    """Each weight falls by LR a step."""

    def __init__(self):
        super().__init__(torch.optim.SGD, LR)
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.net.weight)

    def training_step(self, batch, _):
        return self.net(torch.ones(1, 1)).sum()


class Adversaries(Toy):
    """Two networks with an optimizer each, both stepping on every batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(3, 2)

    def after_swap(self):
        pass

    def trainable_modules(self):
        return {"net": self.net, "critic": self.critic}

    def configure_optimizers(self):
        return [torch.optim.SGD(module.parameters(), lr=0.01) for module in (self.net, self.critic)]

    def training_step(self, batch, _):
        for optimizer, module in zip(self.optimizers(), (self.net, self.critic), strict=True):
            optimizer.zero_grad()
            self.manual_backward(module(batch[0]).square().sum())
            optimizer.step()


def weights(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    quiet |= {"enable_checkpointing": saves, "accelerator": "cpu", "max_epochs": 1}
    return L.Trainer(callbacks=list(callbacks), **(quiet | options))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_constant_decay_follows_the_geometric_sum():
    ema = EMA(EMAConfig(decay=0.75, warmup=False))
    trainer(ema).fit(Descent())
    steps, decay = 6, Fraction(3, 4)
    trajectory = [1 - k * Fraction(1, 8) for k in range(steps + 1)]
    expected = decay**steps + (1 - decay) * sum(decay ** (steps - k) * trajectory[k] for k in range(1, steps + 1))
    assert ema.updates == steps
    assert ema.averaged_state()["net.weight"].item() == pytest.approx(float(expected), abs=1e-7)


def test_warmup_and_interval_follow_the_closed_form():
    ema = EMA(EMAConfig(decay=0.2, every=2))
    trainer(ema).fit(Descent())
    # 6 steps, updates after steps 2, 4 and 6 with decays 1/10, 2/11 and min(0.2, 3/12) = 1/5.
    decays, values = [Fraction(1, 10), Fraction(2, 11), Fraction(1, 5)], [Fraction(k, 8) for k in (6, 4, 2)]
    average = Fraction(1)
    for decay, value in zip(decays, values, strict=True):
        average = decay * average + (1 - decay) * value
    assert ema.updates == 3
    assert ema.averaged_state()["net.weight"].item() == pytest.approx(float(average), abs=1e-7)


class Reference(L.Callback):
    """PyTorch's own average of the same weights."""

    def on_fit_start(self, trainer, module):
        self.model = AveragedModel(module.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.model.update_parameters(module.net)  # the first call takes the weights as they are

    def on_train_batch_end(self, trainer, module, *_):
        self.model.update_parameters(module.net)


def test_average_equals_pytorchs():
    ema, reference, module = EMA(EMAConfig(decay=0.9, warmup=False)), Reference(), Toy()
    trainer(ema, reference, max_epochs=3).fit(module)
    average = ema.averaged_state()
    for name, expected in reference.model.module.named_parameters():
        assert (average[f"net.{name}"] - expected).abs().max() <= 1e-7
        assert not torch.equal(expected, module.net.get_parameter(name))


def test_accumulated_batches_count_once():
    ema, module = EMA(EMAConfig()), Toy()
    fit = trainer(ema, accumulate_grad_batches=4)
    fit.fit(module)
    assert (fit.global_step, ema.updates) == (2, 2)  # 6 batches: after the fourth and the last


def test_two_optimizers_count_once_a_batch():
    ema, module = EMA(EMAConfig()), Adversaries()
    fit = trainer(ema)
    fit.fit(module)
    assert (fit.global_step, ema.updates) == (12, 6)
    assert {name.split(".")[0] for name in ema.averaged_state()} == {"net", "critic"}


def test_only_trainable_modules_are_averaged_and_buffers_are_current():
    ema, module = EMA(EMAConfig(decay=0.5)), Toy()
    trainer(ema).fit(module)
    average = ema.averaged_state()
    assert average.keys() == {f"net.{name}" for name in module.net.state_dict()}
    assert torch.equal(average["net.1.running_mean"], module.net[1].running_mean)
    assert average["net.1.num_batches_tracked"] == 6
    assert average["net.1.num_batches_tracked"].dtype == torch.int64


def test_shared_parameters_are_averaged_once():
    class Shared(Toy):
        def after_swap(self):
            pass

        def trainable_modules(self):
            return {"net": self.net, "head": nn.Sequential(self.net[0], nn.Linear(2, 2))}

    alone, shared = EMA(EMAConfig(decay=0.5)), EMA(EMAConfig(decay=0.5))
    trainer(alone).fit(Toy())
    trainer(shared).fit(Shared())
    average = shared.averaged_state()
    assert {name for name in average if name.startswith("head")} == {"head.1.weight", "head.1.bias"}
    assert_same(alone.averaged_state(), {name: value for name, value in average.items() if name.startswith("net")})


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (4, 1), (1, 4)])
def test_resumed_average_is_that_of_the_undisturbed_run(tmp_path, every, accumulate):
    config = EMAConfig(
        decay=0.9, every=every
    )  # 4 does not divide an epoch's 6 steps: the count goes on over the resume
    whole, first, second = EMA(config), EMA(config), EMA(config)
    undisturbed, resumed, options = Toy(), Toy(), {"accumulate_grad_batches": accumulate}
    trainer(whole, max_epochs=4, **options).fit(undisturbed)

    before = trainer(first, max_epochs=1, **options)
    before.fit(Toy())
    before.save_checkpoint(tmp_path / "run.ckpt")
    after = trainer(second, max_epochs=4, **options)
    after.fit(resumed, ckpt_path=tmp_path / "run.ckpt", weights_only=True)

    assert whole.updates == second.updates == after.global_step // every
    assert_same(whole.averaged_state(), second.averaged_state())
    assert_same(weights(undisturbed), weights(resumed))


def test_state_loaded_after_the_fit_has_started_is_taken_too():
    source, late, module = EMA(EMAConfig(decay=0.9)), EMA(EMAConfig(decay=0.9)), Toy()
    trainer(source).fit(Toy())
    late.on_fit_start(trainer(late), module)
    late.load_state_dict(source.state_dict())
    assert late.updates == source.updates
    assert_same(late.averaged_state(), source.averaged_state())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_validation_sees_the_average_and_training_goes_on_from_the_live_weights(precision):
    class Watch(L.Callback):
        def on_validation_start(self, trainer, module):
            self.averages = getattr(self, "averages", [])
            self.averages.append({k: v.clone() for k, v in ema.averaged_state().items()})

    ema, watch, module, alone = EMA(EMAConfig(decay=0.9)), Watch(), Toy(), Toy()
    trainer(watch, ema, max_epochs=3, precision=precision).fit(module)  # `watch` comes before the swap
    trainer(max_epochs=3, precision=precision).fit(alone)

    assert_same(weights(module.net), weights(alone.net))
    for seen, average, live in zip(module.seen, watch.averages, module.trained[5::6], strict=True):
        for name, value in seen.items():
            assert average[f"net.{name}"].dtype == torch.float32
            assert torch.equal(value, average[f"net.{name}"].to(value.dtype))
        assert any(not torch.equal(seen[name], live[name]) for name in seen)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_pictures_sampled_from_the_average_in_inference_mode_leave_no_trace(precision):
    class Sampling(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            average = {k: v.clone() for k, v in ema.averaged_state().items()}
            with torch.inference_mode(), ema.swapped(), ema.swapped():
                assert torch.equal(module.net[0].weight, average["net.0.weight"].to(module.dtype))
                with pytest.raises(RuntimeError, match="save after"):
                    ema.averaged_state()
            assert_same(ema.averaged_state(), average)

    ema, alone, sampled, undisturbed = EMA(EMAConfig(decay=0.9)), EMA(EMAConfig(decay=0.9)), Toy(), Toy()
    trainer(ema, Sampling(), precision=precision).fit(sampled)
    trainer(alone, precision=precision).fit(undisturbed)
    assert_same(ema.averaged_state(), alone.averaged_state())
    assert_same(weights(sampled), weights(undisturbed))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_exception_in_validation_restores_the_live_weights(precision):
    class Failing(Toy):
        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            raise KeyError("broken picture")

    ema, module = EMA(EMAConfig(decay=0.9)), Failing()
    with pytest.raises(KeyError, match="broken picture"):
        trainer(ema, precision=precision).fit(module)
    assert any(not torch.equal(module.seen[0][name], value) for name, value in module.trained[-1].items())
    assert_same(weights(module.net), module.trained[-1])
    assert ema.averaged_state()["net.0.weight"].dtype == torch.float32


def test_swap_cut_short_by_lack_of_memory_is_mended(monkeypatch):
    ema, module = EMA(EMAConfig(decay=0.9)), Toy()
    trainer(ema).fit(module)
    average, live = {k: v.clone() for k, v in ema.averaged_state().items()}, weights(module)
    clone, calls = torch.Tensor.clone, count()

    def scarce(tensor):
        if next(calls) == 2:
            raise torch.OutOfMemoryError("a third copy")
        return clone(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", scarce)
    with pytest.raises(torch.OutOfMemoryError, match="a third copy"), ema.swapped():
        pytest.fail("the swap was cut short")
    assert_same(weights(module), live)
    assert_same(ema.averaged_state(), average)


def test_checkpoints_hold_the_live_weights_and_the_average_beside(tmp_path):
    in_batch = ModelCheckpoint(tmp_path, "batch-{step}", every_n_train_steps=3, save_top_k=-1)
    after_validation = ModelCheckpoint(tmp_path, "validation-{step}", save_top_k=-1, save_on_train_epoch_end=False)
    ema, module = EMA(EMAConfig(decay=0.9)), Toy()
    trainer(in_batch, after_validation, ema, max_epochs=2).fit(module)  # listed first, and yet after the average
    saved = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")}
    assert saved.keys() == {f"batch-step={n}" for n in (3, 6, 9, 12)} | {f"validation-step={n}" for n in (6, 12)}
    for checkpoint in saved.values():
        step = checkpoint["global_step"]
        assert checkpoint["callbacks"]["EMA"]["updates"] == step
        live = module.trained[step - 1]
        assert_same(live, {name: checkpoint["state_dict"][f"net.{name}"] for name in live})
        assert not torch.equal(checkpoint["callbacks"]["EMA"]["shadow"]["net.0.weight"], live["0.weight"])


def test_loaded_average_makes_the_validated_module(tmp_path):
    ema, module, fresh, validated = EMA(EMAConfig(decay=0.9)), Toy(), Toy(), Toy()
    fit = trainer(ema, max_epochs=2)
    fit.fit(module)
    fit.save_checkpoint(tmp_path / "run.ckpt")
    load_ema_weights(fresh, torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]["EMA"])
    assert_same(weights(fresh.net), module.seen[-1])
    assert torch.equal(fresh.net[1].running_var, module.net[1].running_var)

    trainer(EMA(EMAConfig(decay=0.9))).validate(validated, ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert_same(validated.seen[0], module.seen[-1])
    assert_same(weights(validated.net), weights(module.net))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shadow: shadow.pop("net.2.bias"), r"1 not in the checkpoint \(net\.2\.bias\)"),
        (lambda shadow: shadow.update(extra=torch.ones(1)), r"1 not in the model \(extra\)"),
        (lambda shadow: shadow.update({"net.0.bias": torch.ones(3)}), r"1 of another shape \(net\.0\.bias\)"),
    ],
)
def test_average_of_another_model_is_refused_and_nothing_is_loaded(change, message):
    ema, fresh = EMA(EMAConfig(decay=0.9)), Toy()
    trainer(ema).fit(Toy())
    state, before = ema.state_dict(), weights(fresh)
    change(state["shadow"])
    with pytest.raises(UserError, match=message):
        load_ema_weights(fresh, state)
    assert_same(weights(fresh), before)
