import pytest
import torch
from peft import PeftModel

from pp_lightning import UserError, prune_, unprune_
from pp_lightning.blocks import Block
from pp_lightning.methods import WandaSP
from pp_lightning.recovery import Adapters
from pp_lightning.recovery.adapters import down_of, up_of
from tests.models import HEADS, MODELS, SETTINGS, ids, logits, statistics, tiny


def trained(model, seed=0, **settings):
    """Adapters whose B is no longer zero."""
    adapters = Adapters(model, rank=4, alpha=8, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapters.layers():
            up_of(layer).copy_(0.1 * torch.randn(up_of(layer).shape, generator=generator))
    return adapters


@pytest.mark.parametrize("name", MODELS)
def test_every_projection_of_every_layer(name):
    model = tiny(name)
    adapters = Adapters(model, rank=4, alpha=8)
    assert len(adapters.parameters()) == 2 * 5 * (6 if name == "opt" else 7)
    assert {p for p in model.parameters() if p.requires_grad} == set(adapters.parameters())
    torch.testing.assert_close(logits(model, ids()), logits(tiny(name), ids()))  # B is zero


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("merged", [False, True])
def test_merge_changes_no_output_and_detach_brings_the_model_back(name, merged):
    model, text = tiny(name), ids(2, 20)
    model.get_input_embeddings().weight.requires_grad_(False)
    flags = {path: p.requires_grad for path, p in model.named_parameters()}
    adapters = trained(model)
    wrapped = logits(model, text)
    assert not torch.allclose(wrapped, logits(tiny(name), text), atol=1e-2)
    if merged:
        adapters.merge()
        torch.testing.assert_close(logits(model, text), wrapped, rtol=1e-4, atol=1e-4)
    adapters.detach()
    assert torch.equal(logits(model, text), logits(tiny(name), text))
    assert {path: p.requires_grad for path, p in model.named_parameters()} == flags
    assert "peft_config" not in vars(model)


def test_merge_by_hand():
    model = tiny("llama")
    adapters = trained(model)
    layer = dict(adapters.layers())[(3, Block.MLP), "up"]
    expected = tiny("llama").model.layers[3].mlp.up_proj.weight + 2.0 * up_of(layer) @ down_of(layer)
    adapters.merge()
    torch.testing.assert_close(model.model.layers[3].mlp.up_proj.weight, expected.detach())


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
def test_sliced_adapters_are_those_of_the_pruned_model(name):
    """Pruning the merged dense model, or merging into the pruned one: the same weights."""
    stats = statistics(name)
    units = 4 if MODELS[name].grouped else HEADS
    pruned = tiny(name)
    prune_(pruned, WandaSP(), stats, **SETTINGS)
    from pp_lightning.pruning import pruning_of

    kept = {key: (k, units if key[1] is Block.ATTENTION else 160) for key, k in pruning_of(pruned).choices.items()}
    dense = tiny(name)
    whole = trained(dense)
    state = whole.sliced_state(kept)
    whole.merge()
    inside = Adapters(pruned, rank=4, alpha=8)
    inside.load(state)
    inside.merge()
    for (key, role), path in whole.paths.items():
        merged, narrow = dense.get_submodule(path).weight, pruned.get_submodule(path).weight
        if key in kept:
            indices, number = kept[key]
            dim = 1 if role == "output" else 0
            width = merged.shape[dim] // number
            channels = [u * width + i for u in indices.tolist() for i in range(width)]
            merged = merged.index_select(dim, torch.tensor(channels))
        torch.testing.assert_close(narrow, merged)


def test_peft_reads_the_folder(tmp_path):
    """Our names and settings are peft's own."""
    model, text = tiny("llama_gqa"), ids(2, 20)
    adapters = trained(model)
    adapters.save(tmp_path, adapters.state())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    theirs = PeftModel.from_pretrained(tiny("llama_gqa"), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=text).logits, logits(model, text))


def test_seed_decides_the_start_and_nothing_else():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, third = (Adapters(tiny("llama"), 4, 8, seed=seed).state() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], third[name])


def test_bfloat16_weights_have_float32_adapters():
    model = tiny("llama").bfloat16()
    adapters = trained(model)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    adapters.merge()
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_adapters_of_another_model():
    state = Adapters(tiny("llama"), 4, 8).state()
    model = tiny("llama_gqa")
    with pytest.raises(UserError, match=r"these adapters are of another model: .*k_proj.* does not fit"):
        Adapters(model, 4, 8).load(state)
    with pytest.raises(UserError, match="adapters are of another model"):
        Adapters(tiny("opt"), 4, 8).load(state)


def test_on_a_pruned_model_that_comes_back():
    model = tiny("llama")
    prune_(model, WandaSP(), statistics("llama"), **SETTINGS)
    adapters = trained(model)
    adapters.merge()
    adapters.detach()
    unprune_(model)
    assert torch.equal(logits(model, ids()), logits(tiny("llama"), ids()))
