import pytest
from pp_lightning.architectures import Architecture, architecture_of, shape_of

from pp_lightning.blocks import AttentionUnit, Block, block_modules, units_of
from tests.models import MODELS, config, tiny


def weights_of(name: str, block: Block) -> int:
    """Weights (without biases) of all matrices of one block of the real model."""
    model = tiny(name)
    architecture: Architecture = architecture_of(model.config)
    modules = block_modules(architecture, architecture.layers_of(model)[0], block)
    return sum(module.weight.numel() for module in [*modules.inputs.values(), modules.output])


@pytest.mark.parametrize("name", MODELS)
def test_units_cover_the_block_and_its_cost(name):
    shape = shape_of(config(name))
    for block in Block:
        units = units_of(shape, block, AttentionUnit.default_for(shape))
        channels = shape.num_heads * shape.head_size if block is Block.ATTENTION else shape.mlp_width
        assert units.number * units.channels == channels
        assert units.number * units.cost == weights_of(name, block)


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3"])
def test_a_single_query_head_costs_its_own_rows_and_columns(name):
    shape = shape_of(config(name))
    units = units_of(shape, Block.ATTENTION, AttentionUnit.QUERY_HEAD)
    assert (units.number, units.channels) == (shape.num_heads, shape.head_size)
    assert units.cost == 2 * shape.head_size * shape.hidden_size


def test_default_unit():
    assert AttentionUnit.default_for(shape_of(config("llama"))) is AttentionUnit.QUERY_HEAD
    assert AttentionUnit.default_for(shape_of(config("llama_gqa"))) is AttentionUnit.KV_GROUP
