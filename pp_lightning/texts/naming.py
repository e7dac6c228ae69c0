"""What a word on the command line means as a source of text: a file, a data set of the hub, or a class of ours."""

import re
from typing import Any

from pp_lightning.errors import UserError, unknown
from pp_lightning.files import is_file
from pp_lightning.texts.sources import C4, Embedded, HubText, Records, TextFile, TextSource, WikiText2

SOURCES: dict[str, type[TextSource]] = {
    source.__name__: source for source in (C4, Embedded, HubText, Records, TextFile, WikiText2)
}
# A .raw file is in WikiText's form, whoever names it: one file has one perplexity.
_BY_SUFFIX: dict[str, type[TextSource]] = {
    ".txt": TextFile,
    ".raw": WikiText2,
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow"), Records),
}
_BY_HUB_ID: dict[str, type[TextSource]] = {"allenai/c4": C4, "salesforce/wikitext": WikiText2}


def source_settings(given: str) -> dict[str, Any]:
    """The class that reads ``given``, and its arguments, as the command line and its files spell them out.

    It is a path, whose reader its suffix chooses (without a known one an existing file is plain text); a hub id such as
    ``org/name``; or a name of :data:`SOURCES`.

    Raises:
        UserError: it is none of them.
    """
    if not given.strip():
        raise UserError("a text needs a name: a file, a data set of the hub (org/name) or Embedded")
    if given in SOURCES:
        return _spelled_out(SOURCES[given])
    suffix = next((end for end in _BY_SUFFIX if given.lower().endswith(end)), None)
    if suffix is not None:
        return _spelled_out(_BY_SUFFIX[suffix], path=given)
    if is_file(given) or given.startswith(("/", ".", "~")) or given.count("/") > 1:
        return _spelled_out(TextFile, path=given)
    if given.lower() in _BY_HUB_ID:
        return _spelled_out(_BY_HUB_ID[given.lower()])
    if re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        return _spelled_out(HubText, name=given)
    raise unknown("text", given, SOURCES)


def source_named(given: str) -> TextSource:
    """The source itself."""
    settings = source_settings(given)
    return SOURCES[settings["class_path"].rpartition(".")[2]](**settings["init_args"])


def _spelled_out(source: type[TextSource], **arguments: str) -> dict[str, Any]:
    return {"class_path": f"pp_lightning.data.{source.__name__}", "init_args": arguments}
