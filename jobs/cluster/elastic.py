"""An agent of torchrun that knows what the exit codes of a training mean; see jobs/cluster/pod.py."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click
from torch.distributed import DistError
from torch.distributed.elastic.agent.server import WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from medsynth.exit_codes import NO_PROGRESS, PREEMPTED, USER_ERROR

# How long pods that have ended keep the store for the one that still exports the model.
_EXPORT_SECONDS = 3600.0
_ENDED_BY_SIGTERM = {-signal.SIGTERM, 128 + signal.SIGTERM}


def run(
    program: Sequence[str],
    nodes: int,
    processes: int,
    endpoint: str,
    run_id: str,
    address: str,
    index: int,
    restarts: int,
    wait: int,
    grace: int,
) -> int:
    """Run `program`, arguments of python, in `processes` workers of pod `index` of `nodes`; the pod's exit code.

    endpoint: HOST:PORT of the first pod. address: this pod's IP address, another one in every pod that ever was.
    wait: seconds until a pod that finds no group gives up. grace: seconds that a save may take.
    """
    # The workers alone answer SIGTERM; torch would kill them 30 s after.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT"
    # Each round its own store for the workers: of a shared one, a first agent that stays tells only the first round.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        if index > 0:
            _await_store(endpoint, wait)
        rendezvous = get_rendezvous_handler(_rendezvous(nodes, endpoint, run_id, address, index == 0, wait))
        spec = WorkerSpec(
            role="train",
            local_world_size=processes,
            rdzv_handler=rendezvous,
            entrypoint=sys.executable,
            args=("-u", *program),
            max_restarts=restarts,
            local_addr=address,
        )
        agent = Agent(spec, grace)
        signal.signal(signal.SIGTERM, lambda *_: agent.terminate())
        result = agent.run()
    except (RendezvousError, DistError) as error:
        click.echo(f"medsynth: the other pods are out of reach ({error}); a new pod goes on from here", err=True)
        return PREEMPTED
    if result is None:  # the group was closed while this pod waited to join it
        return PREEMPTED
    return exit_code(_codes(result), agent.terminated)


def exit_code(codes: Iterable[int], terminated: bool = False) -> int:
    """A pod's exit code from the exit codes of its failed workers, negative where a signal killed one.

    terminated: SIGTERM was passed to the workers, so that ending by it unsaved is no failure.
    """
    codes = set(codes)
    if final := codes & {USER_ERROR, NO_PROGRESS}:
        return min(final)
    if terminated:
        codes = {PREEMPTED if code in _ENDED_BY_SIGTERM else code for code in codes}
    if codes <= {PREEMPTED}:
        return max(codes, default=0)
    return 1


class Agent(LocalElasticAgent):
    """torchrun's agent of one pod: passes SIGTERM on, and restarts workers only where that can help."""

    def __init__(self, spec: WorkerSpec, grace: float):
        """grace: seconds for the others to end a save, after a first worker has."""
        super().__init__(spec, DefaultLogsSpecs(), exit_barrier_timeout=_EXPORT_SECONDS)
        self.terminated, self._grace = False, grace
        self._first_end: float | None = None  # when the first worker ended with PREEMPTED, monotonic seconds

    def terminate(self) -> None:
        """Let the workers save and end; where none runs, end at once: with 0 if they have finished."""
        self.terminated = True
        workers = self._processes()
        running = [worker for worker in workers if worker.returncode is None]
        if not running:
            finished = workers and not any(worker.returncode for worker in workers)
            sys.exit(0 if finished else PREEMPTED)
        for worker in running:
            worker.send_signal(signal.SIGTERM)

    def _processes(self) -> list[subprocess.Popen[Any]]:
        """The workers'; none before the first are started."""
        if not isinstance(self._pcontext, SubprocessContext):
            return []
        return [handler.proc for handler in self._pcontext.subprocess_handlers.values()]

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self.terminated:  # while workers were being stopped for a restart
            sys.exit(PREEMPTED)
        super()._rendezvous(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._is_saving():
            return RunResult(state=WorkerState.HEALTHY)
        result = super()._monitor_workers(worker_group)
        if result.is_failed() and (self.terminated or exit_code(_codes(result)) != 1):
            self._remaining_restarts = 0
        return result

    def _is_saving(self) -> bool:
        """Whether some workers have ended with PREEMPTED and others still save, which torch would cut short."""
        codes = [worker.poll() for worker in self._processes()]
        if None not in codes or PREEMPTED not in codes:
            return False
        self._first_end = self._first_end or time.monotonic()
        return time.monotonic() < self._first_end + self._grace


def _codes(result: RunResult) -> list[int]:
    return [failure.exitcode for failure in result.failures.values()]


def _await_store(endpoint: str, wait: float) -> None:
    """Wait until the first pod answers at `endpoint`; torch would do so too, but deaf to signals."""
    host, _, port = endpoint.rpartition(":")
    deadline = time.monotonic() + wait
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousTimeoutError(f"{endpoint}: {error}") from error
        time.sleep(1)


def _rendezvous(nodes: int, endpoint: str, run_id: str, address: str, is_first: bool, wait: int):
    return RendezvousParameters(
        backend="c10d",
        # The first pod keeps the store, and reaches it before its own name is in DNS.
        endpoint=f"{address}:{endpoint.rpartition(':')[2]}" if is_first else endpoint,
        run_id=run_id,
        min_nodes=nodes,
        max_nodes=nodes,
        # The store knows a pod by address and process id, and that id is 1 in all. Under a host name the pod that
        # replaces a lost one would be taken for it, and be given its place in a round that is over.
        local_addr=address,
        is_host=is_first,
        join_timeout=wait,
    )
