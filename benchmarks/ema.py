"""What averaging the weights costs: time of an update as a share of an optimizer step.

    python -m benchmarks.ema configs/msdm.yaml [KEY=VALUE]... [--device cuda] [--batch 16] [--processes 8]

The networks have random weights, their shapes come from the config. A step is forward, backward and optimizer of the
U-Net alone, at the config's resolution and precision: encoders, data and communication would make the share smaller. Of
several processes that hold the weights in parts, each averages its own.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from jobs.run.config import load_arguments
from jobs.run.folder import build_module
from lightning_modules.parts.optim import OPTIMIZERS


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step and device")
    parser.add_argument("--processes", type=int, default=1, help="that share the weights (fsdp, deepspeed)")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    step, parameters = denoising_step(arguments.config, device, arguments.batch)
    held = [parameter.detach().flatten().tensor_split(arguments.processes)[0] for parameter in parameters]
    shadow = [part.clone() for part in held]
    average = get_ema_multi_avg_fn(0.9999)
    step_seconds = seconds(step, device, arguments.repeats)
    with torch.no_grad():
        ema_seconds = seconds(lambda: average(shadow, held, None), device, arguments.repeats)
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch": arguments.batch,
        "processes": arguments.processes,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "step_seconds": step_seconds,
        "ema_seconds": ema_seconds,
        "share": ema_seconds / step_seconds,
    }
    print(json.dumps(facts, indent=2))


def denoising_step(
    arguments: list[str], device: torch.device, batch: int
) -> tuple[Callable[[], None], list[torch.nn.Parameter]]:
    """One optimizer step of the configured U-Net on noise, and the parameters that it moves."""
    config = load_arguments([*arguments, "run_dir=unused"])
    module = build_module(config)
    module.configure_model()
    module.to(device)
    parameters = [p for network in module.trainable_modules().values() for p in network.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[config.model.optim.name](parameters, lr=1e-6, fused=True)
    z = torch.randn(batch, *module.latent_shape(), device=device)
    t = torch.full((batch,), 500, device=device)
    context = module.embed(["a picture"] * batch)
    mixed = config.hardware.precision == "bf16-mixed"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            output = module.denoise(z, t, context, None, 1.0).model_output
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, parameters


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after a warm-up."""
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[repeats // 2]


if __name__ == "__main__":
    main()
