"""The one exception that means "the user can mend this"."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from medsynth.exit_codes import GATE, USER_ERROR


class UserError(ValueError):
    """A mistake in a config, a data set, a weights folder or a command line.

    The message is what the user reads: it names the file, row or key and the mend. The command line prints it without a
    traceback and leaves with `exit_code`.
    """

    exit_code = USER_ERROR


class GateClosed(UserError):  # noqa: N818
    """A score does not pass the gate that was set for it; the report is written."""

    exit_code = GATE


class WorkerLost(UserError):  # noqa: N818
    """A process that reads data was killed; another start may go through."""

    exit_code = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for the known word most like `word`, or the list of all where none is."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Inside, the end of a DataLoader's worker is one line; torch raises it wherever the main thread just is.

    Raises:
        WorkerLost: so it was.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not said.startswith("DataLoader worker (pid"):
            raise
        _end_others()
        mend = "give the job more memory, or set fewer data.workers (evaluate: --workers)"
        raise WorkerLost(
            f"{said.splitlines()[0].partition(' It is')[0].rstrip('. ')}: as a rule by a machine that has no memory "
            f"left; {mend}, and start again: a run goes on from its last checkpoint"
        ) from error


def _end_others() -> None:
    """Kill all children: workers are deaf to SIGTERM, by which Python would end them, and it would wait for them."""
    told = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises of each of these, too
    for other in multiprocessing.active_children():
        other.kill()
        other.join(5)
    signal.signal(signal.SIGCHLD, told or signal.SIG_DFL)
