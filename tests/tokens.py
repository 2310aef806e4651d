"""Small real tokenizers of the three families, made in code, and a stand-in for a model that only encodes."""

import functools
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "The capital of France is Paris. The capital of Italy is Rome.",
    "Call Eva Frost at 555-0134 or write to eva@frost.org today.",
    "Question: where is Paris? Answer: France",
)


@dataclass(frozen=True)
class Encodes:
    """What encoding needs of a model."""

    tokenizer: Any
    causal: bool = True
    max_length: int | None = 64


@functools.cache
def byte_level(*, trimmed: bool = True) -> PreTrainedTokenizerFast:
    """Like GPT-2's: no BOS is added, offsets leave the leading space out (trimmed) or not."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 3, trainer)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@functools.cache
def sentence_piece() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a BOS is added, spaces are part of the tokens, unknown characters become <unk>."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    core.train_from_iterator(CORPUS * 3, trainer)
    core.decoder = decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@functools.cache
def word_piece() -> PreTrainedTokenizerFast:
    """Like BERT's: lower case, spaces dropped, [CLS] and [SEP] added."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def causal(family: str) -> Encodes:
    """A stand-in for a causal model with a tokenizer of that family."""
    made = {
        "trimmed": lambda: byte_level(trimmed=True),
        "untrimmed": lambda: byte_level(trimmed=False),
        "sentence_piece": sentence_piece,
    }
    return Encodes(made[family]())


def masked() -> Encodes:
    return Encodes(word_piece(), causal=False)
