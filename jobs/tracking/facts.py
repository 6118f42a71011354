"""Facts of the code and the machine that a run is tagged with."""

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from medsynth import __version__


def run_facts() -> dict[str, str]:
    """Tags of the code and hardware in use: git commit, versions, CPU, RAM, GPUs, platform. No user names, no paths."""
    packages = ("torch", "lightning", "diffusers", "transformers", "mlflow")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        **_git_facts(),
        "version.python": platform.python_version(),
        "version.medsynth": __version__,
        **{f"version.{package}": _version(package) for package in packages},
        "hardware.cpu": _cpu_model(),
        "hardware.cpu_count": str(os.cpu_count()),
        "hardware.ram_gib": f"{memory:.0f}",
        "hardware.gpus": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none",
        "host.platform": platform.platform(),
    }


def _git_facts() -> dict[str, str]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        result = subprocess.run(command, capture_output=True, check=True, timeout=10)
        return result.stdout.decode("utf-8", "replace").strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails for a copy installed inside another checkout
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {"git.commit": "unknown", "git.dirty": "unknown"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
