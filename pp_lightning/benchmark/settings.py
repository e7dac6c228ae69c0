"""What to measure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pp_lightning.compilation import RECORDING_MODES, CompileMode
from pp_lightning.errors import UserError, unknown

MeasuredDtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class ModelChoice:
    """The model to measure: random weights in a known shape, or a checkpoint.

    Attributes:
        shape: ``llama-2-7b``, ``llama-2-13b``, ``llama-3-8b``, ``opt-13b``, or ``llama-2048`` (hidden 2048, MLP 5632,
            32 heads).
        layers: number of layers; none takes the shape's own.
        path: a checkpoint folder or hub id instead of a shape.
    """

    shape: str = "llama-2048"
    layers: int | None = None
    path: str | None = None


@dataclass
class Case:
    """One size of batch.

    Attributes:
        rows: B.
        tokens: S.
    """

    rows: int
    tokens: int


@dataclass
class BenchmarkSettings:
    """What to measure, and how often.

    Attributes:
        model: shape or checkpoint.
        cases: batch sizes.
        dtypes: of the weights. Those that the CPU has no arithmetic for are left out.
        emulated: measure types that the CPU has no arithmetic for all the same. It takes very long.
        ratios: pruning ratios, fraction removed.
        variants: which rows to measure; dense eager and dense compiled are always among them.
        skip_layers: layers left dense.
        round_to: MLP channels are kept in multiples of this.
        repeats: timed rounds; every round runs every variant once, on the next batch.
        warmup: rounds before these, not counted; compiling happens here.
        batches: different batches, at least 8, that rounds go through in turn.
        blocks: also time one attention and one MLP block alone.
        decode: batch sizes to time decoding at; none leaves it out.
        prompts: tokens of the prompts that decoding follows.
        decode_tokens: tokens decoded per round after each prompt.
        decode_compiled: also decode with the whole model in one graph, where the variants have compiled ones.
        memory: also measure each variant's peak memory at the first case, in a process of its own.
        text: a text to cut the batches from, by its name: a file, a data set of the hub, or Embedded; needed with a
            checkpoint, and gives perplexities too.
        mode: torch.compile's mode.
        device: ``cpu``, ``cuda``, ...; none takes an accelerator where there is one.
        threads: CPU threads; none leaves torch's choice.
        seed: of random weights and batches.
        calibrate_break_even: measure nothing but from how many tokens on a probe of a prompt pays, for ``prefill``
            ``auto``: as many rows as the largest case has, up to its tokens. Written beside ``statistics``, or into the
            output folder.
        statistics: the statistics file that ``--model.statistics`` names elsewhere.
    """

    model: ModelChoice = field(default_factory=ModelChoice)
    cases: list[Case] = field(default_factory=lambda: [Case(20, 128)])
    dtypes: list[MeasuredDtype] = field(default_factory=lambda: ["float32"])
    emulated: bool = False
    ratios: list[float] = field(default_factory=lambda: [0.4])
    variants: list[str] = field(default_factory=lambda: ["all"])
    skip_layers: list[int] = field(default_factory=list)
    round_to: int = 64
    repeats: int = 9
    warmup: int = 2
    batches: int = 8
    blocks: bool = True
    decode: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=lambda: [64])
    decode_tokens: int = 32
    decode_compiled: bool = True
    memory: bool = True
    text: str | None = None
    mode: CompileMode = "default"
    device: str | None = None
    threads: int | None = None
    seed: int = 0
    calibrate_break_even: bool = False
    statistics: str | None = None

    def check(self) -> None:
        """Refuse what cannot be measured, before any work."""
        self._check_numbers()
        if self.batches < 8:
            raise UserError(f"batches must be at least 8, not {self.batches}: a cache would flatter the choice")
        if self.repeats < 1 or self.warmup < 1:
            raise UserError("repeats and warmup must be at least 1")
        if self.mode in RECORDING_MODES and self.warmup < 3:
            raise UserError(f"mode {self.mode} records CUDA graphs in its second round: set warmup to at least 3")
        if any(case.rows < 1 or case.tokens < 2 for case in self.cases) or not self.cases:
            raise UserError("cases need at least 1 row and 2 tokens each")
        if any(tokens < 2 for tokens in self.prompts) or not self.prompts:
            raise UserError("prompts need at least 2 tokens each")
        if self.model.path is not None and self.text is None:
            raise UserError("a checkpoint is measured on real text: give a file with --text")

    def _check_numbers(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads must be at least 1, not {self.threads}")
        if self.model.layers is not None and self.model.layers < 1:
            raise UserError(f"layers must be at least 1, not {self.model.layers}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        if not self.ratios or not all(0.0 <= ratio < 1.0 for ratio in self.ratios):
            raise UserError(f"ratios must be numbers in [0, 1), at least one, not {self.ratios}")
        if not self.dtypes:
            raise UserError("dtypes must name at least one")

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "BenchmarkSettings":
        """Settings from nested dictionaries, as a YAML file holds them."""
        known = {f.name for f in fields(cls)}
        strange = sorted(set(values) - known - {"out"})
        if strange:
            raise unknown("setting", strange[0], sorted(known))
        given = {key: value for key, value in values.items() if key in known}
        try:
            if isinstance(given.get("model"), Mapping):
                given["model"] = ModelChoice(**given["model"])
            if "cases" in given:
                given["cases"] = [case if isinstance(case, Case) else Case(**case) for case in given["cases"]]
        except TypeError as error:
            raise UserError(f"cannot read the settings: {error}") from error
        return cls(**given)
