"""The same scores from one, two and three processes with uneven shares of the pictures."""

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from metrics.images import quantise
from metrics.suite import GenerationMetrics
from tests.metrics.test_metrics import PixelExtractor, feed, phantoms

REALS, FAKES, BANK = 37, 41, 20
SHARES = {  # number of processes: which pictures each scores, as a slice
    2: [slice(0, None, 2), slice(1, None, 2)],
    3: [slice(0, 0), slice(0, 11), slice(11, None)],
}


def build() -> GenerationMetrics:
    return GenerationMetrics(PixelExtractor(), REALS, FAKES, max_bank=BANK)


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    return quantise(phantoms(REALS, seed=1, size=16)), quantise(phantoms(FAKES, seed=2, size=16, brightness=0.05))


def feed_share(update, images: torch.Tensor, share: slice) -> None:
    """Batches of 8 of this share, the last filled up with padding."""
    for rows in torch.arange(len(images))[share].split(8):
        indices = torch.cat([rows, torch.full((8 - len(rows),), -1)])
        update(images[indices.clamp(min=0)], indices)


def score_share(share: slice, folder: Path) -> dict[str, dict[str, float]]:
    real, fake = pictures()
    suite = build()
    feed_share(suite.update_real, real, share)
    feed_share(suite.update_fake, fake, share)
    scores = {"first": suite.compute()}
    scores["again"] = suite.compute()
    suite.reset_fake()
    feed_share(suite.update_fake, fake, share)
    scores["after reset"] = suite.compute()

    loaded = build()
    loaded.load_real_state(load_file(folder / "real.safetensors"))
    feed_share(loaded.update_fake, fake, share)
    scores["loaded"] = loaded.compute()
    if share.start:
        save_file(suite.real_state(), folder / f"state-{share.start}-{share.step}.safetensors")
    return scores


def run_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for world, shares in SHARES.items():
        if rank >= world:
            continue
        meeting = f"file://{folder}/meeting-{world}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
        scores = score_share(shares[rank], folder)
        (folder / f"scores-{world}-{rank}.json").write_text(json.dumps(scores))
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def single() -> GenerationMetrics:
    suite = build()
    for update, images in zip((suite.update_real, suite.update_fake), pictures(), strict=True):
        feed(update, images)
    return suite


@pytest.fixture(scope="module")
def folder(tmp_path_factory, single) -> Path:
    """What three processes wrote, which met once as two and once as three."""
    folder = tmp_path_factory.mktemp("processes")
    save_file(single.real_state(), folder / "real.safetensors")
    torch.multiprocessing.set_forkserver_preload([__name__])  # the slow imports once, not in each process
    torch.multiprocessing.start_processes(run_process, (folder,), nprocs=3, start_method="forkserver")
    return folder


@pytest.mark.parametrize("world", SHARES)
def test_scores_do_not_depend_on_the_number_of_processes(world, folder, single):
    expected = single.compute()
    assert 0 < expected["precision_pixels"] < 1 and expected["fd_pixels"] > 0.01
    by_rank = [json.loads((folder / f"scores-{world}-{rank}.json").read_text()) for rank in range(world)]
    assert all(scores == by_rank[0] for scores in by_rank)
    for case, scores in by_rank[0].items():
        assert scores == pytest.approx(expected, rel=1e-11), case


def test_real_state_is_of_all_processes(folder, single):
    states = list(folder.glob("state-*.safetensors"))
    assert len(states) == 2
    for path in states:
        state = load_file(path)
        assert torch.equal(state["features"], single.real_state()["features"])
        torch.testing.assert_close(state, single.real_state(), rtol=1e-12, atol=1e-14)
