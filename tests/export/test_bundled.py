"""The modelling file of a per-layer folder on its own, in transformers 4.57 and in the version that tests run with."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pp_lightning.export import export_checkpoint
from pp_lightning.export.engines.run import ENVIRONMENTS, interpreter_of
from tests.export.engine_models import small_pruned
from tests.models import ids, padded

# What a user does with a folder, where nothing of ours is installed.
SCRIPT = """
import copy, sys, torch, transformers
from safetensors.torch import load_file, save_file
folder, place = sys.argv[1:]
batch = load_file(place + "/batch.safetensors")
load = lambda kind, where: kind.from_pretrained(where, trust_remote_code=True, dtype="auto").eval()
model = load(transformers.AutoModelForCausalLM, folder)
base = load(transformers.AutoModel, folder)
found = {}
with torch.no_grad():
    found["logits"] = model(**batch).logits
    found["states"] = model.lm_head(base(**batch).last_hidden_state)
    found["copied"] = copy.deepcopy(model)(**batch).logits
    model.save_pretrained(place + "/again")
    found["again"] = load(transformers.AutoModelForCausalLM, place + "/again")(**batch).logits
save_file({name: one.contiguous() for name, one in found.items()}, place + "/found.safetensors")
print(transformers.__version__, "pp_lightning" in sys.modules)
"""


def python_of(wanted):
    """The Python with a version of transformers, or a skipped test."""
    if wanted == "this":
        return sys.executable
    python = interpreter_of("transformers") if os.environ.get(ENVIRONMENTS) else None
    code = "import transformers; print(transformers.__version__)"
    if python is None or not subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.startswith(
        wanted
    ):
        pytest.skip(f"transformers {wanted} is not installed: make test-engines, then set {ENVIRONMENTS} to .engines")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.57", "this"])
@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "phi3", "opt"])
def test_it_stands_alone(version, name, tmp_path):
    python = python_of(version)
    model, batch = small_pruned(name, "flap", "per-layer"), padded(ids(2, 20), left=5)
    export_checkpoint(model, tmp_path / "out", layout="per-layer")
    save_file({key: one.contiguous() for key, one in batch.items()}, tmp_path / "batch.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [python, "-c", SCRIPT, str(tmp_path / "out"), str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ran, ours = done.stdout.split()[-2:]
    assert ours == "False" and (version == "this" or ran.startswith(version))
    found, real = load_file(tmp_path / "found.safetensors"), batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**batch).logits[real]
    for key in ("logits", "states", "copied", "again"):
        torch.testing.assert_close(
            found[key][real], wanted, rtol=0, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    dense = config["ffn_dim" if name == "opt" else "intermediate_size"]
    assert model.get_submodule(output_of(name)).in_features < dense  # narrower than a stock class of this config


def output_of(name):
    return "model.decoder.layers.2.fc2" if name == "opt" else "model.layers.2.mlp.down_proj"
