"""``--help``: short, quick, and about the options that there are."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pp_lightning.app.descriptions import COMMANDS
from pp_lightning.app.help import benchmark_options, help_for, known_options, trainer_options
from pp_lightning.benchmark import BenchmarkSettings

REPOSITORY = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "lightning", "numpy", "jsonargparse", "datasets"}


@pytest.mark.parametrize("words", [["--help"], ["test", "--help"], ["benchmark", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words):
    code = f"""
import sys
from pp_lightning.app.cli import main
sys.argv = ["pp-lightning", *{words!r}]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
print(sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_list_of_commands_is_whole(capsys):
    text = help_for(["--help"])
    assert {"lm-eval", "benchmark", "fit", "compare"} < COMMANDS.keys()
    assert all(f"  {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", ["test", "compare", "prune", "export", "fit"])
def test_help_knows_the_options_that_the_parser_has(command, type_in, capsys):
    assert type_in(command, {}, extra=["--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    data = settings.pop("data")["init_args"]
    groups = {"model": settings.pop("model"), "data": data, "trainer": settings.pop("trainer")}
    names = {f"{group}.{name}" for group, values in groups.items() for name in values}
    renamed = {"engine": "for", "check_with": "check-with"}
    names |= {renamed.get(name, name) for name in settings} - {"ckpt_path"}
    assert names - set(known_options(command)) <= {"trainer.default_root_dir"}
    text = help_for([command, "--help"])
    own = [name for name in names if not name.startswith(("trainer.", "model."))]
    assert [name for name in own if f"--{name}" not in text] == []


def test_options_of_the_benchmark_and_the_trainer_have_texts():
    assert {option.name for option in benchmark_options()} >= {*vars(BenchmarkSettings()), "model.path"} - {"model"}
    devices = next(option for option in trainer_options() if option.name == "trainer.devices")
    assert "devices" in devices.text
    assert "--trainer.devices" in help_for(["test", "--help", "trainer"])
    assert "--trainer.devices " not in help_for(["test", "--help"]).split("more")[0]


def test_model_data_and_method_come_first():
    text = help_for(["test", "--help"])
    places = [text.index(f"--{name} ") for name in ("model.path", "model.method", "data.text", "model.round_to")]
    assert places == sorted(places)
    assert "--model.learning_rate" not in text and "--model.learning_rate" in help_for(["fit", "--help"])
