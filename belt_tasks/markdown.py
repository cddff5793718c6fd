"""Markdown of summaries: tables, links, and words of others that are no markup."""

import re
from collections.abc import Mapping
from urllib.parse import quote

from belt_tasks import pages
from belt_tasks.receipts import in_words

MOST_CHARACTERS = 80  # of a label


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; `|` in a cell is escaped, and a line break becomes a space."""
    shown = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *shown]]


def said(words: str) -> str:
    """What others wrote, such as labels, in one line of Markdown that is neither markup nor a tag."""
    return re.sub(r"([\\`<\[\]])", r"\\\1", " ".join(pages.spelt_out(words).split()))


def label(name: str) -> str:
    """A label that others chose, cut where it is long."""
    return said(pages.short(name, MOST_CHARACTERS))


def rejected(count: int, by_reason: dict[str, int]) -> str:
    """How many rows were put aside, and why."""
    return f"{count:,} ({in_words(by_reason)})" if count else "0"


def seconds(duration: float) -> str:
    """In tenths."""
    return f"{duration:,.1f} s"


def number(value: float | None) -> str:
    """With four decimals; nothing of None."""
    return "" if value is None else f"{value:.4f}"


def link(uri: str, links: Mapping[str, str] | None = None) -> str:
    """A place to copy, and to click on where something can open it: an address that is known, or a local file."""
    address = (links or {}).get(uri)
    if address is None and "://" not in uri:
        address = f"file://{quote(uri)}"
    return f"`{uri}`" if address is None else f"`{uri}` ([open]({address}))"


def count(whole: int) -> str:
    """With commas."""
    return f"{whole:,}"
