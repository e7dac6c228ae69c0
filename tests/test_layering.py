"""The library is in layers, and needs torch, transformers and safetensors only."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

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


LAYERED = [name for name in MODULES if layer(name) is not None]
LIBRARY = [name for name in LAYERED if name.split(".")[0] not in TOP]


def test_the_layers_exist():
    heads = {name.split(".")[0] for name in MODULES}
    assert {name for names in LAYERS for name in names} <= heads
    assert len(LIBRARY) > 20


@pytest.mark.parametrize("name", LAYERED)
def test_imports_go_down(name):
    for imported in own(name):
        level = layer(imported)
        assert level is not None, f"{name} imports {imported or PACKAGE}, which is above the library's layers"
        assert level <= layer(name), f"{name} imports {imported}, which is in a higher layer"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] == "functional"])
def test_the_arithmetic_imports_torch_only(name):
    for imported in imports(name):
        head = imported.split(".")[0]
        if head == PACKAGE:
            assert imported.split(".")[1] in ("errors", "functional")
        else:
            assert head == "torch" or head in sys.stdlib_module_names, f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] not in TOP])
def test_the_library_does_without_heavy_packages(name):
    heavy = {i for i in (at_the_top if name.split(".")[0] in READERS else imports)(name) if i.split(".")[0] in HEAVY}
    assert not heavy
    assert not {i for i in own(name) if i.split(".")[0] in TOP}, "the library does not know its users"


@pytest.mark.parametrize("name", LIBRARY)
def test_layers_import_torch_and_transformers_only(name):
    allowed = {PACKAGE, "torch", "transformers", "safetensors", "huggingface_hub", "yaml"} | sys.stdlib_module_names
    found = (at_the_top if name.split(".")[0] in READERS else imports)(name)
    assert {i.split(".")[0] for i in found} <= allowed


SOURCES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / PACKAGE / "export").rglob("*.py"))}
RUNNERS = {path: tree for path, tree in SOURCES.items() if path.name.startswith("run_")}  # in an engine's own Python
EXPORT = {path: tree for path, tree in SOURCES.items() if path not in RUNNERS}


def imported_by(tree: ast.Module) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("path", EXPORT, ids=lambda path: str(path.relative_to(ROOT)))
def test_export_stands_on_the_library_alone(path):
    """No Lightning, no data, no command line; onnx and its runtime only inside the functions that need them."""
    allowed = {PACKAGE, "torch", "transformers", "safetensors", "huggingface_hub"}
    allowed |= {"onnxruntime", "onnxscript", "gguf", "numpy", "torchao"}
    names = imported_by(EXPORT[path])
    assert {name.split(".")[0] for name in names} <= allowed | sys.stdlib_module_names
    ours = {name for name in names if name.split(".")[0] == PACKAGE}
    assert not {name for name in ours if set(name.split(".")[1:2]) & (TOP - {"export"})}
    at_top = {name for node in EXPORT[path].body for name in imported_by(ast.Module([node], []))}
    functions = (ast.FunctionDef, ast.ClassDef)
    inside = [node for node in EXPORT[path].body if isinstance(node, functions)]
    lazily = {name for node in inside for name in imported_by(ast.Module([node], []))}
    assert not {name for name in at_top - lazily if name.split(".")[0] in HEAVY}


@pytest.mark.parametrize("path", RUNNERS, ids=lambda path: path.name)
def test_what_runs_in_an_engines_own_python_knows_nothing_of_us(path):
    assert PACKAGE not in {name.split(".")[0] for name in imported_by(RUNNERS[path])}


def test_the_library_does_not_know_export():
    users = {name for name in MODULES if any(i.split(".")[0] == "export" for i in own(name))}
    assert {name.split(".")[0] for name in users} == {"app", "export"}
    assert (ROOT / "export").resolve() == ROOT / PACKAGE / "export"
    assert not [name for name in MODULES if "export" in {i.split(".")[0] for i in imports(name)}], "not by the link"


def test_bundled_code_needs_transformers_only():
    for path in (ROOT / PACKAGE / "export" / "bundled").glob("*.py"):
        names = {name.split(".")[0] for name in imported_by(EXPORT[path])} - sys.stdlib_module_names
        assert names <= {"torch", "transformers"}


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
