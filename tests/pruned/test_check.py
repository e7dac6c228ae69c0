"""What is not described is found, and what does not compute the same on fewer units is refused."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from pp_lightning import UserError, calibrate, kept_units, prune_, unprune_
from pp_lightning.blocks import Block
from pp_lightning.families import FAMILIES, blocks_of, family_of, shape_of_model
from pp_lightning.methods import FullBatchProbing, ProbePruning
from tests.models import GROUPS, calibration_batches, ids, logits, masked_dense, tiny
from tests.models import SETTINGS as GIVEN

SETTINGS = {**GIVEN, "skip_layers": (0,)}


def unknown(name):
    """A tiny model of a type that no description mentions: its code is all that is left to go by."""
    model = tiny(name)
    model.config.model_type = "something_new"
    assert family_of(model.config) not in FAMILIES
    return model


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2", "cohere2", "phi3", "gpt_neox", "exaone4", "qwen3_5_text"])
def test_parts_are_found_by_their_names(name):
    """But for what only a description can tell: phi3's attention reads its number of heads."""
    model = unknown(name)
    blocks = ("mlp",) if name == "phi3" else ("attention", "mlp")
    stats = calibrate(model, calibration_batches(), progress=False)
    prune_(model, ProbePruning(blocks=blocks), stats, **SETTINGS)
    found, shape = logits(model, ids()), shape_of_model(tiny(name))
    masked = masked_dense(tiny(name), kept_units(model), shape.num_key_value_heads)
    torch.testing.assert_close(found, logits(masked, ids()), rtol=1e-5, atol=1e-5)
    unprune_(model)
    assert torch.equal(logits(model, ids()), logits(tiny(name), ids()))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("opt", "its projections have no names that are known"),  # of the MLP: the layer itself runs it
        ("phi3", r"its code does not run on fewer units \(.+\)"),
        ("stablelm", r"its code does not run on fewer units \(.+\)"),
        ("stablelm_qk_norm", r"its code does not run on fewer units \(.+\)"),
        ("gpt_oss", r"its code does not run on fewer units \(.+\)"),
        ("cohere_qk_norm", r"its code does not run on fewer units \(.+\)"),
        ("olmo2", r"its code does not run on fewer units \(.+\)"),
        ("diffllama", "its code does not (run|compute the same) on fewer units"),
        ("deepseek_v3", "its projections have no names that are known"),
    ],
)
def test_without_its_description_a_model_is_refused_and_never_wrong(name, reason):
    block = "mlp" if name == "opt" else "attention"
    model = unknown(name)
    before = {path: vars(module).keys() for path, module in model.named_modules()}
    with pytest.raises(UserError, match=f"^the {block} of something_new cannot be pruned: {reason}[^\n]*$"):
        prune_(model, FullBatchProbing(blocks=(block,)), **SETTINGS)
    assert {path: vars(module).keys() for path, module in model.named_modules()} == before
    assert torch.equal(logits(model, ids()), logits(tiny(name), ids()))


class OwnAttention(nn.Module):
    """Somebody's own attention, without positions. Names of projections are all that it shares with others."""

    def __init__(self, mixes, size=64, heads=8, groups=GROUPS):
        super().__init__()
        self.head_dim = size // heads
        self.mixes = mixes
        self.q_proj, self.o_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.k_proj, self.v_proj = (nn.Linear(size, groups * self.head_dim) for _ in range(2))

    def forward(self, hidden_states, attention_mask=None, **_):
        queries, keys, values = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        states = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        if self.mixes:
            states = states + 0.1 * states.mean(1, keepdim=True)
        return self.o_proj(states.transpose(1, 2).flatten(2)), None


def with_own_attention(mixes):
    model = unknown("llama_gqa")
    for index, layer in enumerate(model.model.layers):
        torch.manual_seed(index)
        layer.self_attn = OwnAttention(mixes)
    return model


def test_code_of_ones_own():
    model, dense = with_own_attention(False), with_own_attention(False)
    prune_(model, FullBatchProbing(), **SETTINGS)
    found = logits(model, ids())
    torch.testing.assert_close(
        found, logits(masked_dense(dense, kept_units(model), GROUPS), ids()), rtol=1e-5, atol=1e-5
    )


def test_code_that_mixes_heads_is_refused_and_its_mlp_is_not():
    model, dense = with_own_attention(True), with_own_attention(True)
    with pytest.raises(UserError) as caught:
        prune_(model, FullBatchProbing(), **SETTINGS)
    assert str(caught.value) == (
        "the attention of something_new cannot be pruned: its code does not compute the same on fewer units; "
        "blocks=('mlp',) leaves it alone"
    )
    assert torch.equal(logits(model, ids()), logits(dense, ids()))
    prune_(model, FullBatchProbing(blocks=("mlp",)), **SETTINGS)
    found = logits(model, ids())
    torch.testing.assert_close(
        found, logits(masked_dense(dense, kept_units(model), GROUPS), ids()), rtol=1e-5, atol=1e-5
    )


def test_a_single_layer_of_another_kind_is_seen():
    model = with_own_attention(False)
    model.model.layers[3].self_attn = OwnAttention(True)
    with pytest.raises(UserError, match="the attention of something_new cannot be pruned: its code does not compute"):
        prune_(model, FullBatchProbing(), **SETTINGS)


def test_both_halves_of_the_units_are_tried():
    """stablelm takes the norms of the first heads for whatever heads there are: right for the first half."""
    model = tiny("stablelm_qk_norm")
    with pytest.raises(UserError, match="its code does not compute the same on fewer units"):
        prune_(model, FullBatchProbing(blocks=("attention",)), **SETTINGS)


def test_a_layer_that_is_not_pruned_may_be_what_it_wants():
    model = with_own_attention(False)
    model.model.layers[0].self_attn = OwnAttention(True)
    prune_(model, FullBatchProbing(), **SETTINGS)


def test_models_without_anything_to_prune():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=64))
    with pytest.raises(UserError, match=r"^[^\n]*gpt2[^\n]*$"):
        prune_(model, FullBatchProbing(), **SETTINGS)
    blocks = blocks_of(tiny("mixtral"))
    assert {block for _, block in blocks} == {Block.ATTENTION}
