"""The command line: LightningCLI with our module, data, trainer and defaults."""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.utils import logging as transformers_logging

from pp_lightning.app.checks import check_settings
from pp_lightning.app.module import PrunedLM
from pp_lightning.app.pictures import plot, plot_study
from pp_lightning.app.progress import progress_display
from pp_lightning.app.report import grids, lines_of, show
from pp_lightning.app.results import Comparison
from pp_lightning.app.studies import study_named
from pp_lightning.app.trainer import PruningTrainer
from pp_lightning.app.training import train_recovery
from pp_lightning.app.words import spelled_out
from pp_lightning.data import LanguageModelling
from pp_lightning.data.base import EvaluationData
from pp_lightning.errors import UserError
from pp_lightning.records import check_place, environment
from pp_lightning.sharding import gathered
from pp_lightning.tables import markdown, write_report

_FILLED_IN = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "verbose", "weights_only"}

TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data module shares out whole batches itself, none twice
    "inference_mode": False,  # its tensors could not be trained on in the next row of a comparison
}


class PruningCLI(LightningCLI):
    """``pp-lightning fit | test | compare | prune | export``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods that are commands, with the arguments that are filled in here."""
        return {"test": _FILLED_IN | {"ckpt_path"}, **dict.fromkeys(("compare", "prune", "export", "fit"), _FILLED_IN)}

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

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Refuse what contradicts itself, before anything is drawn or made."""
        super().parse_arguments(parser, args)
        command = str(self.config["subcommand"])
        check_settings(command, self.config[command])

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
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"the trainer's options do not fit: {str(error).replace('`', '')}") from error

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self._get(self.config, "out"))

    def test(self, model: PrunedLM, datamodule: EvaluationData) -> None:
        """Evaluate one model state."""
        self.trainer.test(model, datamodule=datamodule, verbose=False)
        assert model.evaluation is not None
        self._write([Comparison(model.evaluation)])

    def compare(self, study: str | None = None, **arguments: Any) -> None:
        """Evaluate several methods and ratios, or answer a question about the method."""
        assert isinstance(self.trainer, PruningTrainer)
        rows = self.trainer.compare(study=study, **arguments)
        self._write(rows, ".csv, .md, .png", "" if study is None else f"{study_named(study).title} ")
        if self.trainer.is_global_zero:
            draw = plot if study is None else plot_study
            draw(rows, self._caption(rows[0].evaluation.tokens), self.out / "results.png")

    def fit(self, model: PrunedLM, datamodule: EvaluationData, **options: Any) -> None:
        """Train: the dense model, or adapters of a pruned one; an interrupted recovery goes on from its ``--out``."""
        if model.recovery is not None:
            train_recovery(self.trainer, model, datamodule)
        else:
            self.trainer.fit(model, datamodule=datamodule, **options)

    def after_fit(self) -> None:
        """Write the trained model as a transformers checkpoint in bfloat16; adapters are written already."""
        writes = self.trainer.is_global_zero
        trained = gathered(self.model.model, holds=writes) if self.model.recovery is None else None
        if not writes:
            return
        if trained is not None:
            trained.bfloat16().save_pretrained(self.out)
            self.model.tokenizer.save_pretrained(self.out)
        else:
            print(f"written to {self.out}: evaluate it with pp-lightning test --model.recovered {self.out}")

    def _write(self, rows: list[Comparison], others: str = ".csv, .md", title: str = "") -> None:
        if not self.trainer.is_global_zero:
            return
        self._dump_config()
        caption = title + self._caption(rows[0].evaluation.tokens) + _compiling(rows)
        record = {
            "command": self.subcommand,
            "rows": [row.as_dict() for row in rows],
            "data": self.datamodule.describe(),
            "environment": environment(self.model.device, self.trainer.world_size),
            "settings": self.config_dump,
        }
        lines = [line for row in rows for line in lines_of(row)]
        write_report(self.out / "results", markdown(grids(rows), caption), record, lines)
        for finished in self.out.glob("unfinished-*.json"):
            finished.unlink()
        show(grids(rows), f"{caption}\nwritten to {self.out}/results.json, {others}")

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
    compiled = [row.evaluation.compiled for row in rows if row.evaluation.compiled is not None]
    if not compiled:
        return ""
    graphs, seconds = (sum(one[key] for one in compiled) for key in ("graphs", "seconds"))
    recompiled = sum(len(one["recompiled"]) for one in compiled)
    return f"; compiled: {graphs} graphs in {seconds:.0f} s, {recompiled} of them recompilations"


def run(words: Sequence[str]) -> None:
    """Run one of the trainer's commands, as it was typed."""
    quiet()
    sys.argv[1:] = spelled_out(words)
    command = words[0]
    settings: dict[str, Any] = {"prog": "pp-lightning", "exit_on_error": False, "allow_abbrev": False}
    _of_one(command)(
        PrunedLM,
        EvaluationData,
        subclass_mode_data=True,
        trainer_class=PruningTrainer,
        trainer_defaults=TRAINER_DEFAULTS,
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={**settings, command: dict(settings)},
    )


def _of_one(command: str) -> type[PruningCLI]:
    """The command line with this command alone: it takes a while to collect the options of the others."""

    class OneCommand(PruningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {command: PruningCLI.subcommands()[command]}

    return OneCommand


def quiet() -> None:
    """Silence what Lightning says about itself on every start."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*max_epochs. was not set.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*treespec.*is deprecated.*")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft's business
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
