"""``--help`` in a second: read from the sources of the code, since importing it takes ten times as long."""

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pp_lightning.app.descriptions import COMMANDS, EXAMPLES

_PACKAGE = Path(__file__).parents[1]
_MODEL = (
    ("model", "plan.py", "Amounts", ""),
    ("model", "app/settings.py", "PruningSettings", ""),
    ("model", "app/module.py", "PrunedLM", "__init__"),
)
_DATA = ("data", "data/datamodule.py", "LanguageModelling", "__init__")
_BENCHMARK = (
    ("model", "benchmark/settings.py", "ModelChoice", ""),
    ("", "benchmark/settings.py", "BenchmarkSettings", ""),
)
_OWN_HELP = {"lm-eval", "plan", "demo"}
_HIDDEN = {"model", "datamodule", "self"}
TYPED = {"engine": "for", "check_with": "check-with"}  # options that have another name than the setting
_MORE = """
more
  --config FILE                  settings from a YAML file; what is typed behind it overrules it
  --out DIR                      where everything is written
  --method NAME                  short for --model.method: pp, best, flap, static_best, ...; its settings:
                                 --model.method.help CLASS
  --paper                        calibrate as published, on 2000 windows of 1024 tokens
  --data commonsense             the seven tasks in place of a text
  --seed_everything N            of whatever draws (0)
  --print_config                 all settings as a file to edit
  --help trainer                 devices, precision and steps: --trainer.accelerator, --trainer.devices, ...
"""


@dataclass(frozen=True)
class Option:
    """One option of a command."""

    name: str
    default: str
    text: str


def help_for(words: list[str]) -> str | None:
    """The text for a command line that asks for help; None where it does not, or its command has a help of its own."""
    asked = [word for word in words if word in ("--help", "-h")]
    command = words[0] if words and not words[0].startswith("-") else None
    if not asked or command in _OWN_HELP:
        return None
    if "trainer" in words[words.index(asked[0]) :]:
        return _usage(command) + _section("trainer", trainer_options())
    if command is None:
        return _program()
    if command not in COMMANDS:
        return None
    parts = [_usage(command), f"{COMMANDS[command]}\n"]
    if command == "benchmark":
        return "\n".join([*parts, _section("options", benchmark_options())])
    model = {name: one for name, one in model_options().items() if command == "fit" or name not in _OF_FIT}
    method = [model.pop(name) for name in ("model.path", "model.method", "model.pruning_ratio")]
    sections = [("model and method", method), ("data", options_of(*_DATA)), (command, command_options(command))]
    sections.append(("how it is pruned and run", list(model.values())))
    return "\n".join([*parts, *(_section(title, options) for title, options in sections if options), _MORE])


_OF_FIT = {"model.from_scratch", "model.learning_rate", "model.warmup_steps", "model.weight_decay", "model.recovery"}


def known_options(command: str) -> list[str]:
    """Names of all options that a command takes, for suggestions."""
    if command == "benchmark":
        return [*(option.name for option in benchmark_options()), "config", "out", "method"]
    found = [*model_options().values(), *options_of(*_DATA), *command_options(command), *trainer_options()]
    more = ["config", "out", "method", "paper", "seed_everything", "print_config", "data"]
    return [option.name for option in found] + more


def model_options() -> dict[str, Option]:
    """What the model and its pruning take, by name; the module's own text where there are two."""
    return {option.name: option for where in _MODEL for option in options_of(*where)}


def command_options(command: str) -> list[Option]:
    """What one command alone takes."""
    options = options_of("", "app/trainer.py", "PruningTrainer", command)
    if command == "export":
        options += options_of("", "app/export_plan.py", "ExportSettings", "")
    return [Option(TYPED.get(one.name, one.name), one.default, one.text) for one in options]


def benchmark_options() -> list[Option]:
    """What ``benchmark`` takes."""
    return [option for where in _BENCHMARK for option in options_of(*where)]


def trainer_options() -> list[Option]:
    """What Lightning's trainer takes."""
    found = find_spec("lightning")
    if found is None or found.origin is None:
        return []
    return options_of("trainer", str(Path(found.origin).parent / "pytorch/trainer/trainer.py"), "Trainer", "__init__")


def options_of(prefix: str, file: str, name: str, method: str) -> list[Option]:
    """Options from a class in a source file.

    The options are the arguments of ``method``, or the fields of the class where it is empty; ``prefix`` stands in
    front of each.
    """
    tree = ast.parse((_PACKAGE / file).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    functions = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
    if method and method not in functions:
        return []
    documented: list[ast.ClassDef | ast.FunctionDef] = [found, *([functions[method]] if method else [])]
    texts = {key: text for node in documented for key, text in _described(ast.get_docstring(node) or "")}
    defaults = _defaults(functions[method]) if method else _fields(found)
    start = f"{prefix}." if prefix else ""
    return [
        Option(start + key, default, texts.get(key, ""))
        for key, default in defaults
        if key not in _HIDDEN or not method
    ]


def _defaults(function: ast.FunctionDef) -> list[tuple[str, str]]:
    arguments = [*function.args.args, *function.args.kwonlyargs]
    values: list[ast.expr | None] = [None] * (len(function.args.args) - len(function.args.defaults))
    values += [*function.args.defaults, *function.args.kw_defaults]
    return [(one.arg, _shown(value)) for one, value in zip(arguments, values, strict=True)]


def _fields(found: ast.ClassDef) -> list[tuple[str, str]]:
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return [(node.target.id, _shown(node.value)) for node in fields if isinstance(node.target, ast.Name)]


def _shown(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call) and value.keywords and isinstance(value.keywords[0].value, ast.Lambda):
        value = value.keywords[0].value.body  # field(default_factory=lambda: ...)
    text = "" if value is None or isinstance(value, ast.Call | ast.Name) else ast.unparse(value)
    return "" if text in ("None", "False", "[]") else text


def _described(docstring: str) -> Iterator[tuple[str, str]]:
    """Names and texts under ``Args:`` or ``Attributes:``."""
    found = re.search(r"^(?:Args|Attributes):[^\n]*\n((?:[ \t].*\n?|\n)*)", docstring, re.MULTILINE)
    if found is None:
        return
    body = textwrap.dedent(found[1])
    for item in re.split(r"\n(?=[\w*]+:)", f"\n{body}"):
        name, sign, text = item.strip().partition(":")
        if sign:
            yield name, re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split())).replace("``", "")


def _section(title: str, options: list[Option]) -> str:
    width = min(max(shutil.get_terminal_size().columns, 70), 110)
    lines = [title]
    for option in options:
        text = f"{option.text}{f' ({option.default})' if option.default else ''}"
        head = f"  --{option.name}".ljust(32)
        space = "" if head.endswith(" ") else "\n" + " " * 32
        folded = textwrap.wrap(text, width - 33) or [""]
        lines.append(f"{head} {space}{folded[0]}".rstrip())
        lines += [" " * 33 + line for line in folded[1:]]
    return "\n".join([*lines, ""])


def _usage(command: str | None) -> str:
    return f"usage: pp-lightning {command or 'COMMAND'} [options]        pp-lightning {command or 'COMMAND'} --help\n"


def _program() -> str:
    lines = [
        _usage(None),
        "Prune large language models per batch or for good, and see what it costs and saves.",
        "",
        "commands:",
    ]
    for name, text in COMMANDS.items():
        lines.append(textwrap.fill(text, 110, initial_indent=f"  {name} ".ljust(13), subsequent_indent=" " * 13))
    return "\n".join([*lines, EXAMPLES])
