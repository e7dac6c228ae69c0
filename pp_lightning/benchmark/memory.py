"""Peak memory of one variant, in a process of its own: what other variants keep must not count."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from pp_lightning.benchmark.settings import BenchmarkSettings, Case

_BATCHES = 3


def peak_megabytes(settings: BenchmarkSettings, variant: str, dtype: str, ratio: float, case: Case) -> float | None:
    """Start a process that builds, prunes and runs the variant on three batches, and take its peak.

    Returns:
        Megabytes, resident on Linux's CPUs and allocated on an accelerator; None where the system does not tell.
    """
    request = {"settings": asdict(settings), "variant": variant, "dtype": dtype, "ratio": ratio, "case": asdict(case)}
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()  # room for the process, which shares the device
    command = [sys.executable, "-m", "pp_lightning.benchmark.memory"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {variant!r} failed:\n{done.stderr[-2000:]}")
    found: float | None = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """The process itself: a request on standard input, megabytes on standard output."""
    from pp_lightning.benchmark.model import BenchmarkModel  # the parent needs none of it
    from pp_lightning.benchmark.variants import variant_named
    from pp_lightning.compilation import compile_

    request = json.load(sys.stdin)
    settings = BenchmarkSettings.from_plain(request["settings"])
    benchmarked = BenchmarkModel(settings, request["dtype"], request["ratio"])
    case = Case(**request["case"])
    variant = variant_named(request["variant"])
    model = benchmarked.only(variant)
    batches = benchmarked.batches(case)
    if variant.compiled:
        compile_(model, mode=settings.mode)
    with torch.inference_mode():
        model(input_ids=batches[0], use_cache=False)  # compiles, which takes memory of its own
        _forget_peak(model.device)
        for index in range(1, 1 + _BATCHES):
            model(input_ids=batches[index], use_cache=False)
    print(json.dumps(_peak(model.device)))


def _forget_peak(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # makes the resident size now the peak so far


def _peak(device: torch.device) -> float | None:
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
