"""Pages: HTML that what a document contains can neither break nor bring to life.

Every value is escaped; nothing but belt's own style sheet is trusted. What cannot be seen, such as direction marks and
control characters, is spelt out, and what is long is shortened. A page has no script, asks for nothing beside itself,
and its own policy forbids the browser both.
"""

import base64
import hashlib
import unicodedata
from datetime import datetime
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from belt_tasks.drift import QUANTITIES, STATISTICS, Measure

INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}  # Unicode categories: control, direction, private, ...
ELLIPSIS = "\u2026"
TAIL = 20  # characters kept of the end of what is shortened
SMALLEST_P = 1e-4


def render(name: str, values: dict[str, Any]) -> bytes:
    """A page as UTF-8.

    Args:
        name: of its template.
        values: what the template shows; strings may hold anything.
    """
    style = resources.files("belt_tasks").joinpath("templates/style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    page = _environment().get_template(name).render(values, style=Markup(style), policy=policy)  # noqa: S704 - belt's own
    return page.encode()


def data_url(png: bytes) -> str:
    """A picture within a page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def spelt_out(text: str) -> str:
    """The same with the code point of what cannot be seen, as Python writes it; line breaks and tabs stay."""
    return "".join(_spelt(character) for character in text)


def short(text: str, most: int) -> str:
    """A text that is too long, as its beginning and end with its length."""
    if len(text) <= most:
        return text
    head, tail = text[: most - TAIL], text[-TAIL:]
    return f"{head} {ELLIPSIS} {tail} ({len(text):,} characters)"


def _spelt(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in INVISIBLE:
        return character
    return character.encode("ascii", "backslashreplace").decode() if character > "\x7f" else f"\\x{ord(character):02x}"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("belt_tasks", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "count": _count,
        "decimal": lambda value: "" if value is None else f"{value:.4f}",
        "outcome": _outcome,
        "p_value": _p_value,
        "quantity": lambda quantity: QUANTITIES[quantity],
        "seconds": lambda value: f"{value:,.1f}",
        "share": lambda value: "" if value is None else f"{value:.1%}",
        "short": short,
        "statistic": lambda statistic: STATISTICS[statistic],
        "tone": lambda measure: "failed" if measure.passed is False else "",
        "time": lambda text: f"{datetime.fromisoformat(text):%d %B %Y, %H:%M:%S} UTC",
    }
    return environment


def _shown(value: Any) -> Any:  # noqa: ANN401 - whatever a template shows
    return spelt_out(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _p_value(value: float | None) -> str:
    if value is None:
        return ""
    return f"below {SMALLEST_P}" if value < SMALLEST_P else f"{value:.4f}"


def _outcome(measure: Measure) -> str:
    if measure.value is None:
        return "not known"
    if measure.passed is None:
        return "no verdict"
    if not measure.passed:
        return "drifted"
    return "within the limit" if measure.value <= measure.limit else "may be chance"
