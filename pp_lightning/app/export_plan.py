"""What ``pp-lightning export`` is asked for, and what of it can be refused or settled before any work."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pp_lightning.app.export_words import say
from pp_lightning.app.module import PrunedLM
from pp_lightning.blocks import Block
from pp_lightning.checkpoints import Dtype
from pp_lightning.errors import UserError
from pp_lightning.export import Layout
from pp_lightning.export.engines.choice import Format, choice_for
from pp_lightning.export.engines.run import Engine, check_installed
from pp_lightning.export.folder import check_free
from pp_lightning.export.formats import GRAPH_FORMATS
from pp_lightning.export.gguf_plan import check_biases, check_family
from pp_lightning.export.gguf_tokenizer import tokenizer_fields
from pp_lightning.export.layouts import check_layout
from pp_lightning.export.packages import check_packages
from pp_lightning.export.sizes import check_exportable
from pp_lightning.export.weights import check_shard_size
from pp_lightning.methods import DynamicMethod

Quantize = Literal["q8_0", "int8"]


@dataclass(frozen=True)
class ExportSettings:
    """What the user asks of ``export``.

    Attributes:
        format: ``safetensors`` (the default) is a transformers folder; ``gguf`` a file for llama.cpp; ``onnx`` and
            ``pt2`` (torch.export) are graphs; ``compiled`` adds kernels for this machine to ``pt2`` (AOTInductor).
        engine: ``--for`` on the command line: choose the format and layout that this engine was seen to load.
        check_with: ``--check-with``: engines to run the export in, found in this Python or in the folder that
            ``PP_LIGHTNING_ENGINES`` names.
        quantize: ``q8_0``: 8 bits a weight, of a GGUF; ``int8``: the same of a transformers folder, by torchao.
        layout: of a transformers folder or a GGUF. ``uniform`` (the default) chooses the same counts in every layer
            and writes a stock class; ``per-layer`` keeps a count of its own in every layer and brings a modelling
            file; ``padded`` fills up to the widest layer.
        dtype: of the weights written; none takes that of ``--model.dtype``.
        kv_cache: whether the graph of a static choice takes and gives keys and values.
        overwrite: replace an earlier export.
        max_shard_size: of a weights file.
    """

    format: Format | None = None
    engine: Engine | None = None
    check_with: list[Engine] | None = None
    quantize: Quantize | None = None
    layout: Layout | None = None
    dtype: Dtype | None = None
    kv_cache: bool = True
    overwrite: bool = False
    max_shard_size: str = "5GB"

    @property
    def written(self) -> Format:
        """The format: that of the engine, or a checkpoint where nothing was asked."""
        return self.format or "safetensors"

    @property
    def graph(self) -> bool:
        """Whether it holds any widths as they are."""
        return self.written in GRAPH_FORMATS

    @property
    def uniform(self) -> bool:
        """Whether all layers are to keep the same counts: by default, but in a graph only if told so."""
        return self.layout == "uniform" or (self.layout is None and not self.graph)


def settled(module: PrunedLM, out: Path, settings: ExportSettings) -> ExportSettings:
    """The settings with what they leave open; the module is told if all layers are to keep the same counts.

    Raises:
        UserError: nothing to prune, a choice per batch for a checkpoint, or whatever else stands in the way.
    """
    settings = _for_engine(module, settings)
    if module.settings.uniform_heads and settings.layout is None and not settings.graph and _differs(module):
        settings = replace(settings, layout="per-layer")
    _check(module, out, settings)
    if settings.uniform:
        _choose_uniformly(module)
    return settings


def chooses_per_batch(module: PrunedLM) -> bool:
    """Whether the choice is not frozen."""
    return isinstance(module.method, DynamicMethod) and module.settings.frozen_on is None


def _check(module: PrunedLM, out: Path, settings: ExportSettings) -> None:
    check_exportable(module.model)
    check_free(out, settings.overwrite)
    check_shard_size(settings.max_shard_size)
    if module.method is None:
        raise UserError("nothing to prune: name a method with --model.method")
    for engine in settings.check_with or ():
        check_installed(engine)
    dynamic = chooses_per_batch(module)
    if settings.graph:
        check_packages("ONNX", "onnx", *GRAPH_FORMATS[settings.written].packages)
        if settings.layout not in (None, "uniform"):
            raise UserError("a graph holds any widths as they are: --layout is for --format safetensors or gguf")
        if settings.engine is not None and (dynamic or not settings.kv_cache):
            raise UserError(
                f"{settings.engine} generates from a static choice with keys and values: freeze a choice per batch "
                "with --model.frozen_on history (or text), and leave --kv_cache true"
            )
    elif dynamic:
        raise UserError(
            f"{type(module.method).__name__} chooses per batch, which no checkpoint can: freeze its choice with "
            "--model.frozen_on history (or text), or write a graph with --format onnx (or pt2)"
        )
    if settings.written == "gguf":
        check_packages("GGUF", "gguf", "gguf")
        check_family(module.model.config, settings.layout or "uniform")
        check_biases(module.model, more=module.method.restores_means)
        tokenizer_fields(module.tokenizer, module.model.config.vocab_size)
    if not settings.graph:
        check_layout(settings.layout or "uniform", module.model, _biased(module))
    _check_quantize(settings)
    if module.is_streamed and settings.written != "safetensors":
        raise UserError(
            f"a model whose weights stay on disk is written as safetensors: convert the folder to {settings.written} "
            "afterwards, or say --model.stream false"
        )


def _biased(module: PrunedLM) -> list[Block]:
    assert module.method is not None
    ratios = {Block.ATTENTION: module.settings.attention_ratio, Block.MLP: module.settings.mlp_ratio}
    return [block for block in module.method.blocks if module.method.restores_means and ratios[block] != 0]


def _check_quantize(settings: ExportSettings) -> None:
    if settings.quantize == "q8_0" and settings.written != "gguf":
        raise UserError("--quantize q8_0 is for --format gguf: a transformers folder takes int8")
    if settings.quantize == "int8":
        if settings.written != "safetensors":
            raise UserError("--quantize int8 is for --format safetensors: a GGUF takes q8_0, graphs none")
        check_packages("int8", "int8", "torchao")


def _for_engine(module: PrunedLM, settings: ExportSettings) -> ExportSettings:
    """The settings with what an engine was seen to load."""
    if settings.engine is None or module.method is None:
        return settings
    choice = choice_for(
        settings.engine,
        module.model.config,
        own_counts=_differs(module),
        format=settings.format,
        layout=settings.layout,
    )
    layout = "" if choice.layout is None else f", layout {choice.layout}"
    say(f"for {settings.engine}: format {choice.format}{layout}: {choice.told}")
    return replace(settings, format=choice.format, layout=choice.layout or settings.layout)


def _differs(module: PrunedLM) -> bool:
    """Whether the choice as it is asked for leaves layers different numbers of units."""
    assert module.method is not None
    if module.settings.uniform or module.recovered is not None:
        return module.recovered is not None and not module.recovered.uniform
    amounts = module.amounts
    spread = amounts.allocation not in (None, "uniform") or (bool(amounts.skip_layers) and not amounts.uniform_heads)
    return spread or module.method.with_uniform_counts() is not module.method


def _choose_uniformly(module: PrunedLM) -> None:
    if module.recovered is not None:
        if not module.recovered.uniform:
            raise UserError(
                "a recovered model keeps the counts it was trained with, which differ between layers: export it with "
                "--layout per-layer or padded, or train it with --model.uniform true"
            )
        return
    assert module.method is not None
    if module.settings.skip_layers or module.method.with_uniform_counts() is not module.method:
        say(
            "layout uniform: chosen anew with the same counts in every layer, "
            f"{module.settings.pruning_ratio:.0%} over the whole model, no layer skipped. test and compare evaluate "
            "this choice with --model.uniform true --model.skip_layers null."
        )
    module.change(uniform=True)
