"""The resumable order of samples.

A run's order is one endless stream of samples: position p belongs to pass p // n and is the (p mod n)-th sample of
that pass's permutation. Order, augmentation and training noise are functions of (seed, position), never of the process:
whoever draws position p gets the same picture, prompt and noise, on one process or on eight, before a restart or after.
"""

import errno
import hashlib
import multiprocessing.queues
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from datamodules.batches import ImageBatch, collate
from medsynth.errors import UserError


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of `parts`, for instance `(run seed, "noise", position)`."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)  # NumPy's integers print otherwise
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SampleOrder(Protocol):
    """stream position -> (pass, index); a pass is `length` positions."""

    length: int

    def __call__(self, position: int) -> tuple[int, int]: ...


class SampleStream:
    """The endless shuffled stream over a data set of `length` samples: stream position -> (pass, index).

    Each pass is one permutation, drawn from (seed, pass), so that every index comes exactly once a pass.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._permutations: dict[int, Tensor] = {}

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.length)
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            # A batch spans at most two passes unless the set is smaller than the batch: keep only the newest few.
            self._permutations = {e: p for e, p in self._permutations.items() if e >= epoch - 1}
            self._permutations[epoch] = torch.randperm(self.length, generator=generator)
        return epoch, int(self._permutations[epoch][offset])


class StreamBatchSampler(Sampler[list[int]]):
    """Stream positions of one process's micro-batches.

    Optimizer step s trains on positions [s·G, (s+1)·G), G = batch_size · accumulate · world_size, whatever the number
    of processes; a pass that does not divide by G runs on into the next, so no sample is dropped or repeated.
    An epoch is max(1, length // G) steps and starts at `position`.
    """

    def __init__(self, length: int, batch_size: int, accumulate: int = 1, rank: int = 0, world_size: int = 1):
        self.batch_size, self.accumulate, self.rank, self.world_size = (
            batch_size,
            accumulate,
            rank,
            world_size,
        )
        self.global_batch_size = batch_size * accumulate * world_size
        self.steps_per_epoch = max(1, length // self.global_batch_size)
        self.position = 0

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for micro in range(len(self)):
            first = self.position + (micro * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


class PlainLoader(DataLoader):
    """A DataLoader whose workers raise a `UserError` as it is: torch would put their whole traceback into its message.

    It takes what has items and a length; its `dataset` is another object, of the same items.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        collate_fn: Callable = collate,
        worker_init_fn: Callable[[int], None] | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("num_workers"):
            require_sockets()
        begin = partial(_begin_worker, worker_init_fn)
        told = partial(_collate_told, collate_fn)
        super().__init__(_Told(dataset), collate_fn=told, worker_init_fn=begin, **kwargs)

    # pyrefly: ignore[bad-override]  # torch's annotation promises its own private iterator
    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        while (batch := self._next(batches)) is not None:
            if isinstance(batch, _Mistake):
                self._end_workers()
                raise batch.error
            yield batch

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch, None behind the last, a mistake where this process can open no more files."""
        try:
            return next(batches, None)
        except RuntimeError as error:
            if "Too many open files" not in str(error):
                raise
            return _Mistake(_not_handed_over(error))

    def _end_workers(self) -> None:
        """End workers that are kept between passes: they are deaf to the signal by which Python would end them."""
        if isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            self._iterator._shutdown_workers()  # as Lightning does after a mistake in a training step
        self._iterator = None


@dataclass(frozen=True)
class _Mistake:
    """What a worker hands over in the place of a sample."""

    error: UserError


def _begin_worker(also: Callable[[int], None] | None, number: int) -> None:
    """Begin a worker: what it cannot hand over it tells, for else the one that waits for it would wait for ever."""
    multiprocessing.queues.Queue._on_queue_feeder_error = _tell  # which only prints it
    if also is not None:
        also(number)


def _tell(queue: Any, error: Exception, item: tuple[int, Any]) -> None:
    queue.put((item[0], _Mistake(_not_handed_over(error))))


def _not_handed_over(error: Exception) -> UserError:
    """Why a batch does not reach the process that waits for it, and what helps."""
    said = str(error).splitlines()[0]
    mend = "let TMPDIR be a folder with a short path that can be written"
    if "/torch_" in said or getattr(error, "errno", None) == errno.ENOSPC:
        mend = "/dev/shm is too small: start the container with a larger --shm-size"
    if "Too many open files" in said or getattr(error, "errno", None) == errno.EMFILE:
        said, mend = "too many open files", "raise `ulimit -n`"
    return UserError(f"a worker cannot hand over what it has read ({said}): {mend}; or take fewer workers, or 0")


def require_sockets() -> None:
    """Raise UserError where workers could not hand over anything: they do so by sockets among the temporary files."""
    try:
        with tempfile.TemporaryDirectory(prefix="pymp-") as folder, socket.socket(socket.AF_UNIX) as trial:
            trial.bind(f"{folder}/listener-12345678")  # as long as multiprocessing's
    except OSError as error:
        raise _not_handed_over(error) from None


class _Told(Dataset):
    """Items, or the mistake that keeps one from being read."""

    def __init__(self, items: Any):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.items[index]
        except UserError as error:
            return _Mistake(error)


def _collate_told(collate_fn: Callable, samples: Any) -> Any:
    told = samples if isinstance(samples, list) else [samples]
    return next((sample for sample in told if isinstance(sample, _Mistake)), None) or collate_fn(samples)


class StreamLoader(PlainLoader):
    """A loader over the stream that knows how far training has come, prefetching aside."""

    def __init__(self, dataset: Dataset[ImageBatch], sampler: StreamBatchSampler, **kwargs: Any):
        super().__init__(dataset, batch_sampler=sampler, **kwargs)
        self._stream = sampler
        self._taken = 0  # micro-batches handed out since `_stream.position`

    @property
    def position(self) -> int:
        """Samples of the stream that whole optimizer steps have consumed."""
        return self._stream.position + self._taken // self._stream.accumulate * self._stream.global_batch_size

    # pyrefly: ignore[bad-override]  # torch's annotation promises its own private iterator
    def __iter__(self) -> Iterator[ImageBatch]:
        self._stream.position, self._taken = self.position, 0
        for batch in super().__iter__():
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """What tells Lightning that a resume inside an epoch is sound."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._stream.position, self._taken = state["position"], 0


class EvaluationSampler(Sampler[list[int]]):
    """Batches of the indices 0 … length-1 in order, dealt out to the processes in turn.

    Every process gets the same number of batches, as sharded models need. Those beyond the end hold the index -1:
    padding, which `ImageBatch.seeds` marks and no average counts.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for turn in range(len(self)):
            first = (turn * self.world_size + self.rank) * self.batch_size
            yield list(range(first, min(first + self.batch_size, self.length))) or [-1]
