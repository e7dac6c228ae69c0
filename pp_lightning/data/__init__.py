"""Text to evaluate, calibrate and train on."""

from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.data.training import FirstWindows, Instructions, Packed, TrainingRows
from pp_lightning.texts import C4, Embedded, HubText, Records, TextFile, TextSource, WikiText2

__all__ = [
    "C4",
    "Embedded",
    "FirstWindows",
    "HubText",
    "Instructions",
    "LanguageModelling",
    "Packed",
    "Records",
    "TextFile",
    "TextSource",
    "TrainingRows",
    "WikiText2",
]
