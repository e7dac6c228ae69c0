import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pp_lightning import UserError, prune_
from pp_lightning.calibration_data import fingerprint
from pp_lightning.methods import WandaSP
from pp_lightning.methods.base import StaticChoice
from pp_lightning.methods.recorded import Choices
from pp_lightning.pruning import pruning_of
from pp_lightning.recovery import Adapters, Recovered
from pp_lightning.recovery.adapters import up_of
from pp_lightning.recovery.folder import CHOICES
from tests.models import config, ids, logits, statistics, tiny

AMOUNTS = {"pruning_ratio": 0.5, "attention_ratio": None, "mlp_ratio": None, "skip_layers": [], "round_to": 16}


@pytest.fixture
def folder(tmp_path):
    """A pruned model with trained adapters, as ``fit`` leaves it; every layer keeps half."""
    model = tiny("llama")
    dense = fingerprint(model)
    prune_(model, WandaSP(), statistics("llama"), **AMOUNTS)
    adapters = Adapters(model, rank=4, alpha=8)
    with torch.no_grad():
        for _, layer in adapters.layers():
            up_of(layer).normal_(std=0.1)
    about = {"method": "wanda_sp", "settings": WandaSP().settings(), "amounts": AMOUNTS}
    kept = {key: StaticChoice(units) for key, units in pruning_of(model).choices.items()}
    adapters.save(tmp_path, adapters.state())
    Choices(dense, kept, about).save(tmp_path / CHOICES)
    return tmp_path, logits(model, ids())


def recovered_model(place):
    recovered, model = Recovered.load(place), tiny("llama")
    prune_(model, recovered.method, recovered.choices, **recovered.amounts)
    recovered.attach(model).merge()
    return model


def test_comes_back_as_it_was(folder):
    place, expected = folder
    torch.testing.assert_close(logits(recovered_model(place), ids()), expected, rtol=1e-4, atol=1e-4)
    assert Recovered.load(place).label == "wanda_sp_lora"


def test_reloads_in_stock_transformers(folder, tmp_path):
    """Adapters merged, it is a stock LLaMA with fewer heads and channels: the same logits, bit for bit."""
    model = recovered_model(folder[0])
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 80, "head_dim": 8}
    stock = AutoModelForCausalLM.from_config(config("llama", **sizes))
    stock.load_state_dict(model.state_dict())
    stock.save_pretrained(tmp_path / "stock")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(again.eval(), ids()), logits(model, ids()))
    assert not torch.allclose(logits(tiny("llama"), ids()), logits(model, ids()), atol=1e-2)


@pytest.mark.parametrize("name", ["choices.safetensors", "adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_folder(folder, name):
    (folder[0] / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}: give the folder that a finished fit with recovery wrote"):
        Recovered.load(folder[0])
    assert not Recovered.is_in(folder[0])


@pytest.mark.parametrize("name", ["choices.safetensors", "adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_folder(folder, name):
    (folder[0] / name).write_text("{}" if name.endswith("json") else "nothing")
    with pytest.raises(UserError, match="cannot read"):
        Recovered.load(folder[0])


def test_adapters_that_do_not_fit_leave_the_model_pruned_and_plain(folder):
    recovered, model = Recovered.load(folder[0]), tiny("llama")
    wrong = replace(recovered, adapter={name: tensor[:, :-1] for name, tensor in recovered.adapter.items()})
    prune_(model, recovered.method, recovered.choices, **recovered.amounts)
    before = logits(model, ids())
    with pytest.raises(UserError, match="adapters are of another model"):
        wrong.attach(model)
    assert torch.equal(logits(model, ids()), before)
    assert not any("lora" in path for path, _ in model.named_modules())


def test_settings_in_the_folder_are_plain(folder):
    settings = json.loads((folder[0] / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 8, "LORA")
    assert "self_attn.q_proj" in settings["target_modules"]
