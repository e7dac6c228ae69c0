"""``pp-lightning plan``: what pruning a model will cost, before anything of it is loaded."""

import os
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from transformers import AutoConfig, PreTrainedConfig

from pp_lightning.app.checks import check_ratio
from pp_lightning.app.export_words import say
from pp_lightning.app.report import Grid, show_grid
from pp_lightning.blocks import Block
from pp_lightning.checkpoints import Dtype, free_memory
from pp_lightning.data.base import EvaluationData, check_positions, samples_for
from pp_lightning.errors import UserError
from pp_lightning.families import empty_model, longest_text, refusal
from pp_lightning.functional.scores import energy_weight_norm
from pp_lightning.stored import places_of
from pp_lightning.tensor_files import Placeholder, write_tensors
from pp_lightning.workload import JOBS, Job, Sizes, Workload, memory, moments_flops, solving_flops, work_flops

_EXAMPLES = """
examples:
  a checkpoint folder, a hub id, or a config alone
    pp-lightning plan --model.path DIR --model.pruning_ratio 0.4
    pp-lightning plan --model.path configs/shapes/llama-3-70b.json --trainer.devices 4
  the work of an experiment of your own
    pp-lightning plan --model.path DIR --data.window 128 --data.batch_size 4 --data.calibration_samples 16 \\
        --data.limit_tokens 2000
"""
_SECONDS = 1.4  # of each of the six measurements
_OUTPUTS = 0.3  # of a model's weights are in output matrices
_AT_ONCE = 1 << 25  # bytes of a tensor that is written, or copied


class _ExamplesFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the examples as they are written."""


@dataclass(frozen=True)
class Speeds:
    """What this machine does in a second.

    Attributes:
        products: FLOPs of a layer's matrices, in the dtype of the weights.
        moments: FLOPs of second moments, in float32.
        solving: FLOPs of a factorisation, in float64.
        scoring: numbers of output matrices.
        reading: bytes of tensors from the disk that the model is on; of a config alone, from that of temporary files.
        writing: bytes of tensors to the disk of temporary files.
    """

    products: float
    moments: float
    solving: float
    scoring: float
    reading: float
    writing: float


def main(words: Sequence[str]) -> None:
    """Read the options, measure for at most ten seconds, and show a table."""
    options = _parser().parse_args(list(words))
    model, data, devices = options.model, options.data, options.trainer.devices
    for name, number in (*vars(data).items(), ("devices", devices)):
        if number is not None and number < 1:
            raise UserError(f"{name} must be at least 1, not {number}")
    check_ratio("pruning_ratio", model.pruning_ratio)
    config = read_config(model.path)
    dtype = (config.dtype or torch.float32) if model.dtype == "auto" else getattr(torch, model.dtype)
    sizes = Sizes.of(config, dtype)
    longest = longest_text(config)
    window = data.window or min(EvaluationData.usual_window, longest)
    check_positions(window, longest)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    samples = data.calibration_samples or samples_for(device)
    work = Workload(data.batch_size, window, samples, data.limit_tokens, dtype, model.pruning_ratio)
    folder = Path(model.path)
    speeds = measured_speeds(sizes, work, folder if folder.is_dir() else None) if options.measure else None
    show_grid(planned(model.path, sizes, work, devices, speeds))
    for block, reason in refusals(config).items():
        say(f"the {block.value} of {config.model_type} cannot be pruned: {reason}")


def read_config(path: str) -> PreTrainedConfig:
    """The config of a folder, a file or a hub id."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and the hub client raise a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read a model config from {path}: {reason}") from error


def refusals(config: PreTrainedConfig) -> dict[Block, str]:
    """The blocks that no command prunes in models of this config, and why."""
    model = empty_model(config)
    return {block: reason for block in Block if (reason := refusal(model, block)) is not None}


def planned(name: str, sizes: Sizes, work: Workload, devices: int, speeds: Speeds | None) -> Grid:
    """The table."""
    rows = [_row(job, sizes, work, devices, speeds) for job in JOBS]
    flops = work_flops(sizes, work, "evaluation") / work.test_batches
    dtype = str(work.dtype).removeprefix("torch.")
    title = (
        f"{Path(name).name}: {sizes.parameters / 1e9:.2f} billion parameters, {sizes.whole / 1e9:.1f} GB in {dtype}, "
        f"{sizes.layer / 1e9:.2f} a layer, {sizes.outside / 1e9:.2f} outside of layers; {flops / 1e12:.2f} TFLOPs a "
        f"batch of {work.rows} x {work.tokens}; {work.calibration_rows} calibration rows, {work.test_tokens} test "
        f"tokens, ratio {work.pruning_ratio:g}, {devices} device(s)"
    )
    return Grid(title, ("job", "GB in memory", "GB streamed", "TFLOPs", "minutes in memory", "minutes streamed"), rows)


def _row(job: Job, sizes: Sizes, work: Workload, devices: int, speeds: Speeds | None) -> tuple[str, ...]:
    whole, streamed = (memory(sizes, work, job, streamed=way) / 1e9 for way in (False, True))
    flops = work_flops(sizes, work, job)
    times = ["-", "-"]
    if speeds is not None:
        took = (seconds(job, sizes, work, devices, speeds, streamed=way) for way in (False, True))
        times = [f"{one / 60:.1f}" for one in took]
    return (job, f"{whole:.2f}", f"{streamed:.2f}", f"{flops / 1e12:.0f}", *times)


def seconds(job: Job, sizes: Sizes, work: Workload, devices: int, speeds: Speeds, *, streamed: bool) -> float:
    """Time of a job. Several devices share the batches of an evaluation; everything else is done by one."""
    shared = devices if job == "evaluation" else 1
    busy = work_flops(sizes, work, job) / speeds.products / shared
    if job == "update":
        busy += moments_flops(sizes, work) / speeds.moments + solving_flops(sizes, work.pruning_ratio) / speeds.solving
    if job in ("pruning", "update"):
        busy += _OUTPUTS * sizes.parameters / speeds.scoring
    read, written = bytes_moved(job, sizes, work, streamed=streamed)
    return busy + read / speeds.reading + written / speeds.writing


def bytes_moved(job: Job, sizes: Sizes, work: Workload, *, streamed: bool) -> tuple[float, float]:
    """Bytes of weights that a job reads from the disk, and that it writes there.

    In memory, slicing reads and writes too, but from memory to memory: nothing beside the rest.
    """
    left = 1 - work.pruning_ratio
    passes: dict[Job, tuple[float, float]] = {job: (0.0, 0.0) for job in JOBS} | {"export": (left, left)}
    if streamed:
        passes = {
            "calibration": (1.0, 0.0),
            "pruning": (_OUTPUTS + 1, left),
            # ranked block by block; each block alone; solved, written, and carried through
            "update": (_OUTPUTS + 4 + left, 2 * left),
            "evaluation": (1.0, 0.0),
            "export": (3 * left, left),  # asked; read and written; asked again
        }
    read, written = passes[job]
    return read * sizes.whole, written * sizes.whole


def measured_speeds(sizes: Sizes, work: Workload, folder: Path | None) -> Speeds:
    """Measure this machine, in about ten seconds."""
    shape, rows = sizes.shape, min(work.rows * work.tokens, 2048)
    states, matrix = (torch.randn(size, shape.hidden_size).to(work.dtype) for size in (rows, shape.hidden_size))
    wide = torch.randn(rows, 2048)
    square = wide.t().double() @ wide.double() / rows + torch.eye(2048, dtype=torch.float64)
    return Speeds(
        _rate(lambda: states @ matrix.t(), 2.0 * rows * shape.hidden_size**2),
        _rate(lambda: wide.t() @ wide, 2.0 * rows * 2048**2),
        _rate(lambda: torch.linalg.cholesky(square), 2048**3 / 3),
        _rate(lambda: energy_weight_norm(matrix), float(matrix.numel())),
        *_disk(sizes, folder),
    )


def _rate(work: Callable[[], object], amount: float) -> float:
    """How much of something is done in a second; the first time does not count."""
    work()
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        work()
        times += 1
    return amount * times / (time.perf_counter() - start)


def _disk(sizes: Sizes, folder: Path | None) -> tuple[float, float]:
    """Bytes a second that are read and written, as streamed work does it.

    What fits into a tenth of the free memory is not waited for when it is written, and half of it may keep a checkpoint
    in the system's cache: then that is measured.
    """
    free = free_memory() or 0
    files = [] if folder is None else sorted(folder.glob("*.safetensors"), key=lambda one: one.stat().st_size)
    with TemporaryDirectory(prefix="pp-lightning-") as place:
        own = Path(place) / "written.safetensors"
        writing = _writing(own, waits=sizes.whole > free / 10)
        return _reading(files[-1] if files else own, drops=sizes.whole > free / 2), writing


def _writing(file: Path, *, waits: bool) -> float:
    """Bytes a second into a file of safetensors, with the time until they are on the disk or without."""
    tensor = torch.randint(256, (_AT_ONCE,), dtype=torch.uint8)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        number += 1
        part = file.with_name(f"{number}-{file.name}")
        write_tensors({"part": Placeholder(tensor, lambda: tensor)}, part, {})
        if waits:
            with part.open("rb") as opened:
                os.fsync(opened.fileno())
    took = time.perf_counter() - start
    file.with_name(f"1-{file.name}").rename(file)
    return number * _AT_ONCE / took


def _reading(file: Path, *, drops: bool) -> float:
    """Bytes a second of a file's tensors, the largest part of it that time allows.

    ``drops`` lets the system forget what it has of the file in memory; otherwise the file is read twice, and the second
    time counts.
    """
    if not drops:
        _read(file)
    elif hasattr(os, "posix_fadvise"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _read(file)


def _read(file: Path) -> float:
    start, done = time.perf_counter(), 0
    for place in places_of(file).values():
        done += place.read().nbytes
        if time.perf_counter() - start > _SECONDS:
            break
    return done / (time.perf_counter() - start)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="pp-lightning plan",
        description="Say what pruning a model will cost, in memory and streamed. Nothing of the model is loaded.",
        epilog=_EXAMPLES,
        formatter_class=_ExamplesFormatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_argument("--model.path", type=str, required=True, help="A checkpoint folder, a config, or a hub id.")
    parser.add_argument("--model.dtype", type=Dtype, default="auto", help="Of the weights.")
    parser.add_argument("--model.pruning_ratio", type=float, default=0.4, help="Fraction removed.")
    parser.add_argument("--data.window", type=int, help="Tokens of a row; none takes 1024, or what the model has.")
    parser.add_argument("--data.batch_size", type=int, default=20, help="Rows of a batch.")
    samples = "Rows that are calibrated on; none takes 512 on an accelerator and 64 on a CPU."
    parser.add_argument("--data.calibration_samples", type=int, help=samples)
    parser.add_argument("--data.limit_tokens", type=int, default=300_000, help="Tokens that are evaluated.")
    parser.add_argument("--trainer.devices", type=int, default=1, help="That share batches of an evaluation.")
    parser.add_argument("--measure", type=bool, default=True, help="Measure this machine for at most ten seconds.")
    return parser
