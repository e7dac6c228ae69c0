"""Units: what can be removed of a block, and what it costs."""

import dataclasses

import pytest

from pp_lightning.blocks import AttentionUnit, Block, ModelShape, units_of
from pp_lightning.families import blocks_of, shape_of
from tests.models import FAMILIES, HEADS, config, tiny


@pytest.mark.parametrize("name", FAMILIES)
def test_units_cover_the_block_and_its_cost(name):
    model = tiny(name)
    shape = shape_of(model.config)
    for (_, block), modules in blocks_of(model).items():
        units = units_of(shape, block, AttentionUnit.default_for(shape))
        assert units.number * units.channels == modules.output_weight.shape[1]
        if name != "falcon_multi_query":  # its single key and value stay whole
            weights = sum(modules.projection(one).weight.numel() for one in modules.names)
            assert units.number * units.cost == weights


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "phi3", "falcon_multi_query"])
def test_a_single_query_head_costs_its_own_rows_and_columns(name):
    shape = shape_of(config(name))
    units = units_of(shape, Block.ATTENTION, AttentionUnit.QUERY_HEAD)
    assert (units.number, units.channels) == (HEADS, shape.head_size)
    assert units.cost == 2 * shape.head_size * shape.hidden_size


def test_a_query_projection_that_makes_a_gate_too_costs_twice_its_rows():
    plain = shape_of(config("qwen3"))
    gated = dataclasses.replace(plain, query_rows=2 * plain.head_size)
    assert shape_of(config("qwen3_5_text")).query_rows == 2 * plain.head_size
    for unit, queries in ((AttentionUnit.QUERY_HEAD, 1), (AttentionUnit.KV_GROUP, plain.queries_per_key)):
        more = units_of(gated, Block.ATTENTION, unit).cost - units_of(plain, Block.ATTENTION, unit).cost
        assert more == queries * plain.head_size * plain.hidden_size


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("llama", AttentionUnit.QUERY_HEAD),
        ("llama_gqa", AttentionUnit.KV_GROUP),
        ("falcon_multi_query", AttentionUnit.QUERY_HEAD),
        ("gpt_neox", AttentionUnit.QUERY_HEAD),
    ],
)
def test_default_unit(name, unit):
    assert AttentionUnit.default_for(shape_of(config(name))) is unit


def test_blocks_that_some_layers_have():
    shape = ModelShape(4, 8, 2, 2, 4, 16, True, 0, without={Block.MLP: frozenset({1, 3})})
    assert [shape.has(layer, Block.MLP) for layer in range(4)] == [True, False, True, False]
    assert shape.has(1, Block.ATTENTION)
    assert [layer for layer, block in shape.keys if block is Block.MLP] == [0, 2]
    assert len(shape.keys) == 6
