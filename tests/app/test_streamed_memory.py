"""How much memory a streamed run takes, by the operating system's account."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from pp_lightning.families import empty_model, layers_of
from pp_lightning.tensor_files import Placeholder, write_tensors
from tests.app.conftest import tokenizer

WIDTH, WINDOW, ROWS = 768, 64, 4
# what runs in it, beside what the bound counts: states inside of a layer, statistics of one, logits, scores
OTHER = 200e6

_RUN = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import pp_lightning.export, lightning, datasets, matplotlib.pyplot
from pp_lightning.app.cli import main
def of(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
before = of("VmRSS")
main()
print(json.dumps({"before": before, "peak": of("VmHWM")}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 350 MB with random weights, and a text."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2112, "num_attention_heads": 16, "num_hidden_layers": 12}
    config = AutoConfig.for_model("llama", vocab_size=320, max_position_embeddings=WINDOW, **sizes)
    model = empty_model(config)
    tensors = {
        name: Placeholder(weight, lambda weight=weight: torch.randn(weight.shape) / 32)
        for name, weight in model.named_parameters()
    }
    write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text("\n".join(f"line {n} of a text that is long enough to test on" for n in range(99)))
    layer = sum(weight.nbytes for weight in layers_of(model)[0].parameters())
    whole = sum(weight.nbytes for weight in model.parameters())
    return folder, layer, whole - 12 * layer, whole


def peak(folder: Path, out: Path, stream: str) -> int:
    """Bytes that ``prune`` takes beyond what the program takes before it begins."""
    given = {
        "--model.path": folder,
        "--model.method": "FLAP",
        "--model.pruning_ratio": 0.4,
        "--data.window": WINDOW,
        "--data.batch_size": ROWS,
        "--data.calibration_samples": 8,
        "--data.limit_tokens": 500,
        "--data.text": folder / "text.txt",
        "--data.calibration": folder / "text.txt",
        "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false",
        "--stream": stream,
        "--out": out,
    }
    words = [str(word) for pair in given.items() for word in pair]
    done = subprocess.run([sys.executable, "-c", _RUN, "prune", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"] - found["before"]


@pytest.mark.slow
def test_the_peak_is_two_layers_and_what_is_around_them(large, tmp_path):
    folder, layer, outside, whole = large
    bound = 2 * layer + outside + ROWS * WINDOW * WIDTH * 4 + OTHER
    assert peak(folder, tmp_path / "streamed", "true") <= bound < whole
    assert peak(folder, tmp_path / "whole", "false") >= whole
