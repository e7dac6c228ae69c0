"""Loading transformers checkpoints, from safetensors only unless the caller says otherwise."""

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pp_lightning.checkpoint_files import check_folder, in_our_words
from pp_lightning.errors import UserError
from pp_lightning.files import is_file, is_folder

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "tiny-llama"
_LONGEST_ID = 96  # characters of a hub id


def usual_dtype(path: str | None) -> Dtype:
    """The dtype that a model runs in where nobody says: a checkpoint's own. The embedded one is stored small only."""
    return "float32" if path is None else "auto"


def load_model(path: str | None = None, dtype: Dtype = "float32", *, allow_pickle: bool = False) -> PreTrainedModel:
    """The causal language model at ``path``, in evaluation mode on the CPU.

    Args:
        path: a transformers folder or a hub id. None loads the model that comes with this package.
        dtype: of the weights; ``auto`` keeps the checkpoint's own.
        allow_pickle: also accept ``.bin`` weights, which can run code of whoever wrote them.

    Raises:
        UserError: there is no such checkpoint, it is incomplete or damaged, or it is not safetensors.
    """
    source = _checked_source(path)
    config = check_folder(source, allow_pickle=allow_pickle) if is_folder(source) else {}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and the hub client raise a dozen unrelated types
        raise UserError(f"cannot load a model from {source}: {in_our_words(error, config)}") from error
    missing = sorted(report["missing_keys"]) + sorted(report["mismatched_keys"])
    if missing:
        raise UserError(f"the checkpoint {source} lacks {len(missing)} weights of its config ({missing[0]}, ...)")
    return model.eval()


def new_model(path: str | None = None, *, seed: int = 0) -> PreTrainedModel:
    """A model of the config at ``path`` with freshly drawn float32 weights."""
    source = _checked_source(path)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # see load_model
        raise UserError(f"cannot read a model config from {source}: {in_our_words(error, {})}") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_tokenizer(path: str | None = None, pad_token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at ``path`` (None: the embedded model's). Padding is masked everywhere, so none is needed for it.

    Args:
        path: a transformers folder or a hub id.
        pad_token: taken where the tokenizer has no padding token of its own, e.g. ``</s>`` for LLaMA-2. It must
            be in the vocabulary.

    Raises:
        UserError: no tokenizer there, or ``pad_token`` is not in its vocabulary.
    """
    source = _checked_source(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # see load_model
        raise UserError(f"cannot load a tokenizer from {source}: {in_our_words(error, {})}") from error
    if pad_token is not None and pad_token not in tokenizer.get_vocab():
        raise UserError(
            f"{pad_token!r} is no token of {source}: name another one with --model.pad_token, or leave it out"
        )
    if tokenizer.pad_token_id is None and pad_token is not None:
        tokenizer.pad_token = pad_token
    return tokenizer


def _checked_source(path: str | None) -> str:
    """``path`` if it can be a checkpoint: a folder with a config, or something shaped like a hub id."""
    if path is None:
        return str(EMBEDDED_MODEL)
    if is_folder(path):
        if not is_file(Path(path) / "config.json"):
            raise UserError(f"{path} has no config.json: give a transformers checkpoint folder")
    elif not path or len(path) > _LONGEST_ID or path.startswith((".", "/")) or path.count("/") > 1 or is_file(path):
        raise UserError(f"no checkpoint folder at {path!r}: give an existing folder or a hub id such as org/name")
    return path
