"""int8 folders: what torchao writes is loaded by transformers alone, follows the model, and takes half the bytes."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pp_lightning import UserError
from pp_lightning.export import export_checkpoint, int8
from tests.commonsense.tokenizers import tokenizer_of
from tests.export.engine_models import small_pruned
from tests.models import ids, logits

try:
    import torchao
except ImportError:
    torchao = None
needs_torchao = pytest.mark.skipif(torchao is None, reason="torchao is not installed: pip install '.[int8]'")


@torch.no_grad()
def scaled(model, factor):
    """The model with smaller weights, whose logits do not amplify every rounding, or with larger ones."""
    for weight in model.parameters():
        weight.mul_(factor)
    return model


@torch.no_grad()
def rounded(model):
    """The model with every row of its projections rounded to a 255th of its range, in a loop."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not path.endswith("lm_head"):
            for row in module.weight:
                step = row.abs().max() / 127.5
                row.copy_((row / step).round().clamp(-128, 127) * step)
    return model


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "layout"),
    [("llama_gqa", "wanda_sp", "uniform"), ("llama_gqa", "flap", "per-layer"), ("opt", "wanda_sp", "padded")],
)
def test_transformers_alone_loads_it(name, method, layout, tmp_path):
    model, text = scaled(small_pruned(name, method, layout), 0.3), ids()
    wanted = logits(model, text)
    plain, _ = export_checkpoint(model, tmp_path / "plain", layout=layout)
    _, check = export_checkpoint(
        model, tmp_path / "out", layout=layout, tokenizer=tokenizer_of("byte_level"), int8=True
    )
    found = check.int8
    assert 0 < found.difference < 0.02 and 0 < found.divergence < 1e-3
    assert found.matrices == (35 if name == "llama_gqa" else 32)
    assert found.bytes < 0.6 * plain.bytes and not (tmp_path / "out" / "quantised").exists()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds == {torch.int8, torch.float32}
    torch.save(text, tmp_path / "text.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; "
        f"m = A.from_pretrained({str(tmp_path / 'out')!r}, dtype='auto', trust_remote_code=True).eval(); "
        f"torch.save(m(torch.load({str(tmp_path / 'text.pt')!r})).logits.detach(), {str(tmp_path / 'logits.pt')!r}); "
        "assert 'pp_lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    given = torch.load(tmp_path / "logits.pt")
    assert 0 < float((given - wanted).abs().max() / wanted.abs().max()) < 0.02
    naive = logits(rounded(model), text)
    assert float((given - naive).abs().max()) < 0.3 * float((given - wanted).abs().max())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| int8 | {found.matrices} matrices by torchao" in card
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["check"]["int8"]["matrices"] == found.matrices


@needs_torchao
@pytest.mark.slow
def test_a_scale_that_is_wrong_is_found(tmp_path, monkeypatch):
    """As if a quantiser had got one matrix's scales wrong, by 2%."""
    real = AutoModelForCausalLM.from_pretrained

    def spoiled(folder, **more):
        if "quantization_config" not in more:
            file = folder / "model.safetensors"
            with safe_open(file, "pt") as opened:
                about = opened.metadata()
            tensors = load_file(file)
            tensors["model.layers.2.mlp.down_proj._weight_scale"] *= 1.02
            save_file(tensors, file, metadata=about)
        return real(folder, **more)

    monkeypatch.setattr(int8, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=spoiled))
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.down_proj\.weight came back further off than int8 rounds"):
        export_checkpoint(small_pruned("llama_gqa"), tmp_path / "out", int8=True)
    assert list(tmp_path.iterdir()) == []


@needs_torchao
@pytest.mark.slow
def test_a_model_that_int8_does_not_suit_is_found(tmp_path):
    """Its layers amplify every rounding."""
    model = scaled(small_pruned("llama_gqa"), 3)
    with pytest.raises(UserError, match=r"nats from the unquantised model's, more than 0\.1"):
        export_checkpoint(model, tmp_path / "out", int8=True)
    assert list(tmp_path.iterdir()) == []


def test_without_torchao_it_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"int8 needs torchao: pip install 'pp-lightning\[int8\]'"):
        export_checkpoint(small_pruned("llama"), tmp_path / "out", int8=True)
    assert list(tmp_path.iterdir()) == []
