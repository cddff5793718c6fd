"""What `belt windows` shows: the windows of one text, as a table."""

from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text

from belt_tasks import encoder as encoders
from belt_tasks.demo import demo_encoder
from belt_tasks.errors import ConfigError
from belt_tasks.prepare import content_fingerprints, document_seeds
from belt_tasks.specs import ChunkSpec
from belt_tasks.tokens import load_tokenizer
from belt_tasks.windows import chunk_windows

BAR_WIDTH = 16
SHOWN_CHARACTERS = 14


def window_table(file: Path, encoder: str | None, spec: ChunkSpec) -> tuple[Table, str]:
    """Cut a text file and describe each window.

    Returns:
        The table, and a sentence that counts.

    Raises:
        ConfigError: the file cannot be read, or the encoder cannot read such chunks.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: must be UTF-8, but byte {error.start} is not") from error
    source = str(demo_encoder()) if encoder is None else encoder
    tokenizer = load_tokenizer(source)
    encoders.check_chunk_size(spec, tokenizer.special, encoders.num_positions_of_source(source), source=source)
    tokens = tokenizer.tokenize([text])
    seeds_D = document_seeds(content_fingerprints([text]))
    windows = chunk_windows(tokens.num_tokens_D, spec, document_seed_D=seeds_D)
    num_tokens = len(tokens.input_ids_T)
    table = Table(
        Column("chunk", justify="right"),
        Column("tokens", no_wrap=True, min_width=max(len(f"[{num_tokens}, {num_tokens})"), 6)),
        Column("characters", no_wrap=True, min_width=len(f"[{len(text)}, {len(text)})")),
        Column("where", no_wrap=True, min_width=BAR_WIDTH),
        Column("begins", no_wrap=True),
        Column("ends", no_wrap=True),
        box=SIMPLE_HEAD,
    )
    for index, start, stop in zip(windows.chunk_index_C, windows.start_C, windows.stop_C, strict=True):
        first = int(tokens.start_char_T[start]) if stop > start else 0
        last = int(tokens.stop_char_T[stop - 1]) if stop > start else 0
        table.add_row(
            str(index),
            f"[{start}, {stop})",
            f"[{first}, {last})",
            _bar(start, stop, num_tokens),
            Text(_line(text[first : min(first + SHOWN_CHARACTERS, last)])),
            Text(_line(text[max(last - SHOWN_CHARACTERS, first) : last])),
        )
    covered = int(np.sum(windows.new_tokens_C()))
    encoded = int(np.sum(windows.stop_C - windows.start_C))
    return table, (
        f"{num_tokens:,} content tokens in {windows.num_chunks:,} chunks; {covered:,} are read, "
        f"{encoded - covered:,} of them more than once; each chunk gets {tokenizer.special.num_tokens} special tokens."
    )


def _bar(start: int, stop: int, num_tokens: int) -> str:
    scale = BAR_WIDTH / max(num_tokens, 1)
    first = min(int(start * scale), BAR_WIDTH - 1)
    last = max(int(np.ceil(stop * scale)), first + 1)
    return "·" * first + "█" * (last - first) + "·" * (BAR_WIDTH - last)


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
