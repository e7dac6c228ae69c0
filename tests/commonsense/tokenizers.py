"""Three kinds of tokenizers, trained on the interpreter's help pages: they differ where scoring choices goes wrong."""

from functools import lru_cache
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
TEXT = "\n".join(text for _, text in sorted(topics.items()))[:200_000].splitlines()  # plain English, on every machine


def _metaspace() -> PreTrainedTokenizerFast:
    """LLaMA-2's kind: spaces become a word marker, one is put in front of the text, and so is a BOS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>", "<s>", "</s>", *bytes_], max_token_length=16
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes, nothing put in front."""
    tokenizer = _trained_on_bytes(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def _opt() -> PreTrainedTokenizerFast:
    """OPT's kind: bytes, with ``</s>`` in front."""
    tokenizer = _trained_on_bytes(["<s>", "<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )


def _trained_on_bytes(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


KINDS = {"metaspace": _metaspace, "byte_level": _byte_level, "opt": _opt}


@lru_cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of the ``KINDS``."""
    return KINDS[kind]()
