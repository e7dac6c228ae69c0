"""The check of an export fails where it should."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pp_lightning import UserError
from pp_lightning.export import export_checkpoint, verify
from pp_lightning.export.verify import Behaviour, compare, tolerance
from tests.export.test_checkpoint import pruned
from tests.models import greedy_without_cache


def spoil(monkeypatch, change):
    """Change a written folder behind the exporter's back, before it is checked."""

    def check(folder, *arguments, real=verify.verify, **more):
        change(folder)
        return real(folder, *arguments, **more)

    monkeypatch.setattr("pp_lightning.export.checkpoint.verify", check)


def edit_weights(edit):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def edit_config(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


WEIGHT = "model.layers.3.self_attn.o_proj.weight"
FAULTS = {
    "a weight is lost": (edit_weights(lambda w: w.pop(WEIGHT)), "missing keys"),
    "a weight too many": (edit_weights(lambda w: w.update({"model.extra": torch.zeros(2)})), "unexpected keys"),
    "a weight is slightly off": (edit_weights(lambda w: w[WEIGHT].mul_(1.001)), "logits differ"),
    "a weight is NaN": (edit_weights(lambda w: w[WEIGHT].fill_(float("nan"))), "logits differ"),
    "heads in another order": (edit_weights(lambda w: w.update({WEIGHT: w[WEIGHT].roll(8, 1)})), "logits differ"),
    "another rotation": (edit_config(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), "logits differ"),
    "a sliding window": (edit_config(sliding_window=8), "logits differ"),
    "another head size": (edit_config(head_dim=4), "cannot load it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_the_export_and_leaves_nothing(fault, tmp_path, monkeypatch):
    change, message = FAULTS[fault]
    spoil(monkeypatch, change)
    with pytest.raises(UserError, match=message) as caught:
        export_checkpoint(pruned("llama"), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_without_a_fault_it_passes(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda folder: None)
    export_checkpoint(pruned("llama"), tmp_path / "out")
    assert (tmp_path / "out" / "pruning.json").exists()


def test_tokens_are_compared():
    expected = Behaviour.of_model(pruned("llama"))
    others = expected.tokens.clone()
    others[1, 3] = (others[1, 3] + 1) % 96
    with pytest.raises(UserError, match="greedy token 4 differs"):
        compare(expected, replace(expected, tokens=others), torch.float32, 5)
    assert compare(expected, expected, torch.float32, 5).same_tokens == 16


def test_a_tie_may_fall_either_way():
    expected = Behaviour.of_model(pruned("llama"))
    tokens, steps = expected.tokens.clone(), expected.step_logits.clone()
    tokens[0, 2] = (tokens[0, 2] + 1) % 96
    steps[0, 2, tokens[0, 2]] = steps[0, 2].max()
    compare(replace(expected, step_logits=steps), replace(expected, tokens=tokens), torch.float32, 5)


def test_padding_is_not_compared():
    expected = Behaviour.of_model(pruned("llama"))
    logits = expected.logits.clone()
    assert not expected.mask[1, 0]
    logits[1, 0] = float("nan")
    compare(expected, replace(expected, logits=logits), torch.float32, 5)


def test_tokens_are_those_of_a_run_without_cache():
    model = pruned("llama_gqa")
    found = Behaviour.of_model(model)
    batch = {"input_ids": found.prompt, "attention_mask": found.mask}
    assert torch.equal(found.tokens, greedy_without_cache(model, batch, found.tokens.shape[1]))


def test_tolerances():
    assert tolerance(torch.float32, 32) == 1e-5
    assert tolerance(torch.float16, 32) == pytest.approx(8 * 2**-10)
    assert tolerance(torch.bfloat16, 32) == pytest.approx(8 * 2**-7)
