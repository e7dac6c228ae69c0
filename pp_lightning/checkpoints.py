"""Loading transformers checkpoints, from safetensors only unless the caller says otherwise."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from pp_lightning.checkpoint_files import check_folder, in_our_words
from pp_lightning.errors import UserError
from pp_lightning.families import layers_of
from pp_lightning.files import is_file, is_folder
from pp_lightning.interfaces import names_elsewhere, parameters_without_memory
from pp_lightning.parallel import is_spread
from pp_lightning.stored import AnyPlace, Merged, Place, places_in, settle, stored, values_of
from pp_lightning.tensor_files import SIZES

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_READ = ["*.json", "*.safetensors"]

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
    return _loaded(_checked_source(path), dtype, allow_pickle)


def load_spread(path: str | None, dtype: Dtype, processes: int) -> PreTrainedModel:
    """The same model spread over all processes by tensor parallelism as transformers has it: each reads its part.

    ``path`` and ``dtype`` as there; each of the ``processes`` must call this.

    Raises:
        UserError: as there, or transformers has no plan for models of this type.
    """
    from transformers.distributed import DistributedConfig

    source = _checked_source(path)
    model = _loaded(source, dtype, False, distributed_config=DistributedConfig(tp_plan="auto", tp_size=processes))
    if not any(is_spread(weight) for layer in layers_of(model) for weight in layer.parameters()):
        raise UserError(f"transformers has no plan to split {model.config.model_type} over processes: shard it instead")
    return model


def _loaded(source: str, dtype: Dtype, allow_pickle: bool, **how: Any) -> PreTrainedModel:
    if dtype not in get_args(Dtype):
        raise UserError(f"dtype must be one of {', '.join(get_args(Dtype))}, not {dtype!r}")
    config = check_folder(source, allow_pickle=allow_pickle) if is_folder(source) else {}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=False,
            output_loading_info=True,
            **how,
        )
    except Exception as error:  # transformers, safetensors and the hub client raise a dozen unrelated types
        raise UserError(f"cannot load a model from {source}: {in_our_words(error, config)}") from error
    missing = sorted(report["missing_keys"]) + sorted(report["mismatched_keys"])
    if missing:
        raise UserError(f"the checkpoint {source} lacks {len(missing)} weights of its config ({missing[0]}, ...)")
    return model.eval()


def open_model(
    path: str | None, dtype: Dtype, *, allow_pickle: bool = False, stream: bool | None = None
) -> PreTrainedModel:
    """The model at ``path``, in memory or streamed.

    ``stream`` leaves layers' weights on disk; None does so where they would take more than half of the free memory.

    Raises:
        UserError: as the two do.
    """
    if stream is None:
        free = None if allow_pickle else free_memory()
        stream = free is not None and checkpoint_bytes(path, dtype) > free / 2
    return load_streamed(path, dtype) if stream else load_model(path, dtype, allow_pickle=allow_pickle)


def free_memory() -> int | None:
    """Bytes that programs can still have, caches of files not counted; None where the system does not tell."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    line = next((line for line in file.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def load_streamed(path: str | None = None, dtype: Dtype = "float32", *, bundled_code: bool = False) -> PreTrainedModel:
    """The same model with the weights of its layers left on disk: each layer has them while it runs.

    ``bundled_code`` runs the modelling file in the folder, which must be one that we have just written.

    Raises:
        UserError: there is no such checkpoint, it is incomplete or damaged, it is not safetensors, or its weights are
            not those of the model one by one.
    """
    source = _checked_source(path)
    settings = check_folder(source, allow_pickle=False, bundled_code=bundled_code) if is_folder(source) else {}
    try:
        folder = Path(source if is_folder(source) else snapshot_download(source, allow_patterns=_READ))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=bundled_code)
        places = places_in(folder)
        wanted = (config.dtype or next(iter(places.values())).read().dtype) if dtype == "auto" else dtype
        with parameters_without_memory():
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=bundled_code)
        if (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except UserError:
        raise
    except Exception as error:  # see load_model
        raise UserError(f"cannot load a model from {source}: {in_our_words(error, settings)}") from error
    _fill(model, _places_of(model, places), source)
    for layer in layers_of(model):
        settle(layer)
    return model.eval()


def _places_of(model: PreTrainedModel, places: Mapping[str, Place]) -> Callable[[str], AnyPlace | None]:
    """Where a weight of a model is: checkpoints have names with the base model's prefix, without, or of their own."""
    prefix = f"{model.base_model_prefix}."
    others = names_elsewhere(model, places)

    def find(name: str) -> AnyPlace | None:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        same = next((places[one] for one in candidates if one in places), None)
        if same is not None or name not in others:
            return same
        found = [[places[one] for one in kind] for kind in others[name]]
        return found[0][0] if len(found) == len(found[0]) == 1 else Merged.of(found)

    return find


@torch.no_grad()
def _fill(model: PreTrainedModel, find: Callable[[str], AnyPlace | None], source: str) -> None:
    """Give a model without memory its weights, those of its layers as places on disk."""
    inside = {id(weight) for layer in layers_of(model) for weight in layer.parameters()}
    for name, weight in list(model.named_parameters()):
        place = find(name)
        if place is None or place.shape != tuple(weight.shape):
            what = "lacks" if place is None else "has in another shape"
            raise UserError(
                f"the checkpoint {source} {what} {name}, or names it otherwise, so it cannot be streamed: "
                "load it whole, with --model.stream false"
            )
        module, _, leaf = name.rpartition(".")
        like = stored(weight, place)
        full = like if id(weight) in inside else nn.Parameter(values_of(like), requires_grad=weight.requires_grad)
        model.get_submodule(module)._parameters[leaf] = full
    model.tie_weights()
    for name, buffer in model.named_buffers():
        if (place := find(name)) is not None:
            buffer.copy_(place.read())


def checkpoint_bytes(path: str | None, dtype: Dtype) -> int:
    """Bytes that a checkpoint's weights take in memory; 0 where it is no local folder of safetensors."""
    folder = Path(_checked_source(path))
    if not is_folder(folder) or not any(folder.glob("*.safetensors")):
        return 0
    check_folder(str(folder), allow_pickle=False)
    size = None if dtype == "auto" else getattr(torch, dtype).itemsize
    return sum(math.prod(one.shape) * (size or SIZES[one.dtype]) for one in places_in(folder).values())


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
