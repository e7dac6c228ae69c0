"""The library is in layers, and needs torch, transformers and safetensors only."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "pp_lightning"

# Lowest first; a module imports its own layer and lower ones. A package stands for everything inside.
LAYERS = [
    {"errors"},
    {"caches", "files", "interfaces", "parallel", "prefill", "progress", "saving", "tensor_files"},
    {"stored", "hidden"},
    {"checkpoint_files", "records", "resume", "tables", "functional"},
    {"blocks"},
    {"families", "calibration_data"},
    {"statistics", "calls", "layerwise", "sensitivity", "searching", "shares"},
    {"importances"},
    {"methods"},
    {"plan", "updating"},
    {"allocation"},
    {"target", "measured"},
    {"pruned"},
    {"surgery"},
    {"pruning"},
    {"state", "freezing", "continuation", "passes", "sharding"},
    {"collecting", "calibration", "gradients"},
    {"compilation", "counting"},
    {"flops", "checkpoints"},
    {"texts", "workload"},
    {"benchmark"},
    {"data"},
    {"recovery"},
    {"commonsense", "export"},
    {"app"},
    {"__main__"},
]
# Above the library proper: these may import it, it may not import them, and may import heavy packages.
TOP = {"data", "commonsense", "recovery", "export", "app", "__main__"}
READERS = {"texts"}  # reads what heavy packages can: they are imported where they are needed
HEAVY = {
    "datasets",
    "gguf",
    "jsonargparse",
    "lightning",
    "lm_eval",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "peft",
    "pyarrow",
    "pytorch_lightning",
    "rich",
    "torchao",
    "torchmetrics",
}


def modules() -> dict[str, Path]:
    """Every module of the package by dotted name without the package itself; '' is its __init__."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = list(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@cache
def imports(name: str) -> set[str]:
    """What a module imports, wherever in it: full dotted names, of our own modules without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name or PACKAGE} has a relative import"
            for alias in node.names:  # "from package import module" imports the module
                inner = f"{node.module}.{alias.name}".removeprefix(f"{PACKAGE}.")
                ours = str(node.module).split(".")[0] == PACKAGE
                found.add(f"{PACKAGE}.{inner}" if ours and inner in MODULES else str(node.module))
    return found


def at_the_top(name: str) -> set[str]:
    """What a module imports when it is imported."""
    body = ast.parse(MODULES[name].read_text()).body
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    return names | {str(node.module) for node in body if isinstance(node, ast.ImportFrom)}


def own(name: str) -> set[str]:
    """Our own modules among the imports, without the package's name."""
    return {i.removeprefix(PACKAGE).removeprefix(".") for i in imports(name) if i.split(".")[0] == PACKAGE}


def layer(name: str) -> int | None:
    head = name.split(".")[0]
    return next((level for level, names in enumerate(LAYERS) if head in names), None)


def heads(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


LIBRARY = [name for name in MODULES if layer(name) is not None and not heads([name]) & TOP]
EXPORT = [name for name in MODULES if heads([name]) == {"export"}]
RUNNERS = [name for name in EXPORT if name.split(".")[-1].startswith("run_")]  # run in an engine's own Python
STDLIB = set(sys.stdlib_module_names)


def unwanted(names: Iterable[str], rule: Callable[[str], set[str]]) -> dict[str, set[str]]:
    """What is against a rule, by module: nothing, if all is well."""
    return {name: found for name in names if (found := rule(name))}


def test_the_layers_exist():
    assert {name for names in LAYERS for name in names} <= heads(MODULES)
    assert len(LIBRARY) > 20 and RUNNERS


def test_imports_go_down():
    def not_below(name: str) -> set[str]:
        return {i for i in own(name) if (level := layer(i)) is None or level > layer(name)}

    assert not unwanted((name for name in MODULES if layer(name) is not None), not_below)


def test_the_library_needs_torch_transformers_and_safetensors():
    """Its arithmetic torch alone; heavy packages and the users of the library are unknown to all of it."""
    allowed = {PACKAGE, "torch", "transformers", "safetensors", "huggingface_hub", "yaml"} | STDLIB
    seen = {name: at_the_top(name) if heads([name]) <= READERS else imports(name) for name in MODULES}
    assert not unwanted(LIBRARY, lambda name: heads(seen[name]) - allowed)
    below = [name for name in MODULES if not heads([name]) & TOP]
    assert not unwanted(below, lambda name: heads(seen[name]) & HEAVY | heads(own(name)) & TOP)
    arithmetic = [name for name in MODULES if heads([name]) == {"functional"}]
    assert arithmetic and not unwanted(arithmetic, lambda name: heads(own(name)) - {"errors", "functional"})
    assert not unwanted(arithmetic, lambda name: heads(imports(name)) - STDLIB - {"torch", PACKAGE})


def test_export_stands_on_the_library_alone():
    """No Lightning, no data, no command line; onnx and its runtime only inside the functions that need them."""
    allowed = {PACKAGE, "torch", "transformers", "safetensors", "huggingface_hub"} | STDLIB
    allowed |= {"onnxruntime", "onnxscript", "gguf", "numpy", "torchao"}
    exporting = [name for name in EXPORT if name not in RUNNERS]
    assert not unwanted(exporting, lambda name: heads(imports(name)) - allowed | heads(own(name)) & TOP - {"export"})
    assert not unwanted(exporting, lambda name: heads(at_the_top(name)) & HEAVY)
    assert not unwanted(RUNNERS, lambda name: heads(imports(name)) & {PACKAGE})
    bundled = [name for name in EXPORT if name.startswith("export.bundled.")]
    assert bundled and not unwanted(bundled, lambda name: heads(imports(name)) - STDLIB - {"torch", "transformers"})


def test_the_library_does_not_know_export():
    assert heads(name for name in MODULES if "export" in heads(own(name))) == {"app", "export"}
    assert (ROOT / "export").resolve() == ROOT / PACKAGE / "export"
    assert not [name for name in MODULES if "export" in heads(imports(name))], "not by the link"


def test_no_cycles():
    graph = {name: {i for i in own(name) if i in MODULES and i != name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_reader_of_imports_sees_what_is_there():
    """Or all of the above would pass on anything."""
    assert "torch" in imports("pruning")
    assert {"pruned.check", "statistics", "plan"} <= own("pruning")
    assert any("lightning" in imports(name) or "lightning.pytorch" in imports(name) for name in MODULES)
    assert "onnxruntime" in set().union(*map(imports, EXPORT)) - set().union(*map(at_the_top, EXPORT))


def test_import_leaves_lightning_and_cuda_alone():
    code = (
        "import sys, pp_lightning, pp_lightning.methods, pp_lightning.export, torch\n"
        f"print(sorted(set({sorted(HEAVY)!r}) & set(sys.modules)), torch.cuda.is_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False"


def test_public_names():
    import pp_lightning

    assert set(pp_lightning.__all__) >= {
        "KeptUnits",
        "Statistics",
        "UserError",
        "calibrate",
        "frozen_history",
        "kept_units",
        "prune_",
        "unprune_",
    }
    assert all(hasattr(pp_lightning, name) for name in pp_lightning.__all__)
