"""Tokens: whole documents to content token ids, with the characters each token came from.

One int32 buffer holds all documents, one after the other; overlap and padding never exist here. Text is text: a
document that spells out "[SEP]" or "</s>" gets the tokens of these letters, never the special token.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import transformers
from safetensors import SafetensorError
from tokenizers import Encoding, Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from belt_tasks.errors import ConfigError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

# Characters per call of the Rust tokenizer, and per piece of one long document: an encoding takes some 500 bytes a
# token, so calls of this size stay within a few hundred megabytes whatever the text.
CALL_CHARACTERS = 300_000
PIECE_CHARACTERS = 200_000
OVERLAP_CHARACTERS = 2_000

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """What a tokenizer puts around content tokens, read from the tokenizer and the model."""

    prefix_ids: tuple[int, ...]
    """Before the content, for example (cls,)."""
    suffix_ids: tuple[int, ...]
    """After the content, for example (sep,)."""
    pad_id: int
    """Fills rows up to the longest."""

    @property
    def num_tokens(self) -> int:
        """Special tokens per chunk."""
        return len(self.prefix_ids) + len(self.suffix_ids)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Content tokens of D documents, T in all; document d owns `[offsets[d] : offsets[d + 1]]` of each buffer."""

    input_ids_T: Int32
    """Token ids, special tokens excluded."""
    start_char_T: Int32
    """First character (Unicode code point of the document's text) of each token."""
    stop_char_T: Int32
    """One past its last character."""
    offsets: Int64
    """D + 1 positions in the buffers."""
    unknown_id: int | None = None
    """The id that stands for what the vocabulary lacks; None where the tokenizer has none."""

    @property
    def num_tokens_D(self) -> Int64:
        """Content tokens of each document."""
        return np.diff(self.offsets)

    @property
    def num_unknown(self) -> int | None:
        """Tokens that stand for what the vocabulary lacks."""
        return None if self.unknown_id is None else int(np.count_nonzero(self.input_ids_T == self.unknown_id))

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The documents of several buffers, of one tokenizer, in one."""
        lengths = [part.num_tokens_D for part in parts]
        return cls(
            input_ids_T=np.concatenate([np.empty(0, np.int32), *(part.input_ids_T for part in parts)]),
            start_char_T=np.concatenate([np.empty(0, np.int32), *(part.start_char_T for part in parts)]),
            stop_char_T=np.concatenate([np.empty(0, np.int32), *(part.stop_char_T for part in parts)]),
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([[], *lengths]), dtype=np.int64)]),
            unknown_id=parts[0].unknown_id if parts else None,
        )


class DocumentTokenizer:
    """A Rust tokenizer that reads whole documents, and the special tokens its model wants around a chunk."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens, *, unknown_id: int | None = None) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "encode them as text": the document cannot smuggle them in
        self._tokenizer = tokenizer
        self.special = special
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = np.array(sorted(i for i, token in added.items() if token.special), dtype=np.int32)
        self._unknown_id = unknown_id

    @property
    def fingerprint(self) -> str:
        """What tells its tokens from those of another: sha256 over all it consists of, 64 hex digits."""
        return hashlib.sha256(f"{self._tokenizer.to_str()}{self.special}".encode()).hexdigest()

    @classmethod
    def from_transformers(cls, tokenizer: PreTrainedTokenizerBase, *, pad_id: int | None, source: str) -> Self:
        """Take the Rust tokenizer out of a transformers one, and learn its special tokens from what it does.

        Args:
            tokenizer: any fast tokenizer.
            pad_id: the model's padding id, which decides its position numbers; None takes the tokenizer's.
            source: where it came from, for messages.

        Raises:
            ConfigError: it is not fast, or puts no special token before a text.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(f"{source}: needs a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
        encoding = backend.encode("a", add_special_tokens=True)
        content = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        prefix_ids = tuple(encoding.ids[: content[0]]) if content else ()
        if not prefix_ids:
            raise ConfigError(
                f"{source}: its tokenizer puts no special token before a text, "
                "so there is no first token to classify on; belt needs an encoder such as BERT or RoBERTa"
            )
        pad_id = pad_id if pad_id is not None else tokenizer.pad_token_id
        suffix_ids = tuple(encoding.ids[content[-1] + 1 :])
        return cls(
            backend,
            SpecialTokens(prefix_ids=prefix_ids, suffix_ids=suffix_ids, pad_id=0 if pad_id is None else pad_id),
            unknown_id=tokenizer.unk_token_id,
        )

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenize whole texts, without truncation, padding or special tokens."""
        parts = [part for call in _calls(texts) for part in self._tokenize_call(call)]
        ids = [ids for ids, _ in parts]
        spans = [spans for _, spans in parts]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(row) for row in ids], dtype=np.int64)])
        input_ids_T = np.concatenate([np.empty(0, np.int32), *ids])
        spans_T2 = np.concatenate([np.empty((0, 2), np.int32), *spans])
        return Tokens(
            input_ids_T=self._without_special(input_ids_T),
            start_char_T=np.ascontiguousarray(spans_T2[:, 0]),
            stop_char_T=np.ascontiguousarray(spans_T2[:, 1]),
            offsets=offsets,
            unknown_id=self._unknown_id,
        )

    def _tokenize_call(self, texts: Sequence[str]) -> Iterator[tuple[Int32, Int32]]:
        if len(texts) == 1 and len(texts[0]) > PIECE_CHARACTERS:
            yield self._tokenize_long(texts[0])
            return
        for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False):
            yield _ids_and_spans(encoding)

    def _tokenize_long(self, text: str) -> tuple[Int32, Int32]:
        """One long text in overlapping pieces, with the same result as in one call.

        Pre-tokenizers read from left to right and look ahead a little, never behind. So where two readings that
        began at different characters both begin a word at the same one, they agree from there on: the later piece
        takes over at such a seam. A stretch without any (one endless word) is tokenized in one call.
        """
        ids: list[Int32] = []
        spans: list[Int32] = []
        start, seam, size = 0, 0, PIECE_CHARACTERS
        while True:
            piece = self._encode_piece(text, start, start + size)
            first_token = piece.word_starts[seam] if seam else 0
            if start + size >= len(text):
                ids.append(piece.ids[first_token:])
                spans.append(piece.spans[first_token:])
                return np.concatenate(ids), np.concatenate(spans)
            next_start = start + size - OVERLAP_CHARACTERS
            overlap = self._encode_piece(text, next_start, start + size)
            next_seam = _last_seam(piece, overlap, before=next_start + OVERLAP_CHARACTERS // 2)
            if next_seam is None:
                size *= 2
                continue
            last_token = piece.word_starts[next_seam]
            ids.append(piece.ids[first_token:last_token])
            spans.append(piece.spans[first_token:last_token])
            start, seam, size = next_start, next_seam, PIECE_CHARACTERS

    def _encode_piece(self, text: str, start: int, stop: int) -> "_Piece":
        encoding = self._tokenizer.encode_batch([text[start:stop]], add_special_tokens=False)[0]
        ids, spans = _ids_and_spans(encoding)
        spans += np.int32(start)
        word_ids = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
        begins_word = np.diff(word_ids, prepend=-1) != 0
        not_empty = spans[:, 1] > spans[:, 0]
        tokens = np.flatnonzero(begins_word & not_empty)
        return _Piece(
            ids=ids,
            spans=spans,
            word_starts=dict(zip(spans[tokens, 0].tolist(), tokens.tolist(), strict=True)),
        )

    def _without_special(self, input_ids_T: Int32) -> Int32:
        """Some vocabularies hold special tokens as ordinary pieces; a text that reaches one gets the unknown token."""
        if self._unknown_id is None:
            return input_ids_T
        smuggled_T = np.isin(input_ids_T, self._special_ids) & (input_ids_T != self._unknown_id)
        return np.where(smuggled_T, np.int32(self._unknown_id), input_ids_T) if smuggled_T.any() else input_ids_T


def load_tokenizer(source: str | Path) -> DocumentTokenizer:
    """The tokenizer of a local directory or hub name.

    Raises:
        ConfigError: there is none, it has no fast (Rust) implementation, or it puts nothing before a text.
    """
    with model_files(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
        pad_id = AutoConfig.from_pretrained(source).pad_token_id
    return DocumentTokenizer.from_transformers(tokenizer, pad_id=pad_id, source=str(source))


@contextmanager
def model_files(source: str | Path) -> Iterator[None]:
    """Turn what transformers raises for a wrong model into one sentence, and keep its load report quiet."""
    if not Path(source).is_dir() and not HUB_NAME.fullmatch(str(source)):
        raise ConfigError(f"{source}: neither a local directory nor a Hugging Face name (NAME or OWNER/NAME)")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        if Path(source).is_dir() and not (Path(source) / "config.json").exists():
            reason = "the folder has no config.json, so it is no encoder"
        raise ConfigError(f"cannot load a model from {source}: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Tokens of a part of a text; characters and word starts are counted from the start of the whole text."""

    ids: Int32
    spans: Int32
    word_starts: dict[int, int]
    """First character of a word -> its first token."""


def _last_seam(piece: _Piece, overlap: _Piece, *, before: int) -> int | None:
    """The last character before `before` where both begin a word; the first word of `overlap` may be a torn one."""
    first = min(overlap.word_starts, default=before)
    return max(
        (char for char in overlap.word_starts if first < char < before and char in piece.word_starts),
        default=None,
    )


def _ids_and_spans(encoding: Encoding) -> tuple[Int32, Int32]:
    """Token ids [T] and half-open character spans [T, 2]."""
    return np.array(encoding.ids, dtype=np.int32), np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)


def _calls(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Neighbouring texts of CALL_CHARACTERS together at most; a long text goes alone."""
    first, num_characters = 0, 0
    for i, text in enumerate(texts):
        if i > first and (num_characters + len(text) > CALL_CHARACTERS or len(text) > PIECE_CHARACTERS):
            yield texts[first:i]
            first, num_characters = i, 0
        num_characters += len(text)
        if len(text) > PIECE_CHARACTERS:
            yield texts[first : i + 1]
            first, num_characters = i + 1, 0
    if first < len(texts):
        yield texts[first:]
