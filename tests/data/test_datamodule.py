"""The data module: protocols, sharding over processes, and texts that are too short."""

from types import SimpleNamespace

import pytest
import torch

from pp_lightning.data import C4, LanguageModelling, TextFile
from pp_lightning.data.train_tokenizer import train_tokenizer
from pp_lightning.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(300)


@pytest.fixture
def make(tmp_path, tokenizer):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "' + "calibration text with words " * 20 + '"}\n')

    def build(**settings):
        arguments = {"text": TextFile(str(text)), "calibration": C4(str(documents)), "window": 32, "batch_size": 4}
        data = LanguageModelling(**{**arguments, "calibration_samples": 6, **settings})
        data.use_tokenizer(tokenizer)
        return data

    return build


def test_contiguous_predicts_every_token_but_the_first_of_each_window(make, tokenizer):
    data = make()
    tokens = tokenizer(data.text.text())["input_ids"]
    batches = data.test_batches()
    real = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    assert real.tolist() == tokens
    windows = -(-len(tokens) // 32)
    predicted = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    assert predicted == len(tokens) - windows


def test_continuation_scores_what_follows_the_prompts_of_all_windows(make, tokenizer):
    data = make(protocol="continuation", prefix=10)
    tokens = tokenizer(data.text.text())["input_ids"]
    batches = data.test_batches()
    rows = [
        row[mask.bool()].tolist()
        for b in batches
        for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    windows = [tokens[start : start + 32] for start in range(0, len(tokens), 32)]
    expected = [window for window in windows if len(window) > 10]
    assert rows != expected and sorted(rows) == sorted(expected), "neighbours in the text do not share a batch by rule"
    for batch in batches:
        assert (batch["labels"][:, :10] == -100).all()
        assert (batch["attention_mask"][:, :11] == 1).all(), "prompts have no padding"
        assert torch.equal(batch["labels"][:, 10:] >= 0, batch["attention_mask"][:, 10:].bool())
    again, other = (make(protocol="continuation", prefix=10, seed=seed).test_batches() for seed in (0, 1))
    assert torch.equal(again[0]["input_ids"], batches[0]["input_ids"])
    assert not torch.equal(other[0]["input_ids"], batches[0]["input_ids"])
    data.distances = (3, 5)
    for batch in data.test_batches():
        assert (batch["labels"] >= 0).sum(1).max() <= 2
        assert (batch["labels"][:, 13:15] >= 0).any() and (batch["labels"][:, 15:] == -100).all()


def test_paper_protocol_drops_the_last_partial_batch(make, tokenizer):
    data = make(protocol="paper")
    tokens = tokenizer(data.text.text())["input_ids"]
    batches = data.test_batches()
    assert len(batches) == len(tokens) // 32 // 4
    assert all(batch["input_ids"].shape == (4, 32) for batch in batches)
    other = make(protocol="paper", seed=1).test_batches()
    assert not torch.equal(batches[0]["input_ids"], other[0]["input_ids"])


def test_calibration_batches(make):
    batches = make().calibration_batches()
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2]
    assert all(batch["attention_mask"].all() for batch in batches)


def test_processes_share_the_batches_without_overlap_or_loss(make):
    data = make()
    whole = [batch["input_ids"] for batch in data.test_batches()]
    shared = []
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shared.append([batch["input_ids"] for batch in data.test_dataloader()])
    assert sum(map(len, shared)) == len(whole)
    for index, ids in enumerate(whole):
        assert torch.equal(ids, shared[index % 2][index // 2])


def test_limit_tokens(make):
    assert sum(int(batch["attention_mask"].sum()) for batch in make(limit_tokens=70).test_batches()) == 70


def test_training_windows_cover_all_sources(make, tmp_path):
    extra = tmp_path / "extra.txt"
    extra.write_text("zebra " * 400)
    data = make(train=[TextFile(str(extra)), TextFile(str(extra))])
    once = make(train=[TextFile(str(extra))])
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 32)
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert len(data.train_dataloader().rows) >= 2 * len(once.train_dataloader().rows)


@pytest.mark.parametrize("protocol", ["contiguous", "paper"])
def test_empty_text(make, tmp_path, protocol):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError, match="use a longer text or a smaller window"):
        make(text=TextFile(str(empty)), protocol=protocol).test_batches()


def test_the_tokenizer_of_another_model_is_refused(make, tokenizer):
    data = make()
    highest = max(tokenizer(data.text.text())["input_ids"])
    data.use_tokenizer(tokenizer, highest + 1)
    data.test_batches()
    data.use_tokenizer(tokenizer, highest)
    with pytest.raises(UserError, match=f"the text has token {highest}, and the model has {highest} tokens"):
        data.test_batches()


def test_no_training_text(make):
    with pytest.raises(UserError, match=r"no training text"):
        make().train_dataloader()


@pytest.mark.parametrize("setting", [{"window": 1}, {"batch_size": 0}, {"calibration_samples": 0}])
def test_impossible_sizes(setting):
    with pytest.raises(UserError, match="must be at least"):
        LanguageModelling(**setting)


def test_description_has_what_a_result_needs(make):
    data = make()
    assert data.describe()["calibration"] is None  # not read, and not wanted: it may not be at hand
    data.calibration_batches()
    description = data.describe()
    assert len(description["calibration"]["sha256"]) == 64
    assert {"window", "batch_size", "protocol", "seed", "order", "text", "calibration"} <= set(description)
    assert len(description["text"]["sha256"]) == 64
