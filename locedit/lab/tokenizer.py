"""A byte-level BPE tokenizer trained on the world: answers are one token, names and numbers are several."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, MASK = "<pad>", "<bos>", "<eos>", "<mask>"


def train_tokenizer(
    texts: Iterable[str], *, words: Iterable[str], vocab_size: int, max_length: int, masked: bool
) -> PreTrainedTokenizerFast:
    """Train on `texts`, in which names should be drawn anew each time, else whole names become tokens.

    Digits stand alone. Every text begins with <bos>; for a masked model it also ends with <eos>, in the roles of [CLS]
    and [SEP]. Each of `words` is one token with its leading space.
    """
    backend = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}" if masked else f"{BOS} $A",
        special_tokens=[(BOS, backend.token_to_id(BOS)), (EOS, backend.token_to_id(EOS))],
    )
    split_words = [word for word in words if len(backend.encode(f" {word}", add_special_tokens=False).ids) != 1]
    assert not split_words, f"not single tokens: {split_words}"
    return _fast(backend, max_length=max_length, masked=masked)


def _fast(backend: Tokenizer, *, max_length: int, masked: bool) -> PreTrainedTokenizerFast:
    roles = {"cls_token": BOS, "sep_token": EOS, "mask_token": MASK} if masked else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **roles,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), f"{token} is not one token"
    return found


def mask_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that masks a token, or None when the tokenizer is a causal model's."""
    return None if tokenizer.mask_token is None else token_id(tokenizer, MASK)
