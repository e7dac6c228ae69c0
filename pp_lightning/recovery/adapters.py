"""LoRA adapters on a transformers model, by peft. The model keeps its class; its projections are wrapped in place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pp_lightning.blocks import BlockKey
from pp_lightning.errors import UserError
from pp_lightning.families import blocks_of, layer_prefix, unit_rows
from pp_lightning.functional.selection import take_columns, take_unit_rows
from pp_lightning.gradients import Projection
from pp_lightning.stored import values_of

_NAME = "default"  # peft's name for an only adapter
_PREFIX = "base_model.model."  # what peft's own wrapper puts before a module's path in its files


class Adapters:
    """Fresh adapters ``c B A`` (B zero) beside every projection of a model; its own weights stop training.

    c is ``alpha / rank``; ``seed`` is of A.
    """

    def __init__(self, model: PreTrainedModel, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0) -> None:
        try:
            import peft  # an extra, and slow to import
        except ImportError as error:
            raise UserError("LoRA adapters need peft: pip install 'pp-lightning[finetune]'") from error
        self.model = model
        self.paths: dict[Projection, str] = {
            (key, modules.role(name)): f"{layer_prefix(model, key[0])}.{modules.path_of(name)}"
            for key, modules in blocks_of(model).items()
            for name in modules.names
        }
        self._bases = {path: model.get_submodule(path) for path in self.paths.values()}
        self._required = {parameter: parameter.requires_grad for parameter in model.parameters()}
        depth = layer_prefix(model, 0).count(".") + 1  # what is behind so many dots is the same in every layer
        endings = sorted({path.split(".", maxsplit=depth)[-1] for path in self.paths.values()})
        self.config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=endings, task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]), _float32_by_default():  # a seed's A is the same everywhere
            torch.manual_seed(seed)
            peft.get_peft_model(model, self.config)

    def layers(self) -> Iterator[tuple[Projection, Any]]:
        """Peft's LoRA layers, by block and role."""
        for projection, path in self.paths.items():
            yield projection, self.model.get_submodule(path)

    def parameters(self) -> list[nn.Parameter]:
        """All A and B."""
        return [p for _, layer in self.layers() for p in (down_of(layer), up_of(layer))]

    def state(self) -> dict[str, Tensor]:
        """All A and B by the names of peft's files; of sharded ones every process must ask."""
        found = {}
        for projection, layer in self.layers():
            down, up = self.names(projection)
            found[down], found[up] = (values_of(weight).detach() for weight in (down_of(layer), up_of(layer)))
        return found

    def names(self, projection: Projection) -> tuple[str, str]:
        """The names of a projection's A and B in :meth:`state`."""
        path = f"{_PREFIX}{self.paths[projection]}"
        return f"{path}.lora_A.weight", f"{path}.lora_B.weight"

    def sliced_state(self, kept: Mapping[BlockKey, tuple[Tensor, int]]) -> dict[str, Tensor]:
        """:meth:`state` as it is when the model is pruned: B without the rows, A without the columns that go.

        ``kept`` has each block's kept units (K,), and how many units there are.
        """
        state, blocks = self.state(), blocks_of(self.model)
        for key, (units, number) in kept.items():
            modules = blocks[key]
            for name in modules.names:
                down, up = self.names((key, modules.role(name)))
                if name == modules.output:
                    state[down] = take_columns(state[down], units, state[down].shape[1] // number).contiguous()
                else:
                    rows = unit_rows(modules.inputs[name], number, shared=False)
                    state[up] = take_unit_rows(state[up], rows, units)
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over A and B."""
        own = self.state()
        shapes, others = ({name: one.shape for name, one in of.items()} for of in (own, state))
        strangers = {name for name, _ in shapes.items() ^ others.items()}
        if strangers:
            raise UserError(
                f"these adapters are of another model: {sorted(strangers)[0]} does not fit, train them on this one"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def merge(self) -> None:
        """Put ``W + c B A`` in place of every wrapped projection; :meth:`detach` still brings W back, bit for bit."""
        merged = {self.paths[projection]: _merged(layer) for projection, layer in self.layers()}
        for path, linear in merged.items():
            self.model.set_submodule(path, linear)

    def detach(self) -> None:
        """Give the model its own projections back, merged or not."""
        for path, base in self._bases.items():
            self.model.set_submodule(path, base)
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
        del self.model.peft_config

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write a ``state`` into a folder, in peft's own format."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.inference_mode = True
        self.config.save_pretrained(folder)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def down_of(layer: Any) -> nn.Parameter:
    """A, (r, in), of a LoRA layer."""
    weight: nn.Parameter = layer.lora_A[_NAME].weight
    return weight


def up_of(layer: Any) -> nn.Parameter:
    """B, (out, r), of a LoRA layer."""
    weight: nn.Parameter = layer.lora_B[_NAME].weight
    return weight


def scale_of(layer: Any) -> float:
    """C of a LoRA layer."""
    return float(layer.scaling[_NAME])


def _merged(layer: Any) -> nn.Linear:
    base = layer.get_base_layer()
    weight = base.weight.float() + layer.get_delta_weight(_NAME).float()
    linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
    return linear.train(base.training)


@contextmanager
def _float32_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
