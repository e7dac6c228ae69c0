"""Train the embedded model's tokenizer: ``python -m pp_lightning.data.train_tokenizer OUT [VOCAB_SIZE]``.

A byte-level BPE trained on the embedded corpus alone, with ``<s>`` put in front as LLaMA does.
"""

import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pp_lightning.texts.embedded import embedded_documents

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab_size`` tokens, special tokens included, trained on the embedded train part."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(embedded_documents("train"), trainer)
    bos, eos, pad = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=1024
    )


if __name__ == "__main__":
    train_tokenizer(int(sys.argv[2]) if len(sys.argv) > 2 else 2048).save_pretrained(sys.argv[1])
