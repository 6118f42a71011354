"""A run that is asked to leave saves and leaves; one that comes no further stops coming back."""

import json
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.checkpoint import save
from callbacks.divergence import Diverged
from callbacks.durable import read_manifest
from medsynth.errors import UserError
from medsynth.exit_codes import INTERRUPTED, NO_PROGRESS, PREEMPTED
from medsynth.files import read_object, write_whole
from medsynth.ranges import number

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
ATTEMPTS_FILE = "attempts.json"
_ECHO_SECONDS = 2.0
_IDLE_SECONDS = 5.0  # in which a process that Ctrl-C finds outside of training comes to its end


class Preempted(SystemExit):
    """The run was asked to leave, and has saved if it could."""

    def __init__(self, code: int = PREEMPTED):
        super().__init__(code)


class DifferentCheckpoints(UserError):  # noqa: N818
    """The processes came back from different checkpoints; another start may find one."""

    exit_code = 1


class NoProgress(UserError):  # noqa: N818
    """The run was started again and again and never came further."""

    exit_code = NO_PROGRESS


@dataclass
class PreemptionConfig:
    """How a run that is asked to leave does so."""

    grace_seconds: float = number(120.0, above=0)
    """Longest time from the signal to the end, saving included; then the process ends at once, saved or not."""
    restarts: int = number(3, least=1)
    """Starts from one and the same step after which the run stops for good."""


class StopRequest:
    """Whether SIGUSR1, SIGTERM or SIGINT (Ctrl-C) has come to this process.

    The signals wake a thread through a pipe: it hears of them even where the main thread waits for a process that no
    longer answers. A second signal, or `grace_seconds` without an end, ends the process on the spot: with 75 where it
    is `saved`, else with 143, and after Ctrl-C with 130. Of two within 2 seconds the second is an echo: launchers pass
    on what came to all; but a second Ctrl-C is a person's.

    While it is not `training`, Ctrl-C raises `Preempted` at once, for there is nothing to save.
    """

    def __init__(self, grace_seconds: float):
        self.grace_seconds = grace_seconds
        self.saved = False  # whether a start from the newest checkpoint loses nothing
        self.training = False  # whether steps are taken, after which it is looked whether a signal has come
        self.interrupted = False  # whether a person has asked, by Ctrl-C
        self._since: float | None = None
        self._deadline: threading.Timer | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._since is not None

    @property
    def exit_code(self) -> int:
        """What a run that is asked to leave ends with."""
        return INTERRUPTED if self.interrupted else PREEMPTED

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Inside, the signals are requests; for the main thread."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before = {number: signal.signal(number, self.answer) for number in SIGNALS}
        waking = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        _parents.add(os.getpid())
        listener = threading.Thread(target=self._listen, args=(reading,), daemon=True, name="signals")
        listener.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(waking)
            for number, handler in before.items():
                signal.signal(number, handler)
            _parents.discard(os.getpid())
            os.close(writing)  # ends the thread
            listener.join()
            if self._deadline:
                self._deadline.cancel()

    def _listen(self, reading: int) -> None:
        while received := os.read(reading, 64):
            for signum in received:
                if signum in SIGNALS:
                    self._receive(signal.Signals(signum))
        os.close(reading)

    def _receive(self, number: signal.Signals) -> None:
        now, by_hand = time.monotonic(), number is signal.SIGINT
        if self._since is not None:
            echoes = not (by_hand and self.interrupted) or "TORCHELASTIC_RUN_ID" in os.environ
            self.interrupted |= by_hand
            if not echoes or now - self._since > _ECHO_SECONDS:
                self._end(f"second signal, {number.name}")
            return
        self._since, self.interrupted = now, by_hand
        again = "; once more ends it at once" if by_hand else ""
        if self.training or not by_hand:
            _say(f"{number.name}: saving at the end of this step, then leaving{again}")
        else:
            _say(f"{number.name}: leaving; there is nothing to save")
        seconds = self.grace_seconds if self.training or not by_hand else min(_IDLE_SECONDS, self.grace_seconds)
        self._deadline = threading.Timer(seconds, self._end, [f"{seconds:g} s after {number.name}"])
        self._deadline.daemon = True
        self._deadline.start()

    def answer(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread, beside what the other has heard of it."""
        if number == signal.SIGINT and not self.training:
            self.interrupted = True
            raise Preempted(INTERRUPTED)

    def _end(self, why: str) -> None:
        if self.saved:
            _say(f"{why}: saved, leaving at once; what has not reached MLflow is sent at the next start")
            os._exit(self.exit_code)
        _say(f"{why}: leaving without saving; the run goes on from its last checkpoint")
        os._exit(INTERRUPTED if self.interrupted else 128 + signal.SIGTERM)


class Preemption(Checkpoint):
    """Stops all processes at one step when any of them was asked to, with a checkpoint, and exit code 75, or 130 where
    that was by Ctrl-C.

    After each optimizer step the processes tell each other, and act on what was told one step before: nobody waits, and
    all leave at the same step. In a validation they agree on the spot; it is not finished.

    Every checkpoint, whoever saves it, owes the validation that is due at its step until that is done: a run resumed
    from it begins with that validation.

    At the start processes that came back from different steps are refused, as where `run_dir` is not one folder for all
    machines, or a file system still shows one of them the checkpoint before; and so is a run that came back `restarts`
    times to the same step.
    """

    def __init__(
        self, config: PreemptionConfig, request: StopRequest, run_dir: Path, checkpoint: Path, on_error: str = "stop"
    ):
        """checkpoint: what to save on leaving. on_error: whether to leave all the same ("continue") if that fails."""
        self.config, self.request = config, request
        self._attempts = Path(run_dir) / ATTEMPTS_FILE
        self._checkpoint, self._on_error = checkpoint, on_error
        self._group: Any = None
        self._told: tuple[torch.Tensor, Any] | None = None  # of the step before: everyone's answer, on its way
        self._step = 0
        self._validating = False
        self._validated = -1  # index of the batch after which the newest validation was done

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.fit_loop.__class__ = _OwingFitLoop
        if trainer.world_size > 1:  # on the CPU: an agreement must not wait for a GPU's queue
            self._group = torch.distributed.new_group(backend="gloo")
            self._require_one_run()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._group is not None:
            self._require_one_checkpoint(trainer.ckpt_path)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_over(trainer)
        self._step = trainer.global_step
        starts = trainer.strategy.broadcast(self._count(trainer.global_step) if trainer.is_global_zero else 0)
        if starts > self.config.restarts:
            raise NoProgress(
                f"started {starts} times from step {trainer.global_step} without coming further; the log of the starts "
                f"before says why. Remove {self._attempts} to try again"
            )
        self.leave_if_asked()  # nothing is new since the checkpoint that training began with

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # within an accumulation
        self._step = trainer.global_step
        if self._tell():
            self._save(trainer)
            raise Preempted(self.request.exit_code)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validating = True
        # An owed one counts a batch as begun, and would be taken for owed ever after.
        total = _validation_batches(trainer.fit_loop)
        total.ready = total.started = total.processed

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.leave_if_asked()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Before `on_validation_end`, where the checkpoints are saved that a validation is done in.
        self._validating = False
        self._validated = trainer.fit_loop.total_batch_idx

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # Now, and not where it was raised: the average stood in the live weights there.
        if isinstance(exception, Preempted) and self._validating:
            self._save(trainer)
        if isinstance(exception, Diverged) and trainer.is_global_zero:
            self._attempts.unlink(missing_ok=True)  # not in vain: it came further, and says what to change
        if isinstance(exception, Preempted | KeyboardInterrupt):
            for logger in trainer.loggers:
                logger.finalize("interrupted")  # Lightning is about to tell them "failed"

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._owes_validation(trainer):
            return
        # As if the batch were done with and the validation's first under way: else Lightning takes it for validated.
        progress = checkpoint["loops"]["fit_loop"]
        for counts in (progress["epoch_loop.batch_progress"][which] for which in ("total", "current")):
            counts["completed"] = counts["processed"]
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        progress["epoch_loop.val_loop.batch_progress"]["total"].update(begun)
        progress["epoch_loop.val_loop.batch_progress"]["current"].update(dict.fromkeys(begun, 0))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.request.saved, self.request.training = True, False  # by the callbacks before this one
        if trainer.is_global_zero:
            self._attempts.unlink(missing_ok=True)

    def leave_if_asked(self) -> None:
        """Agree on the spot, and leave if any process was asked to; for all processes together."""
        if self._agree():
            self.request.saved = not self._validating  # before training nothing is new; within a validation, see above
            raise Preempted(self.request.exit_code)

    def _save(self, trainer: L.Trainer) -> None:
        self.request.saved = save(trainer, self._checkpoint, self._on_error)

    def _owes_validation(self, trainer: L.Trainer) -> bool:
        """Whether a validation is due where training stands, and not done."""
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        return (
            trainer.state.fn == TrainerFn.FITTING
            and loop.total_batch_idx != self._validated
            and fetcher is not None
            and loop._should_check_val_fx(fetcher)
        )

    def _require_one_run(self) -> None:
        """Before networks are compared: of a job of several runs, each process has looked for itself which are done."""
        names = self._gathered(zlib.crc32(str(self._attempts).encode()))
        for rank, name in enumerate(names):
            if name != names[0]:
                raise DifferentCheckpoints(
                    f"rank 0 goes on with another run than rank {rank}, one of them with {self._attempts.parent}: "
                    "start again; a shared file system may show a change late"
                )

    def _gathered(self, number: int) -> list[int]:
        """The number of each process."""
        own = torch.tensor([number])
        numbers = [torch.zeros_like(own) for _ in range(self._group.size())]
        torch.distributed.all_gather(numbers, own, group=self._group)
        return [int(each) for each in numbers]

    def _require_one_checkpoint(self, path: str | Path | None) -> None:
        """Before any process begins to load a part of one of them, and waits for the others."""
        steps = self._gathered(read_manifest(path)["global_step"] if path else 0)
        first = steps[0]
        for rank, step in enumerate(steps):
            if step != first:
                raise DifferentCheckpoints(
                    f"rank 0 goes on from step {first}, rank {rank} from step {step}: run_dir must be one folder for "
                    "all machines. If it is, start again: a shared file system may show a change late"
                )

    def _take_over(self, trainer: L.Trainer) -> None:
        """Lightning has set its own handler of SIGTERM, which leaves without saving; and before each batch it asks all
        processes whether one got the signal, for which each waits until its GPU has nothing left to do."""
        self.request.training = True
        for signum in SIGNALS:
            signal.signal(signum, self.request.answer)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _tell(self) -> bool:
        """Send this process's answer, and give everyone's of the step before."""
        if self._group is None:
            return self.request.requested
        before, answer = self._told, self._own_answer()
        self._told = (answer, torch.distributed.all_reduce(answer, group=self._group, async_op=True))
        if before is None:
            return False
        before[1].wait()
        return self._understood(before[0])

    def _agree(self) -> bool:
        """Everyone's answer now."""
        if self._group is None:
            return self.request.requested
        answer = self._own_answer()
        torch.distributed.all_reduce(answer, group=self._group)
        return self._understood(answer)

    def _own_answer(self) -> torch.Tensor:
        """float32 (2,): whether this process was asked to leave, and whether by hand."""
        return torch.tensor([self.request.requested, self.request.interrupted], dtype=torch.float32)

    def _understood(self, answers: torch.Tensor) -> bool:
        """Whether any process was asked to leave; all then end alike."""
        self.request.interrupted |= bool(answers[1])
        return bool(answers[0])

    def _count(self, step: int) -> int:
        """Starts from this step, this one among them, kept in the run directory."""
        try:
            before = read_object(self._attempts)
            starts = before["starts"] + 1 if before["step"] == step else 1
        except (OSError, ValueError, KeyError, TypeError):
            starts = 1
        with suppress(OSError):  # a full disk costs the count, and not the run
            self._attempts.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._attempts, json.dumps({"step": step, "starts": starts}) + "\n")
        return starts


def _validation_batches(loop: _FitLoop) -> _ProcessedTracker:
    """The counts of validation batches over the whole run."""
    return cast(_ProcessedTracker, loop.epoch_loop.val_loop.batch_progress.total)


class _OwingFitLoop(_FitLoop):
    """Lightning's, which leaves at once where no step is left, but for a checkpoint that owes a validation."""

    @property
    def done(self) -> bool:
        batches = _validation_batches(self)
        return super().done and not (self.restarting and batches.processed < batches.started)


_parents: set[int] = set()  # processes that listen


def _begin_fork() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _end_fork() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _begin_child() -> None:
    """A DataLoader's worker leaves signals to its parent: a batch system sends them to all processes of a job."""
    if os.getppid() in _parents:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    _end_fork()


# Until it has begun, a child would pass on its signals as the parent's.
os.register_at_fork(before=_begin_fork, after_in_parent=_end_fork, after_in_child=_begin_child)


def _say(line: str) -> None:
    # Not print: its lock may be held by the main thread, which may hang.
    os.write(2, f"medsynth: {line}\n".encode())
