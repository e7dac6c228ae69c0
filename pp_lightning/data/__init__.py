"""Text to evaluate, calibrate and train on."""

from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.data.sources import C4, Embedded, TextFile, TextSource, WikiText2

__all__ = ["C4", "Embedded", "LanguageModelling", "TextFile", "TextSource", "WikiText2"]
