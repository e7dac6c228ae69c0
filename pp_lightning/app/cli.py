"""The command line: LightningCLI with our module, data and defaults."""

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from pp_lightning.app.module import PrunedLM
from pp_lightning.data import LanguageModelling


class PruningCLI(LightningCLI):
    """``pp-lightning fit | test``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods that are commands, with the arguments that are filled in here."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options every command has."""
        parser.add_argument("--out", type=str, default="results", help="folder that everything is written into")

    def after_fit(self) -> None:
        """Write the trained model as a transformers checkpoint in bfloat16."""
        out = Path(self.config[self.subcommand]["out"])
        self.model.model.bfloat16().save_pretrained(out)
        self.model.tokenizer.save_pretrained(out)


def main() -> None:
    """Entry point of ``pp-lightning``."""
    PruningCLI(PrunedLM, LanguageModelling, save_config_callback=None, seed_everything_default=0)
