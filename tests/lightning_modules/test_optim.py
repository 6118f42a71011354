"""Optimizers and schedules of a config: RMSprop against torch's own, steps left out, rates that halve."""

import pytest
import torch
from torch import nn

from lightning_modules.parts.optim import OptimConfig, RMSprop, configure_optimizers, leave_out_unless_finite


def two(seed: int = 0) -> list[nn.Module]:
    made = []
    for _ in range(2):
        torch.manual_seed(seed)
        made.append(nn.Linear(3, 2))
    return made


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rmsprop_is_torchs(weight_decay):
    ours, theirs = two()
    settings = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": weight_decay}
    optimizers = RMSprop(ours.parameters(), **settings), torch.optim.RMSprop(theirs.parameters(), **settings)
    for step in range(5):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            leave_out_unless_finite(optimizer)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_rmsprop_leaves_out_a_step_that_is_not_finite_and_no_other():
    ours, theirs = two()
    optimizers = [RMSprop(network.parameters(), lr=1e-2) for network in (ours, theirs)]
    for bad in (False, True, False):
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            if bad and network is theirs:
                continue
            optimizer.zero_grad()
            network(torch.ones(1, 3)).square().sum().backward()
            if bad:
                network.bias.grad[0] = float("inf")
            norm = leave_out_unless_finite(optimizer)
            assert norm.isfinite() == (not bad)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    moments = [
        optimizer.state[p]["square_avg"] for p, optimizer in ((ours.bias, optimizers[0]), (theirs.bias, optimizers[1]))
    ]
    assert torch.equal(*moments)


def test_a_rate_halves_after_so_many_steps():
    config = OptimConfig(
        name="rmsprop", lr=8.0, betas=[0.0, 0.9], schedule="halving", halve_every_steps=3, warmup_steps=2
    )
    made = configure_optimizers(config, {"net": two()[0]}, total_steps=9)
    assert made["optimizer"].param_groups[0]["alpha"] == 0.9
    rate_at = made["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [8 * rate_at(step) for step in range(9)] == [0, 4, 8, 4, 4, 4, 2, 2, 2]
