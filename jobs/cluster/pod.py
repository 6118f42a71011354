"""What a pod of a training Job runs: one agent of torchrun, which ends with the exit code of the training.

    python -m jobs.cluster.pod --nodes 2 --processes 8 --endpoint llcm-train-0.llcm-train:29500 --id llcm-train \
        --address 10.0.0.7 --index 0 --restarts 3 --wait 900 --grace 540 -- -m jobs.train config.yaml

torchrun itself ends with 1 whatever its workers end with, and restarts them after every failure. Here

    0, 2, 76    (finished, a user's mistake, no progress) end the pod at once: a restart would change nothing;
    75          (preempted and saved, or the other pods are out of reach) ends it too: a new pod goes on;
    any other   restarts the workers in place, with those of all pods, `--restarts` times, and then ends it with 1.

SIGTERM is passed on to the workers, which save together and end with 75.
"""

import os
import signal
import sys

import click

from medsynth.exit_codes import PREEMPTED


@click.command()
@click.option("--nodes", type=click.IntRange(1), required=True, help="Pods of the group.")
@click.option("--processes", type=click.IntRange(1), required=True, help="Workers of this pod, one a GPU.")
@click.option("--endpoint", required=True, help="HOST:PORT of the first pod, where all meet.")
@click.option("--id", "run_id", required=True, help="Name of the group.")
@click.option("--address", required=True, help="This pod's own IP address.")
@click.option("--index", type=click.IntRange(0), envvar="JOB_COMPLETION_INDEX", required=True, help="Which pod it is.")
@click.option("--restarts", type=click.IntRange(0), required=True, help="Restarts in place after failures of workers.")
@click.option("--wait", type=click.IntRange(1), required=True, help="Seconds that pods wait for each other.")
@click.option("--grace", type=click.IntRange(0), required=True, help="Seconds that a save may take.")
@click.argument("program", nargs=-1, required=True)
def main(program: tuple[str, ...], **options) -> None:
    """Run PROGRAM, arguments of python, in the workers of a group of pods."""
    # The first process of a container has no default action for SIGTERM, and torch takes seconds to import.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
    from jobs.cluster.elastic import run

    try:
        code = run(program, **options)
    except SystemExit as ending:  # by SIGTERM, with nothing to save
        code = ending.code if isinstance(ending.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread of torch that still talks to a store which is gone aborts the end of the interpreter.
    os._exit(code)


if __name__ == "__main__":
    main()
