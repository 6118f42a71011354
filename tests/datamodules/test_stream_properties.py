"""The sample stream's promise, over every length, layout of processes, stop and resume that hypothesis thinks of."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.stream import EvaluationSampler, SampleStream, StreamBatchSampler, StreamLoader
from tests.datamodules.test_stream import Positions

SEED = 7
STABLE = settings(max_examples=100, deadline=None, derandomize=True)

Layout = tuple[int, int, int]  # device batch, accumulation, processes


def layouts(global_batch: int) -> list[Layout]:
    """Every way to divide a global batch."""
    sizes = range(1, global_batch + 1)
    return [
        (batch, accumulate, world)
        for batch in sizes
        for accumulate in sizes
        for world in sizes
        if batch * accumulate * world == global_batch
    ]


@st.composite
def runs(draw) -> tuple[int, int, list[tuple[Layout, int]]]:
    """Length of the data set, global batch, and of each start its layout and the micro-batches until it is stopped."""
    global_batch = draw(st.integers(1, 12))
    starts = st.tuples(st.sampled_from(layouts(global_batch)), st.integers(0, 14))
    return draw(st.integers(1, 30)), global_batch, draw(st.lists(starts, min_size=1, max_size=4))


class Process:
    """One process of a start; `take` is a micro-batch as (position, "(pass, index)") of each sample."""

    def __init__(self, length: int, layout: Layout, rank: int, state: dict[str, int]):
        batch, accumulate, world = layout
        self.loader = StreamLoader(Positions(length, SEED), StreamBatchSampler(length, batch, accumulate, rank, world))
        self.loader.load_state_dict(state)
        self._batches = self._endless()

    def _endless(self):
        while True:
            yield from self.loader

    def take(self) -> list[tuple[int, str]]:
        batch = next(self._batches)
        return list(zip(batch.seeds.tolist(), batch.conditions.captions, strict=True))


@STABLE
@given(runs())
def test_whole_steps_are_the_undisturbed_stream_whoever_trains_and_wherever_it_stops(run):
    length, global_batch, starts = run
    learned: list[tuple[int, str]] = []  # samples of whole steps, over all starts
    state = {"position": 0}
    for layout, stop in starts:
        _, accumulate, world = layout
        processes = [Process(length, layout, rank, state) for rank in range(world)]
        taken = [sample for _ in range(stop) for process in processes for sample in process.take()]
        whole = stop // accumulate * global_batch
        saved = [process.loader.state_dict() for process in processes]
        assert saved == [{"position": state["position"] + whole}] * world
        learned += taken[:whole]
        state = saved[0]
    undisturbed = SampleStream(length, SEED)
    assert learned == [(position, str(undisturbed(position))) for position in range(state["position"])]
    assert len({sample for _, sample in learned}) == len(learned), "each once a pass"


@STABLE
@given(st.integers(1, 40), st.integers(0, 2**62), st.lists(st.integers(0, 400), max_size=20))
def test_each_pass_is_a_permutation_and_any_position_can_be_asked_for_first(length, seed, asked):
    forward = SampleStream(length, seed)
    stream = [forward(position) for position in range(401)]
    for number in range(401 // length):
        drawn = stream[number * length : (number + 1) * length]
        assert sorted(drawn) == [(number, index) for index in range(length)]
    anyhow = SampleStream(length, seed)
    assert [anyhow(position) for position in asked] == [stream[position] for position in asked]


@STABLE
@given(st.integers(0, 80), st.integers(1, 8), st.integers(1, 6))
def test_evaluation_sees_every_index_once_in_equally_many_batches(length, batch_size, world):
    samplers = [EvaluationSampler(length, batch_size, rank, world) for rank in range(world)]
    dealt = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in dealt] == [len(sampler) for sampler in samplers] == [len(dealt[0])] * world
    in_turn = [batch for turn in zip(*dealt, strict=True) for batch in turn]
    real = [batch for batch in in_turn if batch != [-1]]
    assert [index for batch in real for index in batch] == list(range(length))
    assert in_turn == real + [[-1]] * (len(in_turn) - len(real)), "padding stands beyond the end only"
    assert len(in_turn) - len(real) < world
    assert all(len(batch) == batch_size for batch, _ in pairwise(real)), "only the last batch is short"
