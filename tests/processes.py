"""Several processes of one program, forked after the libraries are imported, as torchrun would start them."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("fork")


def begin(number: int, work: Callable[..., Any], *arguments: Any, log: Path) -> list[multiprocessing.Process]:
    """Start `work(rank, *arguments)` in each of `number` processes; what they write is in `log`.RANK."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = [
        FORK.Process(target=_child, args=(rank, number, port, _log_of(log, rank), work, arguments))
        for rank in range(number)
    ]
    for child in children:
        child.start()
    return children


def together(number: int, work: Callable[..., Any], *arguments: Any, log: Path, seconds: float = 300) -> list[str]:
    """Run `work(rank, *arguments)` in each of `number` processes; what each wrote. Fails where one fails or hangs."""
    children = begin(number, work, *arguments, log=log)
    for child in children:
        child.join(seconds)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    said = [_log_of(log, rank).read_text() for rank in range(number)]
    assert codes == [0] * number, f"exit codes {codes}\n" + "\n".join(text[-3000:] for text in said)
    return said


def _log_of(log: Path, rank: int) -> Path:
    return log.with_name(f"{log.name}.{rank}")


def _child(rank: int, number: int, port: int, log: Path, work: Callable[..., Any], arguments: tuple) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {key: str(value) for key, value in place.items()}
    try:
        work(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # without the parent's handlers of exit
