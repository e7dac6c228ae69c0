"""What people type, spelled out for the parser: short names, files of text, methods by their labels, plain lists.

Words and config files say the same things: ``--method pp``, ``--data.text FILE``, and ``method: pp`` in a file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from pp_lightning.commonsense import CommonsenseData
from pp_lightning.data import LanguageModelling
from pp_lightning.errors import UserError, unknown
from pp_lightning.files import read_text
from pp_lightning.methods import PRESETS, PruningMethod, Updated, method_labels, method_named
from pp_lightning.texts import source_settings

DATA = {"text": LanguageModelling, "commonsense": CommonsenseData}
LISTS = {
    *("--methods", "--ratios", "--seeds", "--check_with", "--model.skip_layers", "--data.tasks"),
    *("--dtypes", "--variants", "--skip_layers", "--decode", "--prompts", "--model.method.blocks"),
}
SHORT = {
    "--for": "--engine",
    "--check-with": "--check_with",
    "--method": "--model.method",
    "--stream": "--model.stream",
    "-c": "--config",
}
# Values of --data.train that are no text: the parser knows them.
TRAINING_ROWS = ("FirstWindows", "Instructions", "Packed")
_METHOD = {"compare": "--methods", "benchmark": "--variants"}  # where several can be named
_FLAGS = {"--calibrate-break-even": "--calibrate_break_even=true"}
_TEXTS = ("--data.text", "--data.calibration")
_PAPER = {"--data.calibration_samples": "2000", "--data.window": "1024"}
_WITHOUT_VALUE = {"--help", "-h", "--version", "--print_config"}


def spelled_out(words: Sequence[str]) -> list[str]:
    """The command line (without the program's name) as the parser takes it."""
    command, *rest = words or [""]
    full: list[str] = [command] if words else []
    seen: set[str] = set()
    for option, value in pairs(rest):
        if option == "--paper":
            window = () if "commonsense" in rest or "--data=commonsense" in rest else ("--data.window",)
            full += [f"{name}={_PAPER[name]}" for name in ("--data.calibration_samples", *window)]
            continue
        option = _METHOD.get(command, option) if option == "--method" else option
        option = SHORT.get(option, option)
        if value is None:
            option = _FLAGS.get(option, option)
            if option.startswith("--") and "=" not in option and option not in _WITHOUT_VALUE:
                raise UserError(f"{option} needs a value")
            full.append(option)
            continue
        full += _option(option, value, seen)
        seen.add(option)
    return full


def pairs(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Options with their values, None where there is none; a word that belongs to no option comes alone."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, sign, value = word.partition("=")
        if not word.startswith("-") or (sign and not word.startswith("--")):
            yield word, None
        elif sign:
            yield option, value
        elif option not in _WITHOUT_VALUE and rest and not rest[0].startswith("--"):
            yield option, rest.pop(0)
        else:
            yield option, None


def config_settings(path: str) -> dict[str, Any]:
    """What a config file says, spelled out.

    Raises:
        UserError: there is no such file, it is no YAML, or not a mapping of settings.
    """
    text = read_text(path, "config file")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise UserError(
            f"{path}{where}: this is no YAML ({getattr(error, 'problem', None) or 'unreadable'})"
        ) from error
    except RecursionError as error:
        raise UserError(f"cannot read {path}: its lists or objects lie too deep in each other") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"{path} holds no settings: a config file is lines of 'name: value'")
    return settings_spelled_out(settings)


def settings_spelled_out(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config's settings with methods and texts by class and arguments."""
    full = dict(settings)
    if "method" in full:
        full["model"] = {**(full.get("model") or {}), "method": full.pop("method")}
    if isinstance(model := full.get("model"), Mapping) and isinstance(model.get("method"), str):
        full["model"] = {**model, "method": _method(model["method"])}
    if isinstance(data := full.get("data"), Mapping):
        given = {name: _source(data[name]) for name in ("text", "calibration") if name in data}
        if isinstance(data.get("train"), list):
            given["train"] = [_source(one) for one in data["train"]]
        full["data"] = {**data, **given}
    return full


def _option(option: str, value: str, seen: set[str]) -> list[str]:
    if option == "--config":
        value = json.dumps(config_settings(value)) if value[:1] not in "{[" or not value else value
        seen.update(_texts_in(value))
    elif option == "--data":
        value = _data(value)
    elif option == "--model.method":
        value = _in_json(_method(value)) if _is_word(value) else value
    elif option in _TEXTS and _is_word(value):
        value = _in_json(_source(value))
    elif (
        option.removesuffix(".path") in _TEXTS and option.endswith(".path") and option.removesuffix(".path") not in seen
    ):
        option, value = option.removesuffix(".path"), _in_json(_source(value))
    elif option == "--data.train" and _is_word(value.strip("[]")) and value not in TRAINING_ROWS:
        value = json.dumps([_source(one.strip()) for one in value.strip("[]").split(",") if one.strip()])
    elif option in LISTS and value[:1] not in ("[", "{") and value not in ("null", ""):
        value = f"[{value}]"
    return [f"{option}={value}"]


def _texts_in(config: str) -> set[str]:
    data = json.loads(config).get("data") if config.startswith("{") else None
    return {f"--data.{name}" for name in data} if isinstance(data, dict) else set()


def _is_word(value: str) -> bool:
    """Whether a value is to be looked up: neither nothing nor settings."""
    return value != "null" and value[:1] not in ("{", "[")


def _in_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _data(value: str) -> str:
    if value in DATA:
        return f"{DATA[value].__module__}.{DATA[value].__name__}"
    if "." in value or value in {one.__name__ for one in DATA.values()}:
        return value
    raise UserError(f"--data: {unknown('kind of data', value, DATA)}")


def _source(value: Any) -> Any:
    """A text by its name; one that is spelled out already as it is."""
    if not isinstance(value, str) or value.startswith(("pp_lightning.", "tests.")):
        return value
    return source_settings(value)


def _method(value: str) -> Any:
    """A method by its label or its class; one with a path as it is."""
    if "." in value:
        return value
    classes: dict[str, type[PruningMethod]] = {one.__name__: one for one in _classes(PruningMethod)}
    if value in classes:
        return {"class_path": _path(classes[value])}
    if value not in method_labels():
        raise unknown("method", value, [*method_labels(), *classes])
    method = method_named(value)
    if isinstance(method, Updated):
        return {"class_path": _path(Updated), "init_args": {"origin": {"class_path": _path(type(method.origin))}}}
    return {"class_path": _path(type(method)), **({"init_args": method.settings()} if value in PRESETS else {})}


def _classes(base: type[PruningMethod]) -> Iterator[type[PruningMethod]]:
    for one in base.__subclasses__():
        yield one
        yield from _classes(one)


def _path(method: type) -> str:
    return f"{method.__module__}.{method.__qualname__}"
