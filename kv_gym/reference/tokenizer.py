"""The word-level tokenizer of the reference language."""

from __future__ import annotations

from functools import cache

from kv_gym.reference.words import vocabulary

SPECIAL_TOKENS = ("<pad>", "<bos>", "<unk>")


@cache
def word_ids() -> dict[str, int]:
    """The id of every special token and word."""
    return {word: i for i, word in enumerate((*SPECIAL_TOKENS, *vocabulary()))}


def encode(words) -> list[int]:
    """Token ids of words of the closed vocabulary (no beginning token)."""
    ids = word_ids()
    return [ids[word] for word in words]


def build_tokenizer():
    """A `transformers` tokenizer: words split at white space, a beginning token before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(word_ids(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", word_ids()["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>", model_max_length=2048
    )
