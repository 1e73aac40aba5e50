"""Turns any form of `AwqOffloadConfig.dataset` into sequences of token ids without padding.

    text      documents are tokenized, joined with EOS, and cut every `max_seq_len` tokens
    rows      (token ids, dicts with input_ids, conversations) become one sequence each, cut if too long
    samples   (a processor's output for text and images) become one batch each and are never cut

If there are more than `n_samples` sequences, a seeded random choice is used. Reading stops at `READ_FACTOR` times the
number of tokens needed, so that endless streams can be passed. Everything that is not used is counted and logged.

If the tokenizer starts texts with a BOS (Llama, Gemma), each document starts with one, *and* so does each sequence that
was cut from the middle of a document: in use, such a model never sees text without it. For that reason the alternative,
plain cuts as in GPTQ's calibration, was rejected.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..config import MIN_SEQ_LEN_TOKENS, AwqOffloadConfig
from ..errors import CalibrationDataError
from ..logs import get_logger
from .documents import Chat, Document, Text, TokenRow, documents_of_encoding, read_documents
from .samples import Sample, has_media
from .sources import open_source
from .tokenizers import list_of_ids, processor_of, render_with_media, text_blocks, tokenizer_of

logger = get_logger(__name__)

READ_FACTOR = 4
"""Most tokens read, as a multiple of those used; the surplus lets the random choice spread over more data."""

MIN_ROW_TOKENS = 2
MIN_TOKENS = MIN_SEQ_LEN_TOKENS
"""Least number of tokens in all; also the least length of the last piece of text, which is dropped if shorter."""


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """The calibration data that the model is run on."""

    sequences: list[Tensor] = field(repr=False)  # each (tokens,) int64 on the CPU, no padding
    counted: list[Tensor | None] = field(repr=False)
    """Which tokens enter the statistics, (tokens,) bool per sequence; None means all."""
    name: str
    """The name of the data set or file, "builtin", or "sha256:" and 16 hex digits of the token ids; never any text."""
    samples: list[Sample] = field(default_factory=list, repr=False)
    """A processor's outputs for text and images."""

    @property
    def tokens(self) -> int:
        """The number of tokens in all sequences and samples, counted or not, without padding."""
        return sum(len(sequence) for sequence in [*self.sequences, *(sample.token_ids for sample in self.samples)])

    @property
    def counted_tokens(self) -> int:
        """The number of tokens that enter the statistics."""
        parts = [*zip(self.sequences, self.counted, strict=True), *((s.token_ids, s.counted) for s in self.samples)]
        return sum(len(ids) if mask is None else int(mask.sum()) for ids, mask in parts)

    def __len__(self) -> int:
        return len(self.sequences) + len(self.samples)


def load_calibration_set(
    config: AwqOffloadConfig,
    *,
    load_tokenizer: Callable[[], PreTrainedTokenizerBase],
    vocab_size: int,
    load_processor: Callable[[], ProcessorMixin] | None = None,
    accepts: frozenset[str] = frozenset(),
    placeholders: frozenset[int] = frozenset(),
    arguments: Mapping[str, Any] | None = None,
) -> CalibrationSet:
    """Reads, tokenizes and cuts `config.dataset`; equal data and config give equal results.

    Args:
        config: provides dataset, tokenizer, text_column, n_samples, max_seq_len (tokens) and seed.
        load_tokenizer: loads the checkpoint's own tokenizer; called if one is needed and the config has none.
        vocab_size: ids from 0 to vocab_size - 1 are accepted.
        load_processor: loads the checkpoint's own processor; called for conversations with images if the config has
            none.
        accepts: names of the data arguments of the model's forward pass.
        placeholders: ids that stand for images and the like; they may lie outside the vocabulary.
        arguments: for loading a tokenizer or processor that the config names (token, cache_dir, …).

    Returns:
        At most n_samples sequences of at most max_seq_len tokens, (tokens,) int64 on the CPU.

    Raises:
        CalibrationDataError: the data could not be read or tokenized, has the wrong form, or has too few tokens.
    """

    @functools.cache
    def get_tokenizer() -> PreTrainedTokenizerBase:
        return tokenizer_of(config.tokenizer, load_tokenizer, arguments)

    def render_media(chat: Chat) -> Mapping[str, Any]:
        return render_with_media(chat, processor_of(config.tokenizer, load_processor, arguments))

    source = open_source(config, get_tokenizer)
    reading = _Reading(config, get_tokenizer, render_media, vocab_size, accepts, placeholders)
    for document in read_documents(source.elements, config.text_column, source.string_columns, accepts):
        reading.add(document)
        if reading.is_enough:
            break
    pieces = reading.take_pieces()
    _require_enough(reading, pieces)
    chosen = pieces
    if len(pieces) > config.n_samples:
        indices = sorted(random.Random(config.seed).sample(range(len(pieces)), config.n_samples))
        chosen = [pieces[index] for index in indices]
    texts = [piece for piece in chosen if piece.sample is None]
    calibration = CalibrationSet(
        [piece.token_ids for piece in texts],
        [piece.counted for piece in texts],
        name=source.name or _digest([piece.token_ids for piece in chosen]),
        samples=[piece.sample for piece in chosen if piece.sample is not None],
    )
    _report(config, reading, pieces, calibration)
    return calibration


def micro_batches(calibration: CalibrationSet, batch_tokens: int) -> list[list[int]]:
    """Groups the indices of equally long sequences, longest first, so that a batch too large for memory fails early.

    Args:
        calibration: the sequences.
        batch_tokens: most tokens in a batch; every batch has at least one sequence.

    Returns:
        Every index exactly once, in ascending order within a length.
    """
    indices_of_length: dict[int, list[int]] = defaultdict(list)
    for index, sequence in enumerate(calibration.sequences):
        indices_of_length[len(sequence)].append(index)
    batches = []
    for length, indices in sorted(indices_of_length.items(), reverse=True):
        size = max(1, batch_tokens // length)
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    return batches


class _Piece(NamedTuple):
    """A sequence that may be used, and the row that it comes from (-1 for text, whose pieces cross documents)."""

    row: int
    token_ids: Tensor  # (tokens,) int64
    counted: Tensor | None  # (tokens,) bool
    sample: Sample | None = None  # the sample that the token ids belong to


class _Reading:
    """The data that has been read so far, and counts of what was left out."""

    def __init__(
        self,
        config: AwqOffloadConfig,
        get_tokenizer: Callable[[], PreTrainedTokenizerBase],
        render_media: Callable[[Chat], Mapping[str, Any]],
        vocab_size: int,
        accepts: frozenset[str],
        placeholders: frozenset[int],
    ):
        self.max_seq_len = config.max_seq_len
        self.n_samples = config.n_samples
        self.get_tokenizer = get_tokenizer
        self.render_media = render_media
        self.vocab_size = vocab_size
        self.accepts = accepts
        self.placeholders = torch.tensor(sorted(placeholders), dtype=torch.int64)
        self.texts: list[tuple[int, Tensor]] = []  # (row, token ids)
        self.text_tokens = 0
        self.row_pieces: list[_Piece] = []
        self.documents = 0
        self.empty_documents = 0
        self.padding_tokens = 0
        self.short_tokens: list[int] = []  # lengths of pieces that are too short
        self.uncounted_tokens: list[int] = []  # lengths of pieces in which no token counts
        self.tail_tokens = 0

    @property
    def is_enough(self) -> bool:
        sequences = READ_FACTOR * self.n_samples
        return len(self.row_pieces) >= sequences or self.text_tokens >= sequences * self.max_seq_len

    def add(self, document: Document) -> None:
        self.documents += 1
        if isinstance(document, Text):
            token_ids = self._tokenize(document)
            self.empty_documents += not len(token_ids)
            self._require_known_ids(document.row, token_ids)
            self.text_tokens += len(token_ids)
            if len(token_ids):
                self.texts.append((document.row, token_ids))
        elif isinstance(document, Sample):
            self._add_sample(document)
        elif isinstance(document, Chat) and (document.images is not None or has_media(document.messages)):
            self.documents -= 1  # counted again once rendered
            for rendered in documents_of_encoding(document.row, self.render_media(document), self.accepts):
                self.add(rendered)
        elif isinstance(document, Chat):
            self._add_row(TokenRow(document.row, self._render(document), counted=None, padding_tokens=0))
        else:
            self._add_row(document)

    def take_pieces(self) -> list[_Piece]:
        """Returns all sequences that may be used, in the order of the data, which may have been visited in another."""
        if not self.texts:
            return sorted(self.row_pieces, key=lambda piece: piece.row)
        eos_id = self.get_tokenizer().eos_token_id
        separator = torch.tensor([] if eos_id is None else [eos_id], dtype=torch.int64)
        joined: list[Tensor] = []
        for row, token_ids in sorted(self.texts, key=lambda text: text[0]):
            if joined:
                self._require_known_ids(row, separator)
                joined.append(separator)
            joined.append(token_ids)
        pieces = list(_cut_text(torch.cat(joined), self.max_seq_len, self._bos_id))
        tail_tokens = len(pieces[-1])
        if tail_tokens < MIN_TOKENS or (tail_tokens < self.max_seq_len and len(pieces) > self.n_samples):
            self.tail_tokens = tail_tokens
            pieces.pop()
        return [_Piece(-1, piece, None) for piece in pieces]

    @functools.cached_property
    def _bos_id(self) -> int | None:
        """The id of the BOS if the tokenizer starts texts with it, else None."""
        tokenizer = self.get_tokenizer()
        first_ids = tokenizer("a", verbose=False)["input_ids"][:1]
        return tokenizer.bos_token_id if first_ids == [tokenizer.bos_token_id] else None

    def _tokenize(self, document: Text) -> Tensor:
        """Returns (tokens,) int64 with the tokenizer's BOS, if any; stops early in a very long document."""
        tokenizer = self.get_tokenizer()
        limit_tokens = READ_FACTOR * self.n_samples * self.max_seq_len
        token_ids: list[int] = []
        try:
            for block in text_blocks(document.text):
                # verbose=False avoids a warning about texts longer than the model's context.
                token_ids += list_of_ids(tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"])
                if len(token_ids) >= limit_tokens:
                    break
            bos = [self._bos_id] if token_ids and self._bos_id is not None else []
        except Exception as error:  # of any kind: there are many tokenizers, some with remote code
            raise CalibrationDataError(
                f"The tokenizer (a {type(tokenizer).__name__}) failed on row {document.row} of the dataset "
                f"({type(error).__name__}: {error}). Check `tokenizer`, or pass token ids."
            ) from error
        return torch.tensor(bos + token_ids, dtype=torch.int64)

    def _render(self, document: Chat) -> Tensor:
        """Returns (tokens,) int64 with the special tokens of the chat template."""
        tokenizer = self.get_tokenizer()
        # A tokenizer that renders without a template (Mistral's) does not take tokenizer_kwargs.
        has_template = getattr(tokenizer, "chat_template", None) is not None
        quiet: dict[str, Any] = {"tokenizer_kwargs": {"verbose": False}} if has_template else {}
        try:
            encoding: Any = tokenizer.apply_chat_template(document.messages, return_dict=True, **quiet)
            return torch.tensor(list_of_ids(encoding["input_ids"]), dtype=torch.int64)
        except Exception as error:  # of any kind: templates can raise anything
            raise CalibrationDataError(
                f"The tokenizer (a {type(tokenizer).__name__}) could not render the conversation in row "
                f"{document.row} with its chat template ({type(error).__name__}: {error}). Pass the tokenizer "
                "of a chat model, set tokenizer.chat_template, or pass texts instead."
            ) from error

    def _add_row(self, row: TokenRow) -> None:
        self._require_known_ids(row.row, row.token_ids)
        self.padding_tokens += row.padding_tokens
        self.empty_documents += not len(row.token_ids)
        for start in range(0, len(row.token_ids), self.max_seq_len):
            token_ids = row.token_ids[start : start + self.max_seq_len]
            counted = None if row.counted is None else row.counted[start : start + self.max_seq_len]
            if len(token_ids) < MIN_ROW_TOKENS:
                self.short_tokens.append(len(token_ids))
            elif counted is not None and not counted.any():
                self.uncounted_tokens.append(len(token_ids))
            else:
                is_all = counted is None or bool(counted.all())
                self.row_pieces.append(_Piece(row.row, token_ids.clone(), None if is_all else counted))

    def _add_sample(self, sample: Sample) -> None:
        token_ids = sample.token_ids
        self._require_known_ids(sample.row, token_ids, self.placeholders)
        self.padding_tokens += sample.inputs["input_ids"].numel() - len(token_ids)
        if len(token_ids) < MIN_ROW_TOKENS:
            self.short_tokens.append(len(token_ids))
        elif sample.counted is not None and not sample.counted.any():
            self.uncounted_tokens.append(len(token_ids))
        else:
            self.row_pieces.append(_Piece(sample.row, token_ids, None, sample))

    def _require_known_ids(self, row: int, token_ids: Tensor, placeholders: Tensor | None = None) -> None:
        is_unknown = (token_ids < 0) | (token_ids >= self.vocab_size)
        if placeholders is not None:
            is_unknown &= ~torch.isin(token_ids, placeholders)
        if is_unknown.any():
            position = int(is_unknown.nonzero()[0])
            raise CalibrationDataError(
                f"Row {row} of the dataset has the token id {int(token_ids[position])} at position "
                f"{position}; the model's vocabulary has ids from 0 to {self.vocab_size - 1} (size "
                f"{self.vocab_size}). Use the model's own tokenizer, and mark padding with an attention_mask."
            )

    @property
    def left_out_tokens(self) -> int:
        """The number of tokens that were read but are in none of the pieces."""
        return self.tail_tokens + sum(self.short_tokens) + sum(self.uncounted_tokens)

    def left_out(self) -> list[str]:
        """Describes the data that cannot be used."""
        parts = [
            (self.empty_documents, f"{self.empty_documents} empty documents"),
            (self.padding_tokens, f"{self.padding_tokens} padding tokens"),
            (self.tail_tokens, f"the last {self.tail_tokens} tokens of the text"),
            (
                self.short_tokens,
                f"{len(self.short_tokens)} sequences shorter than {MIN_ROW_TOKENS} tokens "
                f"({sum(self.short_tokens)} tokens)",
            ),
            (
                self.uncounted_tokens,
                f"{len(self.uncounted_tokens)} sequences in which loss_mask or labels exclude every token "
                f"({sum(self.uncounted_tokens)} tokens)",
            ),
        ]
        return [words for amount, words in parts if amount]


def _cut_text(
    token_ids: Tensor,  # (tokens,) int64
    max_seq_len: int,
    bos_id: int | None,
) -> Iterator[Tensor]:
    """Yields pieces of max_seq_len tokens (the last may be shorter), each starting with `bos_id` unless it is None."""
    start = 0
    while start < len(token_ids):
        needs_bos = bos_id is not None and bool(token_ids[start] != bos_id)
        piece = token_ids[start : start + max_seq_len - needs_bos]
        start += len(piece)
        # Copied, so that the chosen pieces do not keep all of the text in memory.
        yield torch.cat([torch.tensor([bos_id]), piece]) if needs_bos else piece.clone()


def _digest(sequences: list[Tensor]) -> str:
    """Names nameless data: "sha256:" and 16 hex digits over each sequence's length and ids (int64, little endian)."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.numpy().astype("<i8").tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _require_enough(reading: _Reading, pieces: list[_Piece]) -> None:
    if not reading.documents:
        raise CalibrationDataError(
            "The dataset is empty: it has no rows. Pass some rows, or 'builtin'. A generator can be read only "
            "once; if an earlier call has consumed this one, create a new one."
        )
    tokens = sum(len(piece.token_ids) for piece in pieces)
    if tokens < MIN_TOKENS:
        left_out = reading.left_out()
        raise CalibrationDataError(
            f"The dataset has {tokens} usable tokens in {reading.documents} documents; expected at least "
            f"{MIN_TOKENS}, preferably tens of thousands."
            + (f" Left out: {', '.join(left_out)}." if left_out else "")
            + " Pass more data, or 'builtin'."
        )


def _report(config: AwqOffloadConfig, reading: _Reading, pieces: list[_Piece], calibration: CalibrationSet) -> None:
    piece_tokens = sum(len(piece.token_ids) for piece in pieces)
    left_over = reading.left_out()
    if len(pieces) > len(calibration):
        unused = len(pieces) - len(calibration)
        left_over.insert(0, f"{unused} sequences not chosen ({piece_tokens - calibration.tokens} tokens)")
    logger.info(
        "Calibration data %s: read %d documents, %d tokens%s; using %d sequences of at most %d tokens, %d "
        "tokens in all, %d of them counted. Left over: %s.",
        calibration.name,
        reading.documents,
        piece_tokens + reading.left_out_tokens,
        ", and stopped there" if reading.is_enough else "",
        len(calibration),
        config.max_seq_len,
        calibration.tokens,
        calibration.counted_tokens,
        ", ".join(left_over) or "nothing",
    )
    if reading.short_tokens or reading.uncounted_tokens:
        logger.warning("Calibration data %s: left out %s.", calibration.name, ", ".join(reading.left_out()))
    if len(calibration) < config.n_samples:
        logger.warning(
            "Calibration data %s: n_samples is %d, but the data yields only %d sequences (%d tokens); all are "
            "used. More data improves the calibration.",
            calibration.name,
            config.n_samples,
            len(calibration),
            calibration.tokens,
        )
    if calibration.name == "builtin":
        logger.info(
            "The built-in calibration text is English documentation of Python. Data that resembles what the model "
            "will be used on is better: set `dataset` to a list of texts, a file or a data set."
        )
