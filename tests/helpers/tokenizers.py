"""Small tokenizers whose tokens a test chooses, and models whose ids are permuted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from functools import cache

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specdec.drafters.other_tokenizer import OtherTokenizerDrafter
from specdec.drafters.shared_vocabulary import SharedVocabulary
from tests.helpers.families import VOCAB_SIZE

FIRST, SECOND = "ABCDEFGHIJK", "abcdefghij"
WORDS = [FIRST[index // 10] + SECOND[index % 10] for index in range(VOCAB_SIZE)]
CROSSING = [SECOND[index] + FIRST[index] for index in range(10)]  # tokens of the draft tokenizer across two words


def tokenizer_of(tokens: list[str], pairs: Sequence[str] | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with these tokens, by id, of one or two characters.

    pairs: those of two in the order in which they are merged; None: that of the ids. special: eos_token and the like,
    which are among the tokens.
    """
    merges = [(pair[0], pair[1]) for pair in pairs or tokens if len(pair) == 2]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@cache
def word_pair() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast, Tensor]:
    """A target's tokenizer whose ids below VOCAB_SIZE are words of two letters, and one of most of them at other ids.

    In place of the last words the draft tokenizer has the letters, and pairs of letters across two words, which it
    merges first: so the end of a text is often encoded otherwise when it grows. -> both, and for each draft id the
    target's id in whose place it is.
    """
    letters = [*FIRST, *SECOND]
    order = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    replaced = dict(zip(reversed(WORDS), [*letters, *CROSSING], strict=False))
    tokens = [replaced.get(WORDS[index], WORDS[index]) for index in order.tolist()]
    pairs = [*CROSSING, *(word for word in WORDS if word in tokens)]
    return tokenizer_of([*WORDS, *letters]), tokenizer_of(tokens, pairs), order


@cache
def shared_words() -> SharedVocabulary:
    return SharedVocabulary(*word_pair()[:2])


@torch.no_grad()
def permuted(model: PreTrainedModel, order: Tensor) -> PreTrainedModel:
    """A copy whose id i is the model's id order[i]: the rows of its embeddings and of its head in another order."""
    model = deepcopy(model)
    for parameter in model.parameters():
        if parameter.shape[:1] == order.shape:
            parameter.copy_(parameter[order])
    return model


def other_tokenizer(model: PreTrainedModel) -> OtherTokenizerDrafter:
    """A drafter that drafts as this model of VOCAB_SIZE ids, in the other encoding of word_pair."""
    draft = permuted(model, word_pair()[2])
    return OtherTokenizerDrafter(draft, VOCAB_SIZE, shared_words())


def byte_level(corpus: list[str], vocab_size: int, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer as GPT-2's, trained on a few lines."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False,
                                    special_tokens=list(special.values()))
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def sentencepiece(corpus: list[str], vocab_size: int, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's, trained on a few lines: "▁" for spaces, one before the text, byte tokens."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 256, show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    vocab, merges = trained.get_vocab(), _merges_of(trained)
    tokens = [*special.values(), *byte_tokens, *sorted(vocab, key=vocab.__getitem__)]
    model = models.BPE({token: index for index, token in enumerate(tokens)}, merges, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
