"""int8 on top of an exported folder: torchao's weight-only quantisation, compared with what it was made from."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from pp_lightning.errors import UserError
from pp_lightning.export.configs import write_json
from pp_lightning.export.verify import Behaviour, Int8Check

_STEP = 2**-7  # of int8, relative to the largest weight of a row; twice what rounding needs, for scales in bfloat16
_ALLOWED = 0.1  # nats a token: trained models were seen at a ten-thousandth of it, random ones near it


def quantise_folder(
    folder: Path, expected: Behaviour, device: torch.device, *, bundled_code: bool, max_shard_size: str
) -> Int8Check:
    """Put int8 matrices in place of a folder's weights, load it again as a user would, and compare.

    Every row of a matrix has a scale of its own, so any width will do. Weights are safetensors as before.

    Raises:
        UserError: the model has no matrices that torchao quantises, one is further off than int8 rounds, or the next
            token's distribution is.
    """
    from torchao.quantization import Int8WeightOnlyConfig

    model = _loaded(folder, bundled_code, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)))
    new, old = folder / "quantised", folder / "unquantised"
    model.save_pretrained(new, max_shard_size=max_shard_size)
    described = json.loads((new / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    del model
    old.mkdir()
    for source, target in ((folder, old), (new, folder)):
        for weights in source.glob("model*.safetensors*"):
            weights.rename(target / weights.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"quantization_config": described}
    write_json(folder / "config.json", config)
    found = _loaded(folder, bundled_code)
    matrices = _compare_matrices(found, old)
    for place in (new, old):
        shutil.rmtree(place)
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    return _compared(expected, Behaviour.of_model(found.to(device)), matrices, size)


def _loaded(folder: Path, bundled_code: bool, **more: TorchAoConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=bundled_code, **more
    )
    return model.eval()


def _compare_matrices(model: PreTrainedModel, unquantised: Path) -> int:
    """Read every matrix again, one at a time; returns how many are int8."""
    quantised = {name: one for name, one in model.named_parameters() if type(one.data).__module__.startswith("torchao")}
    if not quantised:
        raise UserError("torchao quantises no matrix of this model: leave --quantize out")
    for path in unquantised.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in quantised.keys() & set(file.keys()):
                matrix = file.get_tensor(name).float()
                step = matrix.abs().amax(1, keepdim=True) * _STEP
                if not ((quantised[name].dequantize().float().cpu() - matrix).abs() <= step).all():  # NaN too
                    raise UserError(f"int8 failed its check: {name} came back further off than int8 rounds")
    return len(quantised)


def _compared(expected: Behaviour, found: Behaviour, matrices: int, size: int) -> Int8Check:
    real = expected.mask.bool()
    own, other = expected.logits[real].double(), found.logits[real].double()
    difference = float((own - other).abs().max() / own.abs().max())
    wanted, given = own.log_softmax(-1), other.log_softmax(-1)
    divergence = float((wanted.exp() * (wanted - given)).sum(-1).mean())
    if not divergence <= _ALLOWED:  # NaN too
        raise UserError(
            f"int8 failed its check: the next token's distribution is {divergence:.2g} nats from the unquantised "
            f"model's, more than {_ALLOWED}: leave --quantize out"
        )
    same = int((expected.tokens == found.tokens).sum())
    return Int8Check(divergence, _ALLOWED, difference, same, expected.tokens.numel(), matrices, size)
