"""A small byte-level BPE tokenizer with the published order of special and image tokens."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def build_tokenizer(
    captions: Iterable[str], vocabulary: int, codes: int
) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on `captions`: text, then tags, scale and image tokens.

    The layout follows the published model (spec section 1.1): text vocabulary, `<im_start>`
    `<im_end>`, `<S0>` `<S1>` `<S2>`, `<I0>` ... `<I{codes-1}>`. Capital letters are never merged,
    so that words on signs are spelled out.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Z]| ?[a-z]+|[^A-Za-z]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    fast.add_tokens([f"<S{i}>" for i in range(3)])
    fast.add_tokens([f"<I{i}>" for i in range(codes)])
    return fast
