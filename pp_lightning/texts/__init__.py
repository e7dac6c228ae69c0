"""Where text comes from, without Lightning."""

from pp_lightning.texts.naming import SOURCES, source_named, source_settings
from pp_lightning.texts.sources import C4, Embedded, HubText, Records, TextFile, TextSource, WikiText2

__all__ = [
    "C4",
    "SOURCES",
    "Embedded",
    "HubText",
    "Records",
    "TextFile",
    "TextSource",
    "WikiText2",
    "source_named",
    "source_settings",
]
