"""Runs pruned models on a device that is not there, and tells what an accelerator would have met.

Tensors are fake: they have shapes, types and a device, and no values. So whatever asks for a value, which on an
accelerator makes the host wait, is an error here, and so is whatever mixes devices. It needs a device type of its own,
which stays registered in the process: run it in one of its own.

    python -m tests.stand_in_device CASE...        JSON: for each case its findings
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from pp_lightning import calibrate, compile_, prune_
from pp_lightning.blocks import Block
from pp_lightning.families import layers_of, stack_of
from pp_lightning.methods import DynamicMethod, FullBatchProbing, ProbePruning
from pp_lightning.pruning import pruning_of
from pp_lightning.statistics import BlockSums, Statistics
from tests.models import SETTINGS, calibration_batches, statistics, tiny

DEVICE = "stand_in"
_FIXED = 32  # tokens of a cache of fixed size
PAPER = ProbePruning(row_ratio=0.3)


@dataclass
class Findings:
    """What came out of one case.

    Attributes:
        error: what stopped it: a value that was asked for, or devices that were mixed.
        device: where the logits are.
        elsewhere: nodes of the compiled graph whose result is on another device.
        moving: inputs of the graph whose address may change from batch to batch; CUDA graphs copy these.
        written: inputs of the graph that it writes to.
        decoding: the same of a token that continues a cache of fixed size, the whole model in one graph.
    """

    error: str | None = None
    device: str | None = None
    elsewhere: list[str] = field(default_factory=list)
    moving: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    decoding: "Findings | None" = None


class WaitingMethod(FullBatchProbing):
    """What must be found: it looks at a score before it goes on."""

    def unit_scores(self, energy: Tensor, weight_norm: Tensor, channels: int) -> Tensor:
        """Scores, after a look at them."""
        scores = super().unit_scores(energy, weight_norm, channels)
        return scores * 2 if scores.sum() > 0 else scores


class MixingMethod(FullBatchProbing):
    """What must be found: it forgets on which device it is."""

    def unit_scores(self, energy: Tensor, weight_norm: Tensor, channels: int) -> Tensor:
        """Scores, with a vector from the host."""
        scores = super().unit_scores(energy, weight_norm, channels)
        return scores + torch.zeros(scores.shape)


class _FixedSlot(StaticLayer):
    """A layer's cache of fixed size that starts without ``torch.tensor``, which makes values."""

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        self.max_cache_len = _FIXED
        self.cumulative_length = torch.zeros((), dtype=torch.long, device=DEVICE)


class _Slot(DynamicLayer):
    """A layer's cache that starts without ``torch.tensor``, which makes values."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """No tokens yet."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True


@contextmanager
def on_device(model: PreTrainedModel, elsewhere: Sequence[nn.Module] = ()) -> Iterator[None]:
    """The model's tensors replaced by fake ones on the stand-in device; those of some modules on a second one."""
    second = {module for one in elsewhere for module in one.modules()}
    described = {
        (module, name): (tensor.shape, tensor.stride(), tensor.dtype)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    with FakeTensorMode(), torch.inference_mode():
        for (module, name), (shape, stride, dtype) in described.items():
            device = torch.device(DEVICE, 1 if module in second else 0)
            fake = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
            else:
                module._buffers[name] = fake
        yield


def inspect(name: str, method: DynamicMethod, **settings: Any) -> Findings:
    """One model and method: a batch, decoding, and a batch through a compiled layer."""
    model, other = (tiny(name, num_hidden_layers=4) for _ in range(2))  # two of them are pruned
    findings = Findings()
    needed = calibrate(other, calibration_batches(), progress=False) if method.needs_statistics else None
    prune_(model, method, needed, **{**SETTINGS, "pruning_ratio": 0.3, **settings})
    pruning_of(model).context.overlaps = False  # the stand-in has no streams
    try:
        with on_device(model):
            ids = torch.zeros(4, 24, dtype=torch.long, device=DEVICE)
            findings.device = str(model(input_ids=ids, use_cache=False).logits.device.type)
            for _ in range(2):  # a second prompt leaves its slices for decoding
                cache = Cache(layer_class_to_replicate=_Slot)
                model(input_ids=ids, past_key_values=cache, use_cache=True)
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            findings.decoding = _decoding(model, ids)
            torch._dynamo.reset()
            with patch("torch.compile", _compiled(torch.compile, findings)):
                compile_(model)
                model(input_ids=ids, use_cache=False)
    except Exception as error:  # what a faulty method raises depends on where it is found
        findings.error = f"{type(error).__name__}: {error}"
    return findings


def _compiled(real: Callable[..., Any], findings: Findings) -> Callable[..., Any]:
    """``torch.compile`` as for batches of the first size, the only ones that CUDA graphs are recorded of."""
    return lambda function, **_: real(function, backend=_inspector(findings), fullgraph=True, dynamic=False)


def _decoding(model: PreTrainedModel, ids: Tensor) -> Findings:
    """A token after a prompt in a cache of fixed size, the whole model in one graph, as transformers compiles it."""
    findings = Findings()
    cache = Cache(layers=[_FixedSlot() for _ in range(model.config.num_hidden_layers)])
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    torch._dynamo.reset()
    compiled = torch.compile(model.__call__, backend=_inspector(findings), fullgraph=True)
    position = torch.zeros(ids.shape[0], 1, dtype=torch.long, device=DEVICE)
    mask = torch.ones(ids.shape[0], 1, 1, _FIXED, dtype=torch.bool, device=DEVICE)
    given = {"position_ids": position, "attention_mask": mask, "past_key_values": cache}
    findings.device = str(compiled(input_ids=ids[:, :1], **given, use_cache=True).logits.device.type)
    return findings


class _Moves(AlignDevicesHook):
    """Moves a module's inputs to its device. The weights are there: see :func:`on_device`."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def spread(name: str, method: DynamicMethod) -> Findings:
    """A model over two devices, as accelerate spreads it: padded batches and decoding."""
    # eager attention: SDPA looks whether a mask hides anything, which is to look at values
    model, findings = tiny(name, attn_implementation="eager"), Findings()
    decoder, layers = stack_of(model), layers_of(model)
    final_norm = decoder.norm if hasattr(decoder, "norm") else decoder.final_layer_norm
    elsewhere = [*layers[4:], final_norm, model.lm_head]
    hooks = {module: _Moves(execution_device=torch.device("cpu")) for module in (*layers[:4], *elsewhere)}
    for module, hook in hooks.items():
        add_hook_to_module(module, hook)
    prune_(model, method, statistics(name) if method.needs_statistics else None, **SETTINGS)
    for module, hook in hooks.items():  # pruning has run the model: from now on it is elsewhere
        hook.execution_device = torch.device(DEVICE, 1 if module in elsewhere else 0)
    pruning_of(model).context.overlaps = False
    try:
        with on_device(model, elsewhere):
            ids = torch.zeros(4, 24, dtype=torch.long, device=DEVICE)
            mask = torch.ones_like(ids)
            for _ in range(2):
                cache = Cache(layer_class_to_replicate=_Slot)
                model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
                logits = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
            findings.device = str(logits.device)
            _statistics_of_the_second_device()
    except Exception as error:
        findings.error = f"{type(error).__name__}: {error}"
    return findings


def _statistics_of_the_second_device() -> None:
    """What was summed up there, with the counts of the first device."""
    key, second = (4, Block.MLP), torch.device(DEVICE, 1)
    squares, values, shift, spread = (torch.ones(*shape, device=second) for shape in ((24, 8), (24, 8), (8,), (24, 8)))
    sums = BlockSums(squares, values, shift, spread)
    found = Statistics("", torch.ones(24, device=DEVICE), {key: sums}, {key: torch.ones(24, device=second)})
    for look in (
        found.second_moment,
        found.channel_moments,
        found.means,
        found.variance,
        found.deviations,
        found.residual_energy,
        found.energy,
    ):
        look(*key)
    found.second_moment(*key, release=True)


def _inspector(findings: Findings) -> Callable[[GraphModule, list[Tensor]], Callable[..., Any]]:
    """A backend that runs a graph as it is, after a look at it."""

    def backend(graph: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        placeholders = graph.graph.find_nodes(op="placeholder")
        for node in placeholders:
            if not (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"):
                findings.moving.append(node.name)

        def look(functional: GraphModule, _: list[Tensor]) -> Callable[..., Any]:
            for node in functional.graph.nodes:
                value = node.meta.get("val")
                if isinstance(value, Tensor) and value.device.type != DEVICE:
                    findings.elsewhere.append(f"{node.name}: {value.device.type}")
            for node in functional.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
                number = functional.graph.find_nodes(op="placeholder").index(node.args[0])
                findings.written.append(placeholders[number].name)
            return functional.forward

        return aot_module_simplified(graph, examples, fw_compiler=look, keep_inference_input_mutations=True)

    return backend


CASES: dict[str, Callable[[], Findings]] = {
    **{f"{name}-paper": partial(inspect, name, PAPER) for name in ("llama_gqa", "mistral")},
    **{f"{name}-best": partial(inspect, name, ProbePruning.best()) for name in ("qwen3", "opt")},
    "qwen2-parallel": partial(inspect, "qwen2", ProbePruning(row_ratio=0.3, probe_source="previous")),
    "llama-full_batch": partial(inspect, "llama", FullBatchProbing()),
    "llama_gqa-spread": partial(spread, "llama_gqa", PAPER),
    "opt-spread_best": partial(spread, "opt", ProbePruning.best()),
    "llama-spread_parallel": partial(spread, "llama", ProbePruning(row_ratio=0.3, probe_source="previous")),
    "waits": partial(inspect, "llama", WaitingMethod()),
    "mixes": partial(inspect, "llama", MixingMethod()),
}


def main() -> None:
    """The cases that were named, and what each found."""
    _setup_privateuseone_for_python_backend(DEVICE)
    json.dump({case: asdict(CASES[case]()) for case in sys.argv[1:]}, sys.stdout)


if __name__ == "__main__":
    main()
