"""Files that results are written to, and what they say about the machine."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pp_lightning.errors import UserError

PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "safetensors", "jsonargparse")


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Machine and versions, without anything that names a person or a path."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {package: found for package in PACKAGES if (found := installed_version(package)) is not None}
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "processes": world_size,
        "python": platform.python_version(),
        "versions": versions | {"torch": str(torch.__version__)},  # which says for what device it was built, too
    }


def installed_version(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_place(out: Path) -> None:
    """Refuse a folder that cannot be written into. It is not made yet."""
    try:
        out.absolute().lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, links in a circle
        raise UserError(f"{out}: {str(error.strerror).lower()}: name another place with --out") from error
    nearest = nearest_existing(out)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "is not a folder" if not nearest.is_dir() else "cannot be written to"
        raise UserError(f"{nearest} {reason}: name another place with --out")


def check_new_file(file: str, option: str) -> None:
    """Refuse a path that is neither a file nor can become one."""
    try:
        check_place(Path(file).parent)
        fits = not os.path.lexists(file) or Path(file).is_file()
        os.stat(file)
    except FileNotFoundError:
        pass
    except (OSError, UserError):
        fits = False
    if not fits:
        raise UserError(f"{option} must name a file, there or new, not {file}")


def nearest_existing(path: Path) -> Path:
    """The path itself or, where that is not there yet, the nearest of its parents that is."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a whole file or none."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
