"""Loading: safetensors only by default, and every broken checkpoint in one clear line."""

import json
import math
from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pp_lightning.app.metrics import Perplexity
from pp_lightning.checkpoints import EMBEDDED_MODEL, load_model, load_tokenizer, new_model
from pp_lightning.data import Embedded, LanguageModelling
from pp_lightning.data.train_tokenizer import train_tokenizer
from pp_lightning.errors import UserError
from tests.models import tiny


@pytest.fixture
def folder(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


def test_weights_and_dtype(folder):
    assert load_model(str(folder)).dtype == torch.float32
    assert load_model(str(folder), "bfloat16").dtype == torch.bfloat16
    expected = tiny("llama").state_dict()
    torch.testing.assert_close(load_model(str(folder)).state_dict(), expected, rtol=0, atol=0)
    assert not load_model(str(folder)).training


def test_new_weights_differ_and_repeat(folder):
    first, second = new_model(str(folder)), new_model(str(folder))
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[weight], second.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], load_model(str(folder)).state_dict()[weight])


def test_missing_folder():
    with pytest.raises(UserError, match=r"no checkpoint folder at '/nowhere/at/all'"):
        load_model("/nowhere/at/all")


def test_folder_without_config(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(str(tmp_path))


def test_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*config\.json: no JSON at line 1") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_counts_per_layer_are_for_transformers(folder):
    config = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_pruned.PrunedForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(UserError, match=r"which transformers alone loads .* --layout uniform$"):
        load_model(str(folder))


def test_a_dtype_is_named(folder):
    with pytest.raises(UserError, match=r"dtype must be one of auto, .*, not torch\.float32"):
        load_model(str(folder), torch.float32)


def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot load a model from .*: its weights are damaged or cut off"):
        load_model(str(folder))


def test_weights_missing_from_the_file(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(UserError, match=r"lacks .* weights"):
        load_model(str(folder))


def test_pickled_weights_only_when_asked(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin only.*--model\.allow_pickle true"):
        load_model(str(folder))
    assert load_model(str(folder), allow_pickle=True).dtype == torch.float32


def test_tokenizer_without_padding_token(folder):
    with_padding = train_tokenizer(300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=with_padding._tokenizer, eos_token="</s>")
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token is None  # padding is masked: any token will do
    with pytest.raises(UserError, match=r"'no such token' is no token of .*: name another one with --model\.pad_token"):
        load_tokenizer(str(folder), "no such token")
    assert load_tokenizer(str(folder), "</s>").pad_token_id == with_padding.convert_tokens_to_ids("</s>")


def test_folder_without_tokenizer(folder):
    with pytest.raises(UserError, match=r"cannot load a tokenizer from .*: it has no tokenizer\.json"):
        load_tokenizer(str(folder))


def test_the_embedded_model_is_small_real_and_trained():
    weights = EMBEDDED_MODEL / "model.safetensors"
    assert weights.stat().st_size < 10_000_000
    model, tokenizer = load_model(), load_tokenizer()
    assert model.config.num_hidden_layers >= 8
    data = LanguageModelling(text=Embedded("test"), window=256, limit_tokens=10_240)
    data.use_tokenizer(tokenizer)
    metric, tokens = Perplexity(), []
    with torch.no_grad():
        for batch in data.test_batches():
            ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
            metric.update(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, labels)
            tokens += labels[:, 1:][labels[:, 1:] >= 0].tolist()
    shares = [number / len(tokens) for number in Counter(tokens).values()]
    unigram_entropy = -sum(share * math.log(share) for share in shares)
    assert math.log(float(metric.compute())) < unigram_entropy - 2
