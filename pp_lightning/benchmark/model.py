"""What is measured: a model, its copies under every regime, and batches to run them on."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pp_lightning.benchmark.settings import BenchmarkSettings, Case, MeasuredDtype
from pp_lightning.benchmark.shapes import random_model
from pp_lightning.benchmark.variants import Variant, pruned_copy, sharing_copy
from pp_lightning.calibration import calibrate
from pp_lightning.checkpoints import load_model, load_tokenizer
from pp_lightning.errors import UserError
from pp_lightning.families import shape_of
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.pruning import prune_
from pp_lightning.statistics import Statistics
from pp_lightning.texts import source_named

_CALIBRATION_ROWS = 4


class BenchmarkModel:
    """A dense model with the statistics and batches that all its variants share."""

    def __init__(self, settings: BenchmarkSettings, dtype: MeasuredDtype, ratio: float) -> None:
        self.settings = settings
        self.ratio = ratio
        self.device = chosen_device(settings)
        torch.manual_seed(settings.seed)
        decoded = [max(settings.prompts) + settings.decode_tokens, 256] if settings.decode else []
        self.longest = max([case.tokens for case in settings.cases] + decoded)
        model = settings.model
        if model.path is None:
            self.model = random_model(model.shape, model.layers, self.longest, getattr(torch, dtype), self.device)
            self._text: Tensor | None = None
        else:
            self.model = load_model(model.path, dtype).to(self.device)
            assert settings.text is not None
            self._text = _tokens(model.path, settings.text)
        self.model.requires_grad_(False)
        self.statistics = self._calibrated()
        self._static: dict[str | None, PreTrainedModel] = {}
        self._by_columns: dict[str, Tensor] = {}

    @property
    def is_text(self) -> bool:
        """Whether batches are real text."""
        return self._text is not None

    def batches(self, case: Case) -> list[Tensor]:
        """Different batches (B, S) of token ids: successive stretches of the text, or independent draws."""
        shape = (self.settings.batches, case.rows, case.tokens)
        if self._text is None:
            generator = torch.Generator().manual_seed(self.settings.seed + 1)
            ids = torch.randint(0, shape_of(self.model.config).vocabulary, shape, generator=generator)
        else:
            need = shape[0] * shape[1] * shape[2]
            if len(self._text) < need:
                raise UserError(f"the text has {len(self._text)} tokens, {need} are needed: use a longer one")
            ids = self._text[:need].view(shape)
        return list(ids.to(self.device))

    def variant(self, variant: Variant) -> PreTrainedModel:
        """A copy under a regime; it shares what it can with the dense model and with other variants."""
        method = variant.method
        known = None if method is None else str((method.label, method.settings()))
        if known in self._static:
            return sharing_copy(self._static[known])
        skip, multiple = self.settings.skip_layers, self.settings.round_to
        model = pruned_copy(
            self.model, variant, self.statistics, pruning_ratio=self.ratio, skip_layers=skip, round_to=multiple
        )
        if isinstance(method, DynamicMethod):
            self._share_columns(model)
        elif known is not None:
            self._static[known] = model
        return model

    def _share_columns(self, model: PreTrainedModel) -> None:
        """One copy of the output matrices that are stored by columns for all variants together."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not module.weight.is_contiguous():
                module.weight.data = self._by_columns.setdefault(name, module.weight.data)

    def only(self, variant: Variant) -> PreTrainedModel:
        """The model itself under a regime, nothing kept beside it: for measuring memory."""
        if variant.method is not None:
            prune_(
                self.model,
                variant.method,
                self.statistics if variant.method.needs_statistics else None,
                pruning_ratio=self.ratio,
                skip_layers=self.settings.skip_layers,
                round_to=self.settings.round_to,
                keep_dense=False,
                release_stats=True,
            )
        del self.statistics
        return self.model

    def _calibrated(self) -> Statistics:
        rows = _CALIBRATION_ROWS
        if self._text is None:
            ids = torch.randint(0, shape_of(self.model.config).vocabulary, (rows, self.longest))
        else:
            ids = self._text[-rows * self.longest :].view(rows, self.longest)  # the end: batches are from the start
        return calibrate(self.model, [{"input_ids": ids.to(self.device)}], progress=False)


def chosen_device(settings: BenchmarkSettings) -> torch.device:
    """The device of the settings; an accelerator where none is named and one is there."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if settings.device is None:
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(settings.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = "cpu" if found is None else f"cpu and {found.type}"
        raise UserError(f"there is no device {settings.device!r} here: choose from {here}") from error
    return device


def _tokens(model: str, text: str) -> Tensor:
    ids: list[int] = load_tokenizer(model)(source_named(text).text())["input_ids"]
    return torch.tensor(ids)
