"""Batch norms of several processes against torch's own over the whole batch."""

import pytest
import torch
from torch import nn

from lightning_modules.nets.norms import ConditionalBatchNorm2d, SyncBatchNorm2d, recomputed_statistics
from tests.processes import together

CUTS = {"even": (3, 3), "uneven": (1, 5), "one has none": (0, 6), "three": (2, 1, 3)}


def picture_batch() -> torch.Tensor:
    """Six maps far from zero, where a difference of large sums would be wrong."""
    return 50 + 3 * torch.randn(6, 4, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trained(norm: nn.BatchNorm2d, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and running statistics of two passes, of a loss that is a sum over pictures."""
    x = x.clone().requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5, -1.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 3.0]))
    norm(x.detach() * 2)
    out = norm(x)
    (out.sin() * weights).sum().backward()
    found = {"out": out, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {name: value.detach() for name, value in {**found, **dict(norm.named_buffers())}.items()}


def in_a_process(rank: int, cut: tuple[int, ...], folder) -> None:
    torch.distributed.init_process_group("gloo")
    own = slice(sum(cut[:rank]), sum(cut[: rank + 1]))
    for dtype in (torch.float64, torch.float32):
        norm, weights = SyncBatchNorm2d(4).to(dtype), torch.linspace(-1, 2, 6).view(6, 1, 1, 1)
        torch.save(trained(norm, picture_batch()[own].to(dtype), weights[own]), folder / f"{dtype}-{rank}.pt")


@pytest.mark.parametrize("name", CUTS)
def test_several_processes_have_the_statistics_and_gradients_of_the_whole_batch(name, tmp_path):
    together(len(CUTS[name]), in_a_process, CUTS[name], tmp_path, log=tmp_path / "log")
    expected = trained(nn.BatchNorm2d(4).double(), picture_batch(), torch.linspace(-1, 2, 6).view(6, 1, 1, 1))
    for dtype, within in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        parts = [torch.load(tmp_path / f"{dtype}-{rank}.pt") for rank in range(len(CUTS[name]))]
        for key, value in expected.items():
            if key in ("out", "x"):
                found = torch.cat([part[key] for part in parts])
            elif key in ("weight", "bias"):
                found = torch.stack([part[key] for part in parts]).sum(dim=0)
            else:
                found = parts[0][key]
                assert all(torch.equal(part[key], found) for part in parts)
            torch.testing.assert_close(found.to(value.dtype), value, rtol=within, atol=within, msg=key)


def test_alone_it_is_torchs_norm():
    ours, theirs, x = SyncBatchNorm2d(4), nn.BatchNorm2d(4), picture_batch().float()
    weights = torch.randn(6, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    found, expected = (trained(norm, x, weights) for norm in (ours, theirs))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_statistics_are_taken_anew_from_what_is_passed_and_nothing_else_is_changed():
    network = nn.Sequential(SyncBatchNorm2d(4, momentum=0.3), nn.Dropout(0.5)).eval()
    norm, batch = network[0], picture_batch().float()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with recomputed_statistics(network), torch.no_grad():
        assert not network[1].training
        for part in batch.split(2):
            network(part)
    means = torch.stack([part.mean(dim=(0, 2, 3)) for part in batch.split(2)]).mean(dim=0)
    variances = torch.stack([part.transpose(0, 1).flatten(1).var(dim=1) for part in batch.split(2)]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert (norm.training, norm.momentum, int(norm.num_batches_tracked)) == (False, 0.3, 0)
    with recomputed_statistics(network):
        pass
    torch.testing.assert_close(norm.running_mean, means)
    assert all(torch.equal(norm.state_dict()[name], before[name]) for name in ("weight", "bias"))


def test_each_class_has_its_own_scale_and_shift():
    norm, x, labels = ConditionalBatchNorm2d(4, classes=3), picture_batch().float(), torch.tensor([0, 1, 2, 2, 1, 0])
    torch.testing.assert_close(norm(x, labels), nn.BatchNorm2d(4)(x))
    with torch.no_grad():
        norm.scale.weight[1] = 5
        norm.shift.weight[2] = torch.arange(4.0)
    plain, found = nn.BatchNorm2d(4)(x), norm(x, labels)
    torch.testing.assert_close(found[[0, 5]], plain[[0, 5]])
    torch.testing.assert_close(found[[1, 4]], 5 * plain[[1, 4]])
    torch.testing.assert_close(found[[2, 3]], plain[[2, 3]] + torch.arange(4.0)[:, None, None])
    found.square().sum().backward()
    assert (norm.scale.weight.grad != 0).any(dim=1).all()


def test_the_type_of_the_pictures_is_kept():
    norm, x = ConditionalBatchNorm2d(4, classes=2), picture_batch()
    assert norm(x.bfloat16(), torch.zeros(6, dtype=torch.int64)).dtype == torch.bfloat16
