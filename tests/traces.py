"""Golden traces: the first losses of each tiny preset, by which a change that only moves code is known to be one.

python -m tests.traces          # write tests/traces.json anew, after a change that is meant to change what is learned
"""

import json
import os
import tempfile
from pathlib import Path

STEPS = 20
FILE = Path(__file__).with_suffix(".json")
TINY = sorted(path.stem for path in (Path(__file__).parent.parent / "configs/tiny").glob("*.yaml"))


def trace(preset: str, root: Path, run_dir: Path) -> list[float]:
    """The loss of each of the first `STEPS` steps of a tiny preset on the data set in `root`."""
    from jobs.run.config import load_config
    from jobs.train import train
    from tests.conftest import REPOSITORY

    settings = [f"data.root={root}", f"run_dir={run_dir}", f"train.max_steps={STEPS}", "hardware.threads=1"]
    settings += ["train.validate_every_steps=1000", "evaluation.images=0", "evaluation.grid=0"]  # that is, never
    settings += ["train.log_every_steps=1", f"tracking.uri=sqlite:///{run_dir.parent}/mlruns.db"]
    train(load_config([REPOSITORY / f"configs/tiny/{preset}.yaml"], [*settings, "checkpoint.monitor=val/loss"]))
    events = (json.loads(line) for line in (run_dir / "tracking/events.jsonl").read_text().splitlines())
    return [event["values"]["train/loss"] for event in events if "train/loss" in event.get("values", ())]


def main() -> None:
    """Write the traces of all tiny presets."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # as tests have it, before torch is imported
    from omegaconf import OmegaConf

    from tests.conftest import REPOSITORY, Phantoms

    with tempfile.TemporaryDirectory() as folder:
        phantoms = Phantoms(Path(folder))
        traces = {}
        for preset in TINY:
            name = OmegaConf.load(REPOSITORY / f"configs/tiny/{preset}.yaml").data.name
            traces[preset] = trace(preset, phantoms[name], Path(folder, "runs", preset))
    FILE.write_text(json.dumps(traces, indent=1) + "\n")


if __name__ == "__main__":
    main()
