"""The manifests that are kept in k8s/: of every training preset, and of every job of stages.

`python -m jobs.study.manifests`, in the repository's root, writes them anew.
"""

from collections.abc import Iterator
from pathlib import Path

from jobs.cluster.kubernetes import REPOSITORY, manifests, render
from jobs.study.submission import load_submission


def staged_manifests() -> Iterator[tuple[Path, str]]:
    """Path and text of the manifest of each file in configs/stages, named by the folder of all its stages."""
    for path in sorted((REPOSITORY / "configs/stages").glob("*.yaml")):
        found = load_submission("kubernetes", [str(path)], None, None)
        name = f"{Path(found.config.run_dir).name}-train"
        yield REPOSITORY / f"k8s/{name}.yaml", render(found.config, name=name, text=found.text, runs=found.runs)


def main() -> None:
    """Write all of them."""
    for path, text in [*manifests(), *staged_manifests()]:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
