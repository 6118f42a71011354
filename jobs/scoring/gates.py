"""Gates: what a score must be for pictures to be released."""

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.run.registry import nearest
from medsynth.errors import GateClosed, UserError

_COMPARES: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt
}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """`score` compared by `sign` with `bound`."""

    score: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.score}{self.sign}{self.bound:g}"


def read_gates(texts: Iterable[str]) -> list[Gate]:
    """What "memorisation<0.01" and its like say; raises UserError where one is no gate."""
    gates = []
    for text in texts:
        said = re.fullmatch(r"\s*([\w-]+)\s*(<=|>=|<|>)\s*(\S+)\s*", text)
        try:
            gates.append(Gate(said[1], said[2], float(said[3])) if said else Gate("", "", float(text)))
        except ValueError:
            raise UserError(f"--gate {text!r}: write SCORE<NUMBER, or with <=, > or >=, as memorisation<0.01") from None
        if not said or gates[-1].bound != gates[-1].bound:
            raise UserError(f"--gate {text!r}: write SCORE<NUMBER, or with <=, > or >=, as memorisation<0.01")
    return gates


def check_gates(gates: Sequence[Gate], scores: Iterable[str]) -> None:
    """Raise UserError, before the work, where a gate names a score that will not be there."""
    known = list(scores)
    for gate in gates:
        if gate.score not in known:
            raise UserError(f"--gate {gate}: there will be no such score{nearest(gate.score, known)}")


def hold_gates(gates: Sequence[Gate], scores: Mapping[str, float]) -> None:
    """Raise GateClosed where a score does not pass, or was left out of pictures that are too few."""
    closed = []
    for gate in gates:
        value = scores.get(gate.score)
        if value is None or not _COMPARES[gate.sign](value, gate.bound):
            closed.append(f"{gate} is not so: it is {'not there' if value is None else f'{value:.6g}'}")
    if closed:
        raise GateClosed("; ".join(closed))
