"""A model, texts and a command line for the tests of the application."""

import json
import sys
from functools import cache

import pytest

from pp_lightning.app.cli import main
from pp_lightning.data.train_tokenizer import train_tokenizer
from tests.models import tiny

VOCABULARY = 320


@cache
def tokenizer():
    """The tokenizer of every checkpoint here."""
    return train_tokenizer(VOCABULARY)


def save(model, folder):
    """A checkpoint with the tokenizer; returns its folder."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_another(folder):
    """A checkpoint that differs from the one of ``place`` in one matrix; returns its folder."""
    other = tiny("llama", vocab_size=VOCABULARY)
    other.model.layers[2].mlp.up_proj.weight.data.add_(0.01)
    return save(other, folder)


def write_place(folder, documents):
    """A checkpoint with its tokenizer, a text to test on and documents to calibrate on; returns the folder."""
    save(tiny("llama", vocab_size=VOCABULARY), folder / "model")
    (folder / "text.txt").write_text("\n".join(f"line {n} of a text that is long enough to test on" for n in range(60)))
    words = " ".join(f"word{n}" for n in range(200))
    lines = [json.dumps({"text": f"{n} {words}"}) + "\n" for n in range(documents)]
    (folder / "documents.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """The same with documents that are soon calibrated on."""
    return write_place(tmp_path_factory.mktemp("place"), documents=4)


def everything(place):
    """Everything but the command and where results go."""
    return {
        "--model.path": place / "model",
        "--model.skip_layers": "[0,1]",
        "--model.round_to": 16,
        "--data.window": 32,
        "--data.batch_size": 4,
        "--data.calibration_samples": 8,
        "--data.text": "TextFile",
        "--data.text.path": place / "text.txt",
        "--data.calibration": "C4",
        "--data.calibration.path": place / "documents.jsonl",
        "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false",
    }


def files_asked(place):
    """The same with texts as files, as people name them."""
    given = {
        key: value for key, value in everything(place).items() if not key.startswith(("--data.text", "--data.cal"))
    }
    return {
        **given,
        "--data.calibration_samples": 8,
        "--data.text": place / "text.txt",
        "--data.calibration": place / "documents.jsonl",
    }


def words_of(given):
    """As they are typed."""
    return [str(word) for pair in given.items() for word in pair]


@pytest.fixture
def arguments(place):
    """A dictionary to change and ``type_in``."""
    return everything(place)


@pytest.fixture
def asked(place):
    """The same with texts as files."""
    return files_asked(place)


@pytest.fixture
def type_in(monkeypatch):
    """Run the program with these words in this process; returns its exit code."""

    def run(command, arguments, **more):
        words = [*words_of(arguments), *map(str, more.get("extra", []))]
        monkeypatch.setattr(sys, "argv", ["pp-lightning", command, *words])
        try:
            main()
        except SystemExit as stop:
            return stop.code
        return 0

    return run


@pytest.fixture
def stock_perplexity(place, in_stock_python):
    """Perplexity of a folder on the test text, in a process that has never heard of us."""

    def run(folder, trust=False):
        return in_stock_python(f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code={trust}).eval()
text = open({str(place / "text.txt")!r}).read()
ids = torch.tensor(AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code={trust})(text)["input_ids"])
total = count = 0
with torch.no_grad():
    for window in ids.split(32):
        loss = model(input_ids=window[None], labels=window[None]).loss
        total, count = total + float(loss) * (len(window) - 1), count + len(window) - 1
found = float(torch.tensor(total / count).exp())
""")

    return run
