"""Retrieval against all orders of what ties, against counting by hand, and in any batches and processes."""

from itertools import pairwise, permutations
from math import comb

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from metrics.retrieval import RANKS, RetrievalScores, recall_at, score_names
from tests.processes import together


def by_all_orders(rank: int, scores: list[float], relevant: list[bool]) -> float:
    """The share of the orders, of those that sort the scores, with a relevant one among the first."""
    orders = [o for o in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in pairwise(o))]
    return sum(any(relevant[i] for i in order[:rank]) for order in orders) / len(orders)


@pytest.mark.parametrize("seed", range(8))
def test_ties_count_as_the_mean_over_their_orders(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(3, (4, 6), generator=generator).double()
    relevant = torch.rand(4, 6, generator=generator) < 0.4
    relevant[:, 2] = True
    for rank in (1, 2, 3, 5, 6, 9):
        expected = [by_all_orders(rank, s, r) for s, r in zip(scores.tolist(), relevant.tolist(), strict=True)]
        assert recall_at(rank, scores, relevant).tolist() == pytest.approx(expected, abs=1e-12)


def test_scores_that_say_nothing_have_the_recall_of_chance():
    relevant = torch.zeros(1, 90, dtype=torch.bool)
    relevant[0, :7] = True
    chance = 1 - comb(83, 10) / comb(90, 10)
    assert recall_at(10, torch.zeros(1, 90).double(), relevant).item() == pytest.approx(chance, rel=1e-12)


def test_scores_by_hand():
    """Three pictures; prompts 0 (of pictures A and B), 1 (of C), 2 (of C), and 3, which none of them has."""
    a, b, c = torch.eye(3)
    metric = RetrievalScores()
    metric.update(torch.stack([a, b, c, c]), torch.tensor([50, 40, 30, 30]), torch.tensor([0, 0, 1, 2]))
    # Nearest to A its own; to B prompt 1, a stranger; to C prompt 3, which only zero-shot accuracy knows, then 2.
    metric.compare_with(torch.tensor([[0.9, 0.3, 0.0], [0.1, 0.8, 0.1], [0.0, 0.0, 0.7], [0.0, 0.0, 0.9]]))
    values = metric.compute()
    assert list(values) == score_names()
    assert values["image_to_text_recall_1"] == pytest.approx(2 / 3)
    assert values["image_to_text_recall_5"] == 1
    assert values["text_to_image_recall_1"] == pytest.approx(2 / 3)  # 0 finds A, 2 finds C, 1 finds B
    assert values["text_to_image_recall_10"] == 1
    assert values["zero_shot_accuracy"] == pytest.approx(1 / 3)


def rows(count: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of 15 pictures with prompts of 12 kinds, and the embeddings of these; two of the pictures are the same."""
    generator = torch.Generator().manual_seed(3)
    known = torch.nn.functional.normalize(torch.randn(27, 8, generator=generator), dim=-1)
    known[1] = known[0]
    ids = torch.randint(15, (count,), generator=generator)
    noise = 1e-7 * torch.randn(count, 8, generator=generator)  # as another batch would compute them
    return known[ids] + noise, ids * 10**15, torch.randint(12, (count,), generator=generator), known[15:]


def scored(parts: list[list[int]]) -> dict[str, float]:
    embeddings, ids, prompts, known = rows()
    metric = RetrievalScores()
    for part in parts:
        metric.update(embeddings[part], ids[part], prompts[part])
    metric.compare_with(known)
    return metric.compute()


WHOLE = [list(range(40))]


def of_one_process(rank: int) -> None:
    dist.init_process_group("gloo")
    found = scored([[0, 1], list(range(5, 18)), []] if rank else [[39, 2, 3, 4, *range(18, 39)]])
    assert found == scored_alone(), found
    dist.destroy_process_group()


def scored_alone() -> dict[str, float]:
    embeddings, ids, prompts, known = rows()
    metric = RetrievalScores(sync_on_compute=False)
    metric.update(embeddings, ids, prompts)
    metric.compare_with(known)
    return metric.compute()


def test_batches_and_processes_change_nothing(tmp_path):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4)).tolist()
    assert scored([order[:3], [], order[3:30], order[30:]]) == scored(WHOLE)
    assert any(0 < value < 1 for value in scored(WHOLE).values())
    together(2, of_one_process, log=tmp_path / "log")


def test_no_pairs_have_no_scores():
    metric = RetrievalScores()
    metric.update(torch.zeros(0, 8), torch.zeros(0).long(), torch.zeros(0).long())
    metric.compare_with(torch.zeros(3, 8))
    assert metric.compute() == {}
    assert len(score_names()) == 2 * len(RANKS) + 1
