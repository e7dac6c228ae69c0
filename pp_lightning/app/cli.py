"""The command line: LightningCLI with our module, data, trainer and defaults."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pp_lightning.app.ablation import report as ablation_report
from pp_lightning.app.ablation.questions import QUESTIONS
from pp_lightning.app.ablation.runner import UNFINISHED
from pp_lightning.app.help import ExamplesFormatter
from pp_lightning.app.mistakes import one_line
from pp_lightning.app.module import PrunedLM
from pp_lightning.app.progress import progress_display
from pp_lightning.app.report import comma_separated, grids, markdown, plot, show
from pp_lightning.app.results import Comparison
from pp_lightning.app.trainer import PruningTrainer
from pp_lightning.app.training import train_recovery
from pp_lightning.commonsense import CommonsenseData
from pp_lightning.data import LanguageModelling
from pp_lightning.data.base import EvaluationData
from pp_lightning.errors import UserError
from pp_lightning.records import check_place, environment, installed_version, write_json, write_text

_FILLED_IN = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "verbose", "weights_only"}

TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data module shares out whole batches itself, none twice
    "inference_mode": False,  # its tensors could not be trained on in the next row of a comparison
}


COMMANDS = {
    "test": "Evaluate one model: dense, or pruned with --model.method.",
    "compare": "Evaluate the dense model and several methods and ratios in one run: one table, one plot.",
    "prune": "One command: calibrate, choose, update what stays, evaluate before and after, write and check.",
    "export": "Write a pruned model as a checkpoint or a graph that unmodified tools load, and check that they do.",
    "ablate": "Answer questions about the method, each by variants that differ in one thing, over several seeds.",
    "fit": "Train on --data.train: a dense model, or with --model.recovery the adapters of a pruned one.",
}

DATA = {
    "text": f"{LanguageModelling.__module__}.{LanguageModelling.__name__}",
    "commonsense": f"{CommonsenseData.__module__}.{CommonsenseData.__name__}",
}

_OPTIONS = {"--for": "--engine", "--check-with": "--check_with", "--stream": "--model.stream"}

EXAMPLES = """
examples:
  every method on the model that comes with the package, no network needed
    pp-lightning compare --config configs/tiny/compare.yaml --out results/demo
  your model, your text, calibrated on your json lines of {"text": ...}
    pp-lightning compare --model.path DIR --data.text WikiText2 --data.text.path wiki.test.raw \\
        --data.calibration C4 --data.calibration.path c4.jsonl.gz --methods [pp,flap] --ratios [0.2,0.4] --out DIR2
  one method with its own settings
    pp-lightning test --model.path DIR --model.method ProbePruning --model.method.token_ratio 0.25 \\
        --model.pruning_ratio 0.4 --out DIR2
  the seven commonsense tasks, from local files in their original formats
    pp-lightning compare --model.path DIR --data commonsense --data.path DIR3 --methods [pp] --out DIR2
  does saved arithmetic become saved time? its own options: pp-lightning benchmark --help
    pp-lightning benchmark --config configs/tiny/benchmark.yaml --out DIR
  what will it cost? nothing is loaded; its own options: pp-lightning plan --help
    pp-lightning plan --model.path DIR --pruning_ratio 0.4
  any task of lm-evaluation-harness, its own options
    pp-lightning lm-eval --tasks hellaswag --batch_size 20 --model_args path=DIR,method=pp,pruning_ratio=0.4
  from a checkpoint and a text to a smaller checkpoint
    pp-lightning prune --model.path DIR --data.calibration FILE --target params=0.6 --out DIR2
  a static choice as a transformers folder, checked after writing
    pp-lightning export --model.path DIR --model.method WandaSP --model.pruning_ratio 0.4 --out DIR2
  for an engine, and run in it: llama.cpp, vllm, openvino, onnxruntime-genai, transformers
    pp-lightning export --for llama.cpp --check-with [llama.cpp] --model.path DIR --model.method FLAP --out DIR2
  all settings as a file to edit
    pp-lightning test --print_config > my.yaml
"""


class PruningCLI(LightningCLI):
    """``pp-lightning fit | test | compare | ablate | prune | export``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods that are commands, with the arguments that are filled in here."""
        return {
            "test": _FILLED_IN | {"ckpt_path"},
            "compare": _FILLED_IN,
            "ablate": _FILLED_IN,
            "prune": _FILLED_IN,
            "export": _FILLED_IN,
            "fit": _FILLED_IN,
        }

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Describe commands in our words: Lightning takes the first lines of methods, some of them its own."""
        super()._add_subcommands(parser, **kwargs)
        assert parser._subcommands_action is not None
        for choice in parser._subcommands_action._choices_actions:
            choice.help = COMMANDS[choice.dest]

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Model and data first in the help: Lightning's trainer has forty options that few runs need."""
        parser.add_lightning_class_args(PrunedLM, "model")
        parser.add_lightning_class_args(EvaluationData, "data", subclass_mode=True)
        parser.set_defaults({"data": {"class_path": "pp_lightning.data.LanguageModelling"}})
        parser.add_lightning_class_args(PruningTrainer, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options that every command has."""
        parser.add_argument("--out", type=str, default="results", help="Folder that everything is written into.")
        parser.link_arguments("out", "trainer.default_root_dir")

    def before_instantiate_classes(self) -> None:
        """Refuse a place where nothing can be written, before any work."""
        check_place(self.out)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Show progress, unless the user wants none or brings one."""
        wanted = self._get(self.config_init, "trainer")
        own = [callback for callback in wanted["callbacks"] or [] if isinstance(callback, ProgressBar)]
        if wanted["enable_progress_bar"] is not False and not own:
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": [progress_display()]}
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"the trainer's options do not fit: {error}") from error

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self._get(self.config, "out"))

    def test(self, model: PrunedLM, datamodule: EvaluationData) -> None:
        """Evaluate one model state."""
        self.trainer.test(model, datamodule=datamodule, verbose=False)
        assert model.evaluation is not None
        self._write([Comparison(model.evaluation)])

    def compare(self, **arguments: Any) -> None:
        """Evaluate several methods and ratios."""
        assert isinstance(self.trainer, PruningTrainer)
        rows = self.trainer.compare(**arguments)
        self._write(rows, ".csv, .md, .png")
        if self.trainer.is_global_zero:
            plot(rows, self._caption(rows[0].evaluation.tokens), self.out / "results.png")

    def ablate(self, **arguments: Any) -> None:
        """Answer questions about the method."""
        assert isinstance(self.trainer, PruningTrainer)
        answers = self.trainer.ablate(**arguments)
        if not self.trainer.is_global_zero:
            return
        self._dump_config()
        questions = {name: QUESTIONS[name] for name in dict.fromkeys(answer.question for answer in answers)}
        caption = self._caption(answers[0].tokens)
        grids = ablation_report.tables(questions, answers)
        write_text(self.out / "ablation.csv", ablation_report.comma_separated(answers))
        write_text(self.out / "ablation.md", markdown(grids, caption))
        write_json(self.out / "ablation.json", self._record({"answers": [answer.as_dict() for answer in answers]}))
        for earlier in (self.out / f"ablation-{name}.png" for name in QUESTIONS.keys() - questions.keys()):
            earlier.unlink(missing_ok=True)  # of another run into this folder: its figures are gone
        for name, question in questions.items():
            own = [answer for answer in answers if answer.question == name]
            ablation_report.plot(question, own, caption, self.out / f"ablation-{name}.png")
        (self.out / UNFINISHED).unlink(missing_ok=True)
        show(grids, f"{caption}\nwritten to {self.out}/ablation.json, .csv, .md and a picture a question")

    def fit(self, model: PrunedLM, datamodule: EvaluationData, **options: Any) -> None:
        """Train: the dense model, or adapters of a pruned one; an interrupted recovery goes on from its ``--out``."""
        if model.recovery is not None:
            train_recovery(self.trainer, model, datamodule)
        else:
            self.trainer.fit(model, datamodule=datamodule, **options)

    def after_fit(self) -> None:
        """Write the trained model as a transformers checkpoint in bfloat16; adapters are written already."""
        if not self.trainer.is_global_zero:
            return
        if self.model.recovery is None:
            self.model.model.bfloat16().save_pretrained(self.out)
            self.model.tokenizer.save_pretrained(self.out)
        else:
            print(f"written to {self.out}: evaluate it with pp-lightning test --model.recovered {self.out}")

    def _write(self, rows: list[Comparison], others: str = ".csv, .md") -> None:
        if not self.trainer.is_global_zero:
            return
        self._dump_config()
        caption = self._caption(rows[0].evaluation.tokens) + _compiling(rows)
        write_text(self.out / "results.csv", comma_separated(rows))
        write_text(self.out / "results.md", markdown(grids(rows), caption))
        write_json(self.out / "results.json", self._record({"rows": [row.as_dict() for row in rows]}))
        for finished in self.out.glob("unfinished-*.json"):
            finished.unlink()
        show(grids(rows), f"{caption}\nwritten to {self.out}/results.json, {others}")

    def _record(self, results: dict[str, Any]) -> dict[str, Any]:
        """Results with everything needed to repeat them."""
        return {
            "command": self.subcommand,
            **results,
            "data": self.datamodule.describe(),
            "environment": environment(self.model.device, self.trainer.world_size),
            "settings": self.config_dump,
        }

    def _caption(self, tokens: int | None) -> str:
        """What a table must say about itself: machine, dtype, batch, length, versions."""
        machine, data = environment(self.model.device, self.trainer.world_size), self.datamodule
        dtype = str(next(self.model.model.parameters()).dtype).removeprefix("torch.")
        versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers"))
        if isinstance(data, LanguageModelling):
            what = f"{tokens} tokens, batch {data.batch_size} x {data.window}, {data.protocol}"
            if data.protocol == "continuation":
                what += f" (prompts of {data.prefix} tokens choose, what follows is scored)"
        else:
            scored = "all rows" if data.limit is None else f"the first {data.limit} rows of each task"
            what = f"{scored}, batches of whole questions, {data.batch_size} rows at most, window {data.window}"
            if data.choose_on == "context":
                what += ", chosen on contexts alone"
        return (
            f"{what}, {dtype}; "
            f"{machine['device_name']}, {machine['threads']} threads, {machine['processes']} process(es); {versions}"
        )


def _compiling(rows: Sequence[Comparison]) -> str:
    """What compiling took, where anything was compiled."""
    compiled = [row.evaluation.compiled for row in rows if row.evaluation.compiled is not None]
    if not compiled:
        return ""
    graphs, seconds = (sum(one[key] for one in compiled) for key in ("graphs", "seconds"))
    recompiled = sum(len(one["recompiled"]) for one in compiled)
    return f"; compiled: {graphs} graphs in {seconds:.0f} s, {recompiled} of them recompilations"


def main() -> None:
    """Entry point of ``pp-lightning``: a mistake of the user's is one line and exit code 2."""
    if sys.argv[1:2] == ["lm-eval"]:
        _run_harness(sys.argv[2:])
        return
    if sys.argv[1:2] in (["benchmark"], ["plan"]):
        from pp_lightning.app import benchmarking, planning

        _run_own({"benchmark": benchmarking.main, "plan": planning.main}[sys.argv[1]], sys.argv[2:])
        return
    _quiet()
    sys.argv = with_full_names(sys.argv)
    try:
        PruningCLI(
            PrunedLM,
            EvaluationData,
            subclass_mode_data=True,
            trainer_class=PruningTrainer,
            trainer_defaults=TRAINER_DEFAULTS,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs=_parser_settings(),
        )
    except Exception as error:
        mistake = _mistake_behind(error)
        if mistake is None:
            raise
        print(f"pp-lightning: {one_line(mistake)}", file=sys.stderr)
        sys.exit(2)


def _mistake_behind(error: BaseException | None) -> BaseException | None:
    """The user's mistake that caused an error: jsonargparse wraps what a constructor refuses."""
    while error is not None and not isinstance(error, UserError | ArgumentError | MisconfigurationException):
        error = error.__cause__
    return error


def _run_own(command: Callable[[Sequence[str]], None], words: Sequence[str]) -> None:
    """A command without a LightningModule, which has options of its own."""
    try:
        command(words)
    except (UserError, ArgumentError) as error:
        print(f"pp-lightning: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _run_harness(words: Sequence[str]) -> None:
    """``pp-lightning lm-eval``: lm-evaluation-harness's own command line, with pruned models as its model ``pp``."""
    try:
        from pp_lightning.commonsense import harness  # an extra, and slow to import
    except ImportError:
        print("pp-lightning: lm-eval needs lm-evaluation-harness: pip install 'pp-lightning[eval]'", file=sys.stderr)
        sys.exit(2)
    sys.argv = ["pp-lightning lm-eval", *words]
    harness.main()


def with_full_names(words: Sequence[str]) -> list[str]:
    """The command line with short names and options spelled out, and files of text with what reads them.

    ``--data.text FILE`` and ``--data.calibration FILE`` are read as json lines with a field ``text`` where the file's
    name says so, else as plain text.
    """
    named = {f"--data={name}": f"--data={path}" for name, path in DATA.items()}
    full: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "--data":
            full.append(DATA.get(word, word))
        elif before in ("--data.text", "--data.calibration") and Path(word).is_file():
            full += ["C4" if ".json" in Path(word).name else "TextFile", f"{before}.path", word]
        else:
            name, equals, value = word.partition("=")
            full.append(named.get(word, _OPTIONS.get(name, name) + equals + value))
    return full


def _parser_settings() -> dict[str, Any]:
    """Usage, description and examples of the program and of every command."""
    settings: dict[str, Any] = {
        "prog": "pp-lightning",
        "version": installed_version("pp-lightning"),
        "usage": "pp-lightning COMMAND [options]        pp-lightning COMMAND --help",
        "description": "Prune large language models per batch or for good, and see what it costs and saves.",
        "epilog": EXAMPLES,
        "formatter_class": ExamplesFormatter,
        "exit_on_error": False,
    }
    for command, description in COMMANDS.items():
        settings[command] = {
            "usage": f"pp-lightning {command} [--config FILE] [options]",
            "description": description,
            "exit_on_error": False,
        }
    return settings


def _quiet() -> None:
    """Silence what Lightning says about itself on every start."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*treespec.*is deprecated.*")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft's business
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
