"""On a CUDA device: pruned models compute what they compute on a CPU. Skipped where there is none."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from pp_lightning import KeptUnits, calibrate, compile_, kept_units, prune_, uncompile_
from pp_lightning.families import shape_of
from pp_lightning.methods import FullBatchProbing, Griffin, ProbePruning, StaticPPsp
from pp_lightning.pruned import context
from pp_lightning.pruned.context import SideStream
from pp_lightning.pruning import pruning_of
from tests.models import SETTINGS, choices, histories, ids, logits, masked_dense, padded, statistics, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NAMES = ["llama", "llama_gqa", "gemma3_text", "opt"]
METHODS = {
    "paper": ProbePruning,
    "best": ProbePruning.best,
    "parallel": lambda: ProbePruning(probe_source="previous"),
    "full_batch": FullBatchProbing,
}
STEPS = 12
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def dense(name):
    model = tiny(name).cuda()
    model.generation_config.eos_token_id = None  # always all the steps
    return model


def pruned(name, method, **settings):
    model = dense(name)
    prune_(model, method, statistics(name), **SETTINGS, **settings)
    return model


def masked(model, name):
    reference = masked_dense(tiny(name), choices_on_cpu(model), shape_of(model.config).num_key_value_heads).cuda()
    reference.generation_config.eos_token_id = None
    return reference


def choices_on_cpu(model):
    return {index: KeptUnits(units.attention.cpu(), units.mlp.cpu()) for index, units in kept_units(model).items()}


@pytest.mark.parametrize("method", [method for method in METHODS if method != "best"])  # which restores means
@pytest.mark.parametrize("name", NAMES)
def test_pruned_is_masked_dense(name, method):
    model = pruned(name, METHODS[method]())
    for seed in range(3):
        text = ids(seed=seed).cuda()
        found = logits(model, text)
        torch.testing.assert_close(found, logits(masked(model, name), text), **CLOSE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_as_on_a_cpu(name, method):
    model, here = pruned(name, METHODS[method]()), tiny(name)
    prune_(here, METHODS[method](), statistics(name), **SETTINGS)
    for batch in ({"input_ids": ids(seed=1)}, padded(ids(seed=2), left=3)):
        found = model(**{key: value.cuda() for key, value in batch.items()}, use_cache=False).logits
        expected = here(**batch, use_cache=False).logits
        torch.testing.assert_close(found.cpu(), expected, **CLOSE)
    assert choices(kept_units(model)) == choices(kept_units(here))
    for key, history in histories(here).items():
        torch.testing.assert_close(histories(model)[key].cpu(), history, **CLOSE)


@pytest.mark.parametrize("prefill", ["probe", "dense"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_generating(name, cache, prefill):
    """As on a CPU and, where a probe has pruned the prompt too, as the masked model."""
    model, here = pruned(name, ProbePruning(), prefill=prefill), tiny(name)
    here.generation_config.eos_token_id = None
    prune_(here, ProbePruning(), statistics(name), **SETTINGS, prefill=prefill)
    settings = {"do_sample": False, "max_new_tokens": STEPS, "pad_token_id": 0}
    for seed in range(2):
        text = ids(2, 16, seed)
        given = {"attention_mask": torch.ones_like(text).cuda(), **settings}
        found = model.generate(text.cuda(), cache_implementation=cache, **given)
        expected = here.generate(text, attention_mask=torch.ones_like(text), **settings)
        assert found.tolist() == expected.tolist()
        if prefill == "probe":
            assert masked(model, name).generate(text.cuda(), **given).tolist() == found.tolist()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_is_eager(name, method, mode):
    """Whole batches of two sizes, and prompts with a cache that is continued eagerly."""
    model, eager = pruned(name, METHODS[method]()), pruned(name, METHODS[method]())
    compile_(model, mode=mode)
    for seed in range(5):
        text = ids(seed=seed).cuda()
        torch.testing.assert_close(logits(model, text), logits(eager, text), **CLOSE)
        assert choices(kept_units(model)) == choices(kept_units(eager))
    text = ids(2, 17, seed=9).cuda()
    torch.testing.assert_close(logits(model, text), logits(eager, text), **CLOSE)
    given = {"do_sample": False, "max_new_tokens": STEPS, "pad_token_id": 0, "attention_mask": torch.ones_like(text)}
    for _ in range(3):
        assert model.generate(text, **given).tolist() == eager.generate(text, **given).tolist()
    for key, history in histories(eager).items():
        torch.testing.assert_close(histories(model)[key], history, **CLOSE)
    uncompile_(model)


@pytest.mark.parametrize("method", [ProbePruning, StaticPPsp, ProbePruning.best, Griffin])
@torch.inference_mode()
def test_one_recorded_graph_decodes_for_all_prompts(method):
    model = pruned("llama_gqa", method())
    eager = copy.deepcopy(model)
    step = torch.compile(model.__call__, mode="reduce-overhead", fullgraph=True, dynamic=False)
    cache = StaticCache(config=model.config, max_cache_len=16 + STEPS)
    seen = torch.arange(16 + STEPS, device="cuda")
    for seed in range(4):
        text = ids(2, 16, seed).cuda()
        cache.reset()
        token = model(input_ids=text, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        other = eager(input_ids=text, use_cache=True)
        assert other.logits[:, -1:].argmax(-1).tolist() == token.tolist()
        for number in range(16, 16 + STEPS):
            place = torch.full((2, 1), number, device="cuda")
            mask = seen <= place[:, None, None]
            found = step(input_ids=token, past_key_values=cache, position_ids=place, attention_mask=mask).logits
            other = eager(input_ids=token, past_key_values=other.past_key_values)
            torch.testing.assert_close(found, other.logits, **CLOSE)
            token = other.logits.argmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_parallel_probes_on_a_stream_of_their_own(dtype, monkeypatch):
    """The same choices and states, to the bit, as in line: nothing is read too early, nothing overwritten too early."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).to("cuda", dtype).eval()
    batches = [torch.randint(0, 1000, (4, 512), device="cuda") for _ in range(24)]
    stats = calibrate(model, [{"input_ids": batch} for batch in batches[:2]], progress=False)
    inline = copy.deepcopy(model)
    for one in (model, inline):
        prune_(one, ProbePruning(probe_source="previous"), stats, pruning_ratio=0.4, skip_layers=[])
    pruning_of(inline).context.overlaps = False
    streams = []
    monkeypatch.setattr(context, "SideStream", lambda device: streams.append(SideStream(device)) or streams[-1])
    found = [model(batch, use_cache=False).logits[:, -1].clone() for batch in batches]
    assert len(streams) == 1
    expected = [inline(batch, use_cache=False).logits[:, -1].clone() for batch in batches]
    assert len(streams) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert choices(kept_units(model)) == choices(kept_units(inline))
    assert all(torch.equal(history, histories(inline)[key]) for key, history in histories(model).items())
