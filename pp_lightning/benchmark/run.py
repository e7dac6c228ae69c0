"""The whole benchmark: every dtype, ratio and case, all variants interleaved."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.benchmark.blocks import block_function, meetings
from pp_lightning.benchmark.clock import stopwatch_for
from pp_lightning.benchmark.decoding import decoding_rows
from pp_lightning.benchmark.memory import peak_megabytes
from pp_lightning.benchmark.model import BenchmarkModel, chosen_device
from pp_lightning.benchmark.rows import Row
from pp_lightning.benchmark.settings import BenchmarkSettings, Case, MeasuredDtype
from pp_lightning.benchmark.timing import Runner, Samples, measured, model_runner, part_runner
from pp_lightning.benchmark.variants import Variant, chosen_variants, reference_of, variant_named
from pp_lightning.blocks import Block
from pp_lightning.compilation import compile_, uncompile_
from pp_lightning.errors import UserError
from pp_lightning.families import shape_of
from pp_lightning.flops import choosing_flops, dense_flops, pruned_flops
from pp_lightning.functional.linear import is_emulated
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.progress import Tell
from pp_lightning.pruning import is_pruned, pruning_of


def run_benchmark(
    settings: BenchmarkSettings, tell: Tell = print, keep: Callable[[list[Row]], object] = lambda rows: None
) -> list[Row]:
    """Measure everything that the settings ask for.

    ``keep`` is given all rows so far after each part of a case, so that what is measured stays if a later one fails.
    """
    settings.check()
    variants = chosen_variants(settings.variants)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    rows: list[Row] = []
    for dtype in _measurable(settings, tell):
        for ratio in settings.ratios:
            for more in _of_ratio(settings, variants, dtype, ratio, tell):
                rows += more
                keep(rows)
    return rows


def _of_ratio(
    settings: BenchmarkSettings, variants: Mapping[str, Variant], dtype: MeasuredDtype, ratio: float, tell: Tell
) -> Iterator[list[Row]]:
    """Rows of one dtype and ratio, case by case. Its models are gone afterwards."""
    benchmarked = BenchmarkModel(settings, dtype, ratio)
    models = {name: benchmarked.variant(variant) for name, variant in variants.items()}
    whole = {name: model for name, model in models.items() if variants[name].whole}
    for case in settings.cases:
        yield from _Case(benchmarked, whole, {name: variants[name] for name in whole}, dtype, case, tell).rows()
    for case in [Case(rows, tokens) for rows in settings.decode for tokens in settings.prompts]:
        yield decoding_rows(benchmarked, models, variants, dtype, case, tell)


def _measurable(settings: BenchmarkSettings, tell: Tell) -> list[MeasuredDtype]:
    """The types that are worth measuring here."""
    device = chosen_device(settings)
    emulated = [d for d in settings.dtypes if not settings.emulated and is_emulated(getattr(torch, d), device)]
    for dtype in emulated:
        tell(f"{dtype} is left out: this CPU has no arithmetic for it (--emulated true measures it all the same)")
    if len(emulated) == len(settings.dtypes):
        raise UserError("nothing is left to measure: add float32 to dtypes, or set emulated to true")
    return [dtype for dtype in settings.dtypes if dtype not in emulated]


class _Case:
    """One case of one dtype and ratio."""

    def __init__(
        self,
        benchmarked: BenchmarkModel,
        models: Mapping[str, PreTrainedModel],
        variants: Mapping[str, Variant],
        dtype: MeasuredDtype,
        case: Case,
        tell: Tell,
    ) -> None:
        self.benchmarked, self.models, self.variants, self.dtype, self.case = benchmarked, models, variants, dtype, case
        self.settings = benchmarked.settings
        self.shape = shape_of(benchmarked.model.config)
        self.batches = benchmarked.batches(case)
        self.where = f"{dtype}, batch {case.rows} x {case.tokens}, ratio {benchmarked.ratio:g}"
        self.tell = tell

    def rows(self) -> Iterator[list[Row]]:
        """The whole model and, where asked, its blocks: one by one, so that the first stay if the second fail."""
        yield self._whole_model()
        if self.settings.blocks:
            yield self._blocks()

    def _whole_model(self) -> list[Row]:
        compilations = {n: compile_(m, mode=self.settings.mode) for n, m in self.models.items() if self._compiled(n)}
        runners = {name: model_runner(model, self.batches) for name, model in self.models.items()}
        samples = self._measure("whole model", runners, self.models)
        graphs = {name: (one.seconds, len(one.graphs)) for name, one in compilations.items()}
        texts = (
            {name: _perplexity(m, self.batches) for name, m in self.models.items()} if self.benchmarked.is_text else {}
        )
        for name in compilations:
            uncompile_(self.models[name])
        peaks = {name: self._peak(name) for name in self.models}
        ratios = {name: self._flops_ratios(model) for name, model in self.models.items()}
        rows = []
        for part, index in (("decoder", 0), ("model", 1)):
            for name in self.models:
                extra = {"peak_megabytes": peaks[name], "perplexity": texts.get(name)} if part == "model" else {}
                if part == "model" and name in graphs:
                    extra |= {"compile_seconds": graphs[name][0], "graphs": graphs[name][1]}
                rows.append(self._row(name, part, samples, ratios[name][index], **extra))
        return [_with_prr(row, rows) for row in rows]

    def _blocks(self) -> list[Row]:
        """One layer's blocks; the layer is the last one, on what it meets inside the eager PP model."""
        layer = self.shape.num_layers - 1
        eager = "PP"
        if eager not in self.models or layer in self.settings.skip_layers:
            return []
        rows = []
        for block in Block:
            key, part = (layer, block), "attention block" if block is Block.ATTENTION else "MLP block"
            if key not in pruning_of(self.models[eager]).pruners:
                continue
            met = meetings(self.models[eager], key, self.batches)
            clock = stopwatch_for(self.benchmarked.device)
            runners: dict[str, Runner] = {}
            ratios: dict[str, float] = {}
            for name, variant in self.variants.items():
                if isinstance(variant.method, DynamicMethod) and not self._probes_what_it_meets(variant.method):
                    continue
                mode = self.settings.mode if variant.compiled else None
                runners[name] = part_runner(part, block_function(self.models[name], key, met, compiled=mode), clock)
                ratios[name] = self._block_flops_ratio(name, layer, block)
            samples = self._measure(part, runners, {})
            rows += [self._row(name, part, samples, ratios[name]) for name in runners]
        return rows

    def _measure(
        self, what: str, runners: Mapping[str, Runner], watched: Mapping[str, PreTrainedModel]
    ) -> dict[str, Samples]:
        return measured(f"{self.where}, {what}", runners, watched, self.settings, self.tell)

    def _row(self, name: str, part: str, samples: Mapping[str, Samples], flops_ratio: float, **extra: object) -> Row:
        own = samples[name].seconds[part]
        reference = samples[reference_of(self.variants[name])].seconds[part]
        changed = samples[name].changed
        tokens = self.case.rows * self.case.tokens
        return Row.timed(
            own,
            reference,
            tokens_a_round=tokens,
            variant=name,
            part=part,
            dtype=self.dtype,
            rows=self.case.rows,
            tokens=self.case.tokens,
            pruning_ratio=self.benchmarked.ratio,
            flops_ratio=flops_ratio,
            changed=sum(changed) / len(changed) if changed and self._chooses(name) else None,
            **extra,
        )

    def _peak(self, name: str) -> float | None:
        if not self.settings.memory or self.case != self.settings.cases[0]:
            return None
        self.tell(f"{self.where}: peak memory of {name}")
        try:
            return peak_megabytes(self.settings, name, self.dtype, self.benchmarked.ratio, self.case)
        except RuntimeError as error:  # the models that are timed leave it less room than it would have alone
            self.tell(f"no peak memory of {name}: {error}")
            return None

    def _probes_what_it_meets(self, method: DynamicMethod) -> bool:
        """Whether a block needs nothing but its input: alone, it has no earlier residual, nor samples to draw by."""
        return method.probe_source == "current" and not method.samples_needed(self.case.rows, self.case.tokens)

    def _compiled(self, name: str) -> bool:
        return self.variants[name].compiled

    def _chooses(self, name: str) -> bool:
        return isinstance(self.variants[name].method, DynamicMethod)

    def _flops_ratios(self, model: PreTrainedModel) -> tuple[float, float]:
        """Over all layers, and with the projection to the vocabulary."""
        dense = dense_flops(self.shape, self.case.rows, self.case.tokens)
        if not is_pruned(model):
            return 1.0, 1.0
        pruned = pruned_flops(self.shape, pruning_of(model), self.case.rows, self.case.tokens)
        return pruned.layers / dense.layers, pruned.model / dense.model

    def _block_flops_ratio(self, name: str, layer: int, block: Block) -> float:
        if not is_pruned(self.models[name]):
            return 1.0
        pruning, rows, tokens = pruning_of(self.models[name]), self.case.rows, self.case.tokens
        flops = pruned_flops(self.shape, pruning, rows, tokens).blocks[layer, block]
        if isinstance(pruning.method, DynamicMethod):
            keep = pruning.keep[layer, block]
            flops += choosing_flops(self.shape, block, pruning.method, pruning.plan.unit, keep, rows, tokens)
        return flops / dense_flops(self.shape, rows, tokens).blocks[layer, block]


@torch.inference_mode()
def _perplexity(model: PreTrainedModel, batches: Sequence[Tensor]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        count += batch[:, 1:].numel()
    return math.exp(total / count)


def _with_prr(row: Row, rows: Sequence[Row]) -> Row:
    """The row with perplexity lost per millisecond saved, where both are known."""
    reference = next(r for r in rows if r.part == row.part and r.variant == reference_of(variant_named(row.variant)))
    saved = reference.median - row.median
    if row.perplexity is None or reference.perplexity is None or saved <= 0:
        return row
    return Row(**{**vars(row), "prr": (row.perplexity - reference.perplexity) / saved})
