"""Text to evaluate, calibrate and train on."""

from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.data.sources import C4, Embedded, TextFile, TextSource, WikiText2
from pp_lightning.data.training import FirstWindows, Instructions, Packed, TrainingRows

__all__ = [
    "C4",
    "Embedded",
    "FirstWindows",
    "Instructions",
    "LanguageModelling",
    "Packed",
    "TextFile",
    "TextSource",
    "TrainingRows",
    "WikiText2",
]
