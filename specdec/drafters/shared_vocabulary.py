"""Two tokenizers: the tokens that both have, and a growing text of one's ids in the other's encoding.

Timor and others, Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous
Vocabularies (2025, arXiv 2502.05202).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

# Characters of a text that is encoded again as it grows
CONTEXT = 32  # before the part that may change, so that what a tokenizer does at the start of a text stays there
MARGIN = 32  # at the end, whose encoding may depend on what follows
WINDOW = 64  # in which a place is searched where the part that may change begins
GROWTH = 64  # after which it is searched again

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class SharedVocabulary:
    """The tokens of a target's tokenizer that a draft model's tokenizer has too: those that stand for the same bytes.

    draft_ids: [N] int64 on the CPU, for each id of the target's tokenizer the draft model's, -1 where it has none. The
    EOS ids stand for each other, whatever their strings are.
    num_ids, num_shared: ids of the target's tokenizer, and those of them that have a draft id.
    num_draft_ids: 1 + the largest id of the draft model's tokenizer.
    draft_prefix: what that tokenizer puts before a text, a BOS id or nothing.
    added_start: what the target's puts before a text, a space or nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, draft_tokenizer: PreTrainedTokenizerBase) -> None:
        self._draft = _copy_of(_backend(draft_tokenizer))
        target_bytes, draft_bytes = bytes_of_ids(tokenizer), bytes_of_ids(draft_tokenizer)
        target_ids, by_bytes = _preferred_ids(target_bytes, tokenizer), _preferred_ids(draft_bytes, draft_tokenizer)
        shared = {token: by_bytes[value] for value, token in target_ids.items() if value in by_bytes}
        eos, draft_eos = tokenizer.eos_token_id, draft_tokenizer.eos_token_id
        if eos is not None and draft_eos is not None:
            shared[eos] = draft_eos
        self.num_ids, self.num_shared = len(target_bytes), len(shared)
        self.num_draft_ids = 1 + max(draft_bytes)
        self.draft_ids = torch.full((1 + max(target_bytes),), -1)
        self.draft_ids[list(shared)] = torch.tensor(list(shared.values()), dtype=torch.int64)

        self._texts = target_bytes  # by id, what the draft model reads for it
        for token, added in tokenizer.added_tokens_decoder.items():
            if added.special:
                self._texts[token] = draft_bytes[shared[token]] if token in shared else b""
        draft_start = self._draft.encode("", add_special_tokens=True).ids[:1]
        self.draft_prefix = draft_start if draft_start == [draft_tokenizer.bos_token_id] else []
        if self.draft_prefix and tokenizer.bos_token_id not in (None, eos):
            self._texts[tokenizer.bos_token_id] = b""
        start = tokenizer.encode("a", add_special_tokens=False)
        self.added_start = b" " if b"".join(map(target_bytes.__getitem__, start))[:1] == b" " else b""

    @property
    def coverage(self) -> float:
        """The fraction of the target's ids that can be drafted."""
        return self.num_shared / self.num_ids

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """What the draft model's tokenizer reads for ids of the target, in UTF-8.

        Special tokens that the draft model does not have are left out, and so is a BOS token where it has its own.
        """
        return b"".join(self._texts.get(token, b"") for token in ids)

    def encode(self, text: str) -> list[int]:
        """The draft model's ids for a text, without special tokens around it."""
        ids: list[int] = self._draft.encode(text, add_special_tokens=False).ids
        return ids


class DraftText:
    """A growing text of target ids in the draft model's encoding.

    ids: the encoding, that of the whole text. num_final: leading ids that stay as they are whatever follows.
    is_complete: whether the text ends with a whole character; ids leave out one that has begun.

    An append encodes the end of the text alone, some CONTEXT + MARGIN + WINDOW + GROWTH characters at most. That end is
    moved to where encoding from there on is seen to give the same ids.
    """

    def __init__(self, shared: SharedVocabulary) -> None:
        self.shared = shared
        self.ids = list(shared.draft_prefix)
        self.num_final, self._num_context_ids = len(self.ids), 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_start = True
        self._end = ""  # the first _num_context_ids ids of its encoding are final
        self._next_move = CONTEXT + MARGIN + GROWTH

    @property
    def is_complete(self) -> bool:
        return not self._decoder.getstate()[0]

    def append(self, target_ids: Sequence[int]) -> None:
        """Append ids of the target."""
        new = self.shared.bytes_of(target_ids)
        if new and self._is_start:
            new, self._is_start = new.removeprefix(self.shared.added_start), False
        text = self._decoder.decode(new)
        if not text:
            return
        self._end += text
        changed = self.shared.encode(self._end)[self._num_context_ids :]
        self.ids[self.num_final :] = changed
        if len(self._end) > self._next_move:
            self._next_move = 2 * len(self._end)
            self._move(changed)

    def _move(self, changed: list[int]) -> None:
        """Let the part that may change begin at a later place, from which on the encoding is the same."""
        last = len(self._end) - MARGIN
        cuts = sorted(range(last, max(CONTEXT, last - WINDOW), -1), key=lambda cut: not self._is_word_start(cut))
        for cut in cuts:
            num_context_ids = len(self.shared.encode(self._end[cut - CONTEXT : cut]))
            rest = self.shared.encode(self._end[cut - CONTEXT :])[num_context_ids:]
            if rest and rest == changed[-len(rest) :]:
                self.num_final = len(self.ids) - len(rest)
                self._num_context_ids = num_context_ids
                self._end = self._end[cut - CONTEXT :]
                self._next_move = len(self._end) + GROWTH
                return

    def _is_word_start(self, at: int) -> bool:
        return self._end[at] == " " and not self._end[at - 1].isspace()


def bytes_of_ids(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """What each id of a tokenizer stands for: byte-level tokens, "▁" for a space, <0x0A> for a byte, or the string."""
    own_decoder = _backend(tokenizer).decoder
    decoder = "" if own_decoder is None else own_decoder.__getstate__().decode()
    added = tokenizer.added_tokens_decoder
    alphabet = _byte_alphabet()
    result = {}
    for token, index in tokenizer.get_vocab().items():
        if index not in added and "ByteLevel" in decoder and all(character in alphabet for character in token):
            result[index] = bytes(map(alphabet.__getitem__, token))
        elif index not in added and "ByteFallback" in decoder and (match := BYTE_TOKEN.fullmatch(token)):
            result[index] = bytes([int(match[1], 16)])
        else:
            text = token.replace("▁", " ") if index not in added and "▁" in decoder else token
            result[index] = text.encode()
    return result


def _preferred_ids(values: dict[int, bytes], tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """The id for each value: of several the first that is not a byte token, which no encoding would hold."""
    names = tokenizer.get_vocab()
    byte_tokens = {index for token, index in names.items() if BYTE_TOKEN.fullmatch(token)}
    result: dict[bytes, int] = {}
    for index in sorted(values, key=lambda index: (index in byte_tokens, index)):
        if values[index]:
            result.setdefault(values[index], index)
    return result


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer of the tokenizers library that it wraps. Raises ValueError where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"the draft model has another tokenizer than the target, and specdec cannot compare a"
            f" {type(tokenizer).__name__}, which is not one of the tokenizers library; use a draft model that was"
            " trained with the target's tokenizer"
        )
    return backend


def _copy_of(backend: Tokenizer) -> Tokenizer:
    """A copy that does not truncate or pad, and that any number of threads may use."""
    copy: Tokenizer = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokens are written in: printable bytes as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
