import pytest
from pp_lightning.architectures import ARCHITECTURES, LLAMA, OPT, architecture_of, shape_of
from torch import nn
from transformers import GPT2Config, LlamaConfig, OPTConfig

from pp_lightning import UserError, calibrate, prune_
from pp_lightning.blocks import Block, block_modules
from pp_lightning.methods import FullBatchProbing
from tests.models import GROUPS, HEADS, LAYERS, MLP_WIDTH, MODELS, calibration_batches, config, tiny


def test_every_model_type_has_a_tiny_model():
    types = {config(name).model_type for name in MODELS}
    assert types == {model_type for architecture in ARCHITECTURES for model_type in architecture.model_types}


@pytest.mark.parametrize("name", MODELS)
def test_description_finds_the_parts(name):
    model = tiny(name)
    architecture = architecture_of(model.config)
    layers = architecture.layers_of(model)
    assert len(layers) == LAYERS
    assert architecture.decoder_of(model).layers is not None
    shape = shape_of(model.config)
    attention = block_modules(architecture, layers[0], Block.ATTENTION)
    assert set(attention.inputs) == {"query", "key", "value"}
    assert attention.inputs["query"].out_features == shape.num_heads * shape.head_size
    assert attention.inputs["key"].out_features == shape.num_key_value_heads * shape.head_size
    assert attention.output.in_features == shape.num_heads * shape.head_size
    assert attention.output.out_features == shape.hidden_size
    assert set(attention.extras) == ({"query_norm", "key_norm"} if name == "qwen3" else set())
    assert (attention.inputs["query"].bias is not None) == (name in ("qwen2", "opt"))
    mlp = block_modules(architecture, layers[0], Block.MLP)
    assert set(mlp.inputs) == ({"up", "gate"} if shape.gated else {"up"})
    assert mlp.output.in_features == shape.mlp_width
    assert mlp.output_weight is mlp.output.weight
    assert isinstance(mlp.extras["activation"], nn.Module)
    for modules in (attention, mlp):
        assert layers[0].get_submodule(modules.names["output"]) is modules.output
        assert isinstance(modules.norm, nn.Module)


@pytest.mark.parametrize("name", MODELS)
def test_shape(name):
    model = tiny(name)
    shape = shape_of(model.config)
    assert (shape.num_layers, shape.hidden_size, shape.num_heads, shape.mlp_width) == (LAYERS, 64, HEADS, MLP_WIDTH)
    assert shape.num_key_value_heads == (GROUPS if MODELS[name].grouped else HEADS)
    assert shape.grouped == MODELS[name].grouped
    assert shape.head_size == (16 if name == "qwen3" else 8)
    assert shape.gated == (name != "opt")
    assert shape.vocabulary == model.get_output_embeddings().out_features


def test_families():
    assert architecture_of(config("qwen3")) is LLAMA
    assert architecture_of(config("opt")) is OPT


def test_unknown_model_type_names_the_known_ones():
    with pytest.raises(UserError, match="'gpt2' is not supported; known types: llama, mistral, opt, qwen2, qwen3"):
        architecture_of(GPT2Config())


def test_post_norm_opt_is_refused_with_the_reason():
    model = tiny("opt", do_layer_norm_before=False)
    with pytest.raises(UserError, match=r"OPT model cannot be pruned: it normalises after each block, as OPT-350m"):
        prune_(model, FullBatchProbing(), pruning_ratio=0.4)
    with pytest.raises(UserError, match="cannot be pruned"):
        calibrate(model, calibration_batches(1), progress=False)
    architecture_of(OPTConfig())  # pre-norm is the default


def test_head_size_and_key_heads_default_to_what_the_config_implies():
    shape = shape_of(LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=None))
    assert (shape.head_size, shape.num_key_value_heads) == (16, 4)
