"""Encoders of images and of texts: the same mechanism, a batch of images or of sentences being a batch."""

import copy
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from pp_lightning import (
    Statistics,
    UserError,
    calibrate,
    compile_,
    frozen_history,
    kept_units,
    prune_,
    uncompile_,
    unprune_,
)
from pp_lightning.blocks import Block
from pp_lightning.families import blocks_of, layers_of, shape_of, shape_of_model
from pp_lightning.flops import dense_flops, pruned_flops
from pp_lightning.freezing import choice_for
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning, StaticPPsp, WandaSP
from pp_lightning.pruning import is_pruned, last_choices, pruning_of
from tests.models import choices, histories, masked_dense, padded, pairs, ragged
from tests.replicas import replicas

LAYERS, HEADS, CHANNELS, LABELS = 4, 8, 160, 7
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": CHANNELS,
}
IMAGES = {**SIZES, "image_size": 40, "patch_size": 8}  # 25 patches
TEXTS = {**SIZES, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DINOV2 = {name: size for name, size in IMAGES.items() if name != "intermediate_size"}
PRUNED = (1, 2, 3)
SETTINGS: dict[str, Any] = {"pruning_ratio": 0.4, "skip_layers": (0,), "round_to": 16}


@dataclass(frozen=True)
class Row:
    """One encoder.

    Attributes:
        model: its class.
        config: makes its config.
        tokens: of an image, class token and the like included; of a text, any.
    """

    model: str
    config: Callable[[], Any]
    tokens: int

    @property
    def images(self) -> bool:
        """Whether it takes images."""
        return getattr(transformers, self.model).main_input_name == "pixel_values"


def config(kind: str, **sizes: Any) -> Callable[[], Any]:
    return partial(getattr(transformers, f"{kind}Config"), **sizes)


TOWERS = {"vision_config": IMAGES, "text_config": TEXTS, "num_labels": LABELS}
ENCODERS = {
    "vit": Row("ViTModel", config("ViT", **IMAGES), 26),
    "vit_classes": Row("ViTForImageClassification", config("ViT", **IMAGES, num_labels=LABELS), 26),
    "deit": Row("DeiTForImageClassification", config("DeiT", **IMAGES, num_labels=LABELS), 27),
    "dinov2": Row("Dinov2Model", config("Dinov2", **DINOV2), 26),
    "dinov2_gated": Row("Dinov2Model", config("Dinov2", **DINOV2, use_swiglu_ffn=True), 26),
    "dinov2_classes": Row("Dinov2ForImageClassification", config("Dinov2", **DINOV2, num_labels=LABELS), 26),
    "dinov2_registers": Row("Dinov2WithRegistersModel", config("Dinov2WithRegisters", **DINOV2), 30),
    "siglip": Row("SiglipVisionModel", config("SiglipVision", **IMAGES), 25),
    "siglip_classes": Row("SiglipForImageClassification", config("Siglip", **TOWERS), 25),
    "clip": Row("CLIPVisionModel", config("CLIPVision", **IMAGES), 26),
    "siglip_text": Row("SiglipTextModel", config("SiglipText", **TEXTS), 24),
    "clip_text": Row("CLIPTextModel", config("CLIPText", **TEXTS), 24),
    "eurobert": Row("EuroBertModel", config("EuroBert", **TEXTS, num_key_value_heads=4), 24),
    "eurobert_classes": Row(
        "EuroBertForSequenceClassification",
        config("EuroBert", **TEXTS, num_labels=LABELS, classifier_pooling="mean"),
        24,
    ),
    "eurobert_words": Row("EuroBertForMaskedLM", config("EuroBert", **TEXTS), 24),
    "modernbert": Row("ModernBertForMaskedLM", config("ModernBert", **TEXTS, local_attention=16), 24),
}
OF_TEXTS = [name for name, row in ENCODERS.items() if not row.images]
DYNAMIC = {
    "pp": ProbePruning,
    "best": ProbePruning.best,
    "pp_parallel": lambda: ProbePruning(probe_source="previous"),
    "full_batch": FullBatchProbing,
}
slow = partial(pytest.param, marks=pytest.mark.slow)
STATIC = {"ppsp": StaticPPsp, "wanda_sp": WandaSP, "flap": FLAP}


def tiny(name: str, **overrides: Any) -> PreTrainedModel:
    """A new copy of a tiny encoder, always with the same weights."""
    return _tiny(name, tuple(overrides.items()))()


@lru_cache
def _tiny(name: str, overrides: tuple[tuple[str, Any], ...]) -> Callable[[], Any]:
    row = ENCODERS[name]
    kind = getattr(transformers, row.model)
    model = kind._from_config(row.config(), **{"attn_implementation": "sdpa", **dict(overrides)}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in path and path.endswith("weight") else 0.15 * noise)
    return replicas(model)


def batch(name: str, seed: int = 0, rows: int = 4) -> dict[str, Tensor]:
    """Random images or texts."""
    generator = torch.Generator().manual_seed(seed)
    if ENCODERS[name].images:
        return {"pixel_values": torch.randn(rows, 3, 40, 40, generator=generator)}
    return {"input_ids": torch.randint(3, 96, (rows, ENCODERS[name].tokens), generator=generator)}


def batches(name: str) -> list[dict[str, Tensor]]:
    return [batch(name, 100 + seed) for seed in range(3)]


def statistics(name: str) -> Statistics:
    return _statistics(name)()


@lru_cache
def _statistics(name: str) -> Callable[[], Any]:
    return replicas(calibrate(tiny(name), batches(name), progress=False))


def pruned(name: str, method: Any, **settings: Any) -> PreTrainedModel:
    model = tiny(name)
    prune_(model, method, statistics(name), **{**SETTINGS, **settings})
    return model


@torch.no_grad()
def output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a model with a head, hidden states of one without."""
    found: Tensor = model(**inputs)[0]
    return found


def put_back(mean: Tensor, module: nn.Module, args: Any, found: Tensor) -> Tensor:
    return found + mean


def silenced(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The dense model without the units that a pruned one has dropped, and with the means that it puts back."""
    dense = tiny(name)
    masked = masked_dense(dense, kept_units(model), units(dense))
    blocks = blocks_of(masked)
    for key, choice in last_choices(model).items():
        if choice.restored is not None:
            projection = blocks[key].projection(blocks[key].output)
            projection.register_forward_hook(partial(put_back, choice.restored))
    return masked


def units(model: PreTrainedModel) -> int:
    """What attention keeps or loses: query heads, or key/value groups."""
    return shape_of_model(model).num_key_value_heads


def assert_dense(model: PreTrainedModel, name: str) -> None:
    dense = tiny(name)
    assert not is_pruned(model)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert all(torch.equal(weight, dense.state_dict()[path]) for path, weight in model.state_dict().items())
    assert torch.equal(output(model, batch(name)), output(dense, batch(name)))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("name", "method"), pairs(ENCODERS, DYNAMIC))
def test_nothing_removed_is_the_stock_model_bit_for_bit(name, method):
    model = pruned(name, DYNAMIC[method](), pruning_ratio=0.0)
    assert torch.equal(output(model, batch(name)), output(tiny(name), batch(name)))


@pytest.mark.parametrize(
    ("name", "method"), [*pairs(["eurobert", *ENCODERS], DYNAMIC), *((name, "best") for name in ENCODERS)]
)
def test_equals_the_dense_model_with_the_dropped_units_silenced_and_back(name, method):
    dense, model = tiny(name), pruned(name, DYNAMIC[method]())
    for seed in (1, 2):
        found = output(model, batch(name, seed))
        assert set(PRUNED) <= set(kept_units(model))
        expected = output(silenced(model, name), batch(name, seed))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, output(dense, batch(name, seed)), rtol=1e-2, atol=1e-2)
    unprune_(model)
    assert_dense(model, name)


@pytest.mark.parametrize(("name", "method"), pairs(["eurobert", *ENCODERS], STATIC))
def test_static_methods_and_back(name, method):
    settings = {"bias": False} if method == "flap" else {}
    model = pruned(name, STATIC[method](**settings))
    dense = tiny(name)
    assert sum(weight.numel() for weight in model.parameters()) < sum(weight.numel() for weight in dense.parameters())
    expected = output(silenced(model, name), batch(name))
    torch.testing.assert_close(output(model, batch(name)), expected, rtol=1e-4, atol=1e-5)
    unprune_(model)
    assert_dense(model, name)


@pytest.mark.parametrize("name", ENCODERS)
def test_choices_follow_the_batch_and_are_counted(name):
    model = pruned(name, ProbePruning())
    assert kept_units(model) == {}
    output(model, batch(name, 1))
    first = choices(kept_units(model))
    assert tuple(first) == PRUNED
    plan = {block.block: block.keep for block in pruning_of(model).plan.blocks}
    for heads, channels in first.values():
        assert (len(heads), len(channels)) == (plan[Block.ATTENTION], plan[Block.MLP])
        assert heads == sorted(set(heads)) and channels == sorted(set(channels))
    output(model, batch(name, 2))
    assert choices(kept_units(model)) != first


@pytest.mark.parametrize("name", ENCODERS)
def test_frozen_history(name):
    model = pruned(name, ProbePruning())
    before = histories(model)
    assert all(len(history) == ENCODERS[name].tokens for history in before.values())
    with frozen_history(model):
        output(model, batch(name))
        assert all(torch.equal(history, before[key]) for key, history in histories(model).items())
    output(model, batch(name))
    assert all(not torch.equal(history, before[key]) for key, history in histories(model).items())


@pytest.mark.parametrize("name", ENCODERS)
def test_a_choice_held_for_good(name):
    dynamic, static = pruned(name, ProbePruning()), tiny(name)
    prune_(static, choice_for(dynamic, batch(name)), **SETTINGS)
    with frozen_history(dynamic):
        expected = output(dynamic, batch(name))
    assert choices(kept_units(static)) == choices(kept_units(dynamic))
    torch.testing.assert_close(output(static, batch(name)), expected, rtol=1e-5, atol=1e-5)


def seen_by(model: PreTrainedModel, layer: int, block: Block, inputs: dict[str, Tensor]) -> Tensor:
    """The input (B, S, C) of a block's output matrix, caught with a hook of our own."""
    caught: list[Tensor] = []
    modules = blocks_of(model)[layer, block]
    hook = modules.projection(modules.output).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    output(model, inputs)
    hook.remove()
    return caught[0].view(len(next(iter(inputs.values()))), -1, caught[0].shape[-1])


@pytest.mark.parametrize("name", ENCODERS)
def test_calibration_equals_a_naive_hook(name):
    model, found = tiny(name), statistics(name)
    assert found.sums.keys() == {(layer, block) for layer in range(LAYERS) for block in Block}
    assert found.counts.tolist() == [12.0] * ENCODERS[name].tokens
    for layer, block in ((0, Block.MLP), (3, Block.ATTENTION)):
        states = torch.cat([seen_by(model, layer, block, one) for one in batches(name)]).double()
        sums = found.sums[layer, block]
        torch.testing.assert_close(sums.squares, states.square().sum(0).float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums.values, states.sum(0).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "siglip_classes", "eurobert_classes"])
def test_statistics_are_saved_and_belong_to_their_model(name, tmp_path):
    found = calibrate(tiny(name), batches(name), save_to=tmp_path / "stats", progress=False)
    model = tiny(name)
    prune_(model, ProbePruning(), Statistics.load(tmp_path / "stats"), **SETTINGS)
    again = calibrate(tiny(name), batches(name), save_to=tmp_path / "stats", progress=False)
    assert (again.num_batches, again.batches_digest) == (found.num_batches, found.batches_digest)
    other = [batch(name, 300 + seed) for seed in range(3)]
    with pytest.raises(UserError, match="was collected from other batches"):
        calibrate(tiny(name), other, save_to=tmp_path / "stats", progress=False)
    with pytest.raises(UserError, match="were collected on another model"):
        prune_(tiny("vit_classes"), ProbePruning(), found, **SETTINGS)


# Padding, of texts alone.


@pytest.mark.parametrize("name", OF_TEXTS)
@pytest.mark.parametrize("method", [ProbePruning, FullBatchProbing])
@pytest.mark.parametrize(("left", "right"), [(0, 5), (3, 2)])
def test_padding_changes_nothing(name, method, left, right):
    if left and name.endswith("_text"):
        pytest.skip("its positions are columns")
    text = batch(name)["input_ids"][:, :16]
    plain, other = pruned(name, method()), pruned(name, method())
    wide = padded(text, left, right)
    for model, inputs in ((plain, {"input_ids": text}), (other, wide)):
        with torch.no_grad():
            model.base_model(**inputs)
    assert choices(kept_units(other)) == choices(kept_units(plain))
    for key, history in histories(plain).items():
        torch.testing.assert_close(histories(other)[key], history, rtol=1e-4, atol=1e-5)
    # the same hidden states at the real tokens: a rotary embedding knows distances alone
    with torch.no_grad(), frozen_history(plain), frozen_history(other):
        expected = plain.base_model(input_ids=text)[0]
        found = other.base_model(**wide)[0][:, left : left + 16]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OF_TEXTS)
def test_texts_of_several_lengths(name):
    model, texts = pruned(name, ProbePruning(row_ratio=0.5)), ragged([24, 10, 17, 5], "right")
    real = texts["attention_mask"].bool()
    found = output(model, texts)
    expected = output(silenced(model, name), texts)
    if found.dim() == 3:
        found, expected = found[real], expected[real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OF_TEXTS)
def test_calibration_leaves_padding_out(name):
    text = batch(name)["input_ids"]
    plain = calibrate(tiny(name), [{"input_ids": text}], progress=False)
    found = calibrate(tiny(name), [padded(text, 0, 5)], progress=False)
    assert torch.equal(found.counts, plain.counts)
    for key, sums in plain.sums.items():
        torch.testing.assert_close(found.sums[key].squares, sums.squares, rtol=1e-4, atol=1e-5)


# FLOPs: what lies in the layers. Patches, pooling and classes are no part of the model's counts.


def counted(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    names = {id(module): path for path, module in model.named_modules()}
    kind = type(model).__name__
    layers = [f"{kind}.{names[id(layer)]}" for layer in layers_of(model)]
    found = counter.get_flop_counts()
    return sum(sum(found[layer].values()) for layer in layers)


@pytest.mark.parametrize("name", ENCODERS)
def test_flops_of_the_layers_agree_with_the_counter(name):
    model, rows, tokens = tiny(name, attn_implementation="eager"), 3, ENCODERS[name].tokens
    shape, inputs = shape_of_model(model), batch(name, rows=rows)
    assert counted(model, inputs) == dense_flops(shape, rows, tokens).layers
    for method in (ProbePruning(), FullBatchProbing(), WandaSP()):
        prune_(model, method, statistics(name), **SETTINGS)
        assert counted(model, inputs) == pruned_flops(shape, pruning_of(model), rows, tokens).layers
        unprune_(model)


def test_a_shape_needs_no_weights():
    for name, row in ENCODERS.items():
        if name in ("vit", "dinov2", "siglip", "eurobert"):  # a config of two towers does not say which one is meant
            assert shape_of(row.config()) == shape_of_model(tiny(name))


# What else people do with models.


@pytest.mark.parametrize("name", ["vit_classes", "dinov2", "siglip", "eurobert", "modernbert"])
def test_hidden_states_and_attentions(name):
    model = tiny(name, attn_implementation="eager")
    prune_(model, ProbePruning(), statistics(name), **SETTINGS)
    with torch.no_grad():
        found = model(**batch(name), output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == LAYERS + 1
    heads = [weights.shape[1] for weights in found.attentions]
    assert len(heads) == LAYERS and heads[0] == HEADS
    assert all(0 < number < HEADS for number in heads[1:])
    assert all(weights.shape[0] == 4 for weights in found.attentions), "the batch's, not the probe's"


@pytest.mark.parametrize("name", [slow(name) for name in ("vit", "dinov2", "siglip", "eurobert", "modernbert")])
def test_one_graph_without_breaks(name):
    torch._dynamo.reset()  # all layers of transformers share one code object, whose graphs are counted
    method = ProbePruning.best if name == "eurobert" else ProbePruning
    eager, compiled = pruned(name, method()), pruned(name, method())
    layer = layers_of(compiled)[2]
    layer.forward = torch.compile(layer.forward, backend="eager", fullgraph=True)
    for seed in (0, 1):
        torch.testing.assert_close(
            output(compiled, batch(name, seed)), output(eager, batch(name, seed)), rtol=1e-5, atol=1e-5
        )
        assert choices(kept_units(compiled)) == choices(kept_units(eager))


@pytest.mark.slow
def test_compiled_equals_eager():
    """Of texts, with the other method: test_one_graph_without_breaks, as it was traced."""
    name = "vit_classes"
    eager, compiled = pruned(name, ProbePruning()), pruned(name, ProbePruning())
    record = compile_(compiled)
    for seed in (0, 1):
        torch.testing.assert_close(
            output(compiled, batch(name, seed)), output(eager, batch(name, seed)), rtol=1e-5, atol=1e-5
        )
        assert choices(kept_units(compiled)) == choices(kept_units(eager))
    assert 0 < len(record.graphs) <= LAYERS
    uncompile_(compiled)
    unprune_(compiled)
    assert_dense(compiled, name)


# What cannot be pruned is refused in one line, and the model is left alone.


def test_models_of_texts_and_images_have_two_stacks():
    model = transformers.SiglipModel(config("Siglip", **{**TOWERS})())
    with pytest.raises(UserError, match=r"several stacks of layers \(text_model.encoder.layers, vision_model") as error:
        prune_(model, FullBatchProbing(), **SETTINGS)
    assert "\n" not in str(error.value)
    prune_(model.vision_model, FullBatchProbing(), **SETTINGS)
    with torch.no_grad():
        found = model.get_image_features(batch("siglip")["pixel_values"])
    assert found is not None and tuple(kept_units(model.vision_model)) == PRUNED


def test_heads_whose_rotary_embedding_leaves_tokens_out():
    model = transformers.DINOv3ViTModel(config("DINOv3ViT", **IMAGES)()).eval()
    before, images = copy.deepcopy(model.state_dict()), batch("vit")
    with pytest.raises(
        UserError, match=r"the attention of dinov3_vit cannot be pruned: its rotary embedding .*blocks=\('mlp',\)"
    ):
        prune_(model, FullBatchProbing(), **SETTINGS)
    assert all(torch.equal(weight, before[path]) for path, weight in model.state_dict().items())
    stats = calibrate(model, [images], progress=False)
    prune_(model, ProbePruning(blocks=("mlp",)), stats, **SETTINGS)
    output(model, images)
    assert all(len(kept.mlp) < CHANNELS for kept in kept_units(model).values())


def test_more_patches_than_were_calibrated():
    model = pruned("dinov2", ProbePruning())
    with pytest.raises(UserError, match="position 36 is beyond the 26 calibrated positions"):
        output(model, {"pixel_values": torch.randn(2, 3, 48, 48)})
    assert output(model, {"pixel_values": torch.randn(2, 3, 32, 32)}).shape[:2] == (2, 17)


# What the documents show.


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    smaller = code.replace("ViTConfig(num_labels", f"ViTConfig(**{IMAGES | {'num_hidden_layers': 6}}, num_labels")
    smaller = smaller.replace("16, 3, 224, 224", "4, 3, 40, 40")
    assert smaller.count("40, 40") == 1 and "hidden_size" in smaller
    place: dict[str, Any] = {}
    exec(smaller, place)
    assert place["logits"].shape == (4, 10)
    assert not is_pruned(place["model"])


def test_the_script_runs():
    path = Path(__file__).parents[1] / "examples" / "vit.py"
    spec = importlib.util.spec_from_file_location("vit_example", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    config = transformers.ViTConfig(**{**IMAGES, "num_hidden_layers": 6})
    torch.manual_seed(0)
    found = script.run(config, ratio=0.4, rows=4, rounds=1, compiled=False)
    assert found["difference"] < 1e-5
    assert 0.4 < found["flops"] < 0.9
    assert found["time"] > 0
    imported = {
        line.split()[1].split(".")[0] for line in path.read_text().splitlines() if line.startswith(("import ", "from "))
    }
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers", "pp_lightning"}
