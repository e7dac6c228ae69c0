"""Cutting tokens into windows: nothing lost, nothing twice, the same draw for the same seed."""

import pytest
import torch

from pp_lightning.data.windows import batched, collate, contiguous_windows, document_windows, random_windows
from pp_lightning.errors import UserError

TOKENS = torch.arange(103)


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_contiguous_windows_hold_every_token_once():
    windows = contiguous_windows(TOKENS, 10)
    assert torch.equal(torch.cat(windows), TOKENS)
    assert [len(window) for window in windows] == [10] * 10 + [3]


def test_a_last_window_without_a_prediction_is_left_out():
    assert [len(window) for window in contiguous_windows(torch.arange(21), 10)] == [10, 10]


def test_random_windows_follow_the_published_protocol():
    windows = random_windows(TOKENS, 10, seed=1)
    assert len(windows) == 10
    assert all(torch.equal(window, TOKENS[window[0] : window[0] + 10]) for window in windows)
    starts = [int(window[0]) for window in windows]
    assert starts == [int(window[0]) for window in random_windows(TOKENS, 10, seed=1)]
    assert starts != [int(window[0]) for window in random_windows(TOKENS, 10, seed=2)]
    assert starts != sorted(starts)


def test_random_windows_leave_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    random_windows(TOKENS, 10, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_document_windows_take_each_long_document_before_any_twice():
    documents = [letter * 30 for letter in "abcdef"] + ["short"]
    windows = document_windows(documents, encode, window=12, samples=9, seed=0)
    assert len(windows) == 9 and all(len(window) == 12 for window in windows)
    letters = [chr(int(window[0])) for window in windows]
    assert sorted(letters[:6]) == list("abcdef")
    again = document_windows(documents, encode, window=12, samples=9, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(windows, again, strict=True))


def test_no_document_is_long_enough():
    with pytest.raises(UserError, match="none of the 2 calibration documents has more than 12 tokens"):
        document_windows(["short", "x" * 12], encode, window=12, samples=1, seed=0)


def test_collate_masks_padding_out_of_attention_and_labels():
    batch = collate([torch.tensor([5, 6, 7]), torch.tensor([8, 9])], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]


def test_a_real_token_equal_to_the_pad_is_real():
    batch = collate([torch.tensor([5, 1, 7]), torch.tensor([1, 9])], pad_id=1)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 1, 7], [1, 9, -100]]


def test_the_last_batch_is_kept_or_dropped():
    windows = contiguous_windows(TOKENS, 10)
    assert [len(batch["input_ids"]) for batch in batched(windows, 4, 0)] == [4, 4, 3]
    assert [len(batch["input_ids"]) for batch in batched(windows, 4, 0, drop_last=True)] == [4, 4]
