"""Pages: whatever a value is, it is text: no tag, no attribute and nothing invisible comes of it."""

import base64
import hashlib
import re
import unicodedata
from html.parser import HTMLParser
from importlib import resources

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from belt_tasks import pages, report_contents
from belt_tasks.examples import RejectedRows

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</table></style><!--",
    "&lt;b&gt; &amp;",
    "{{ 7 * 7 }} {% raw %}",
    "\x00\x07\x1b[31m",
    "\u202egpj.exe\u2066\u200b",
    "line\nbreak\ttab\rreturn",
    "\ud800 alone",
    "x" * 10_000,
    "",
]
RUN = {
    "run_id": "0123456789abcdef",
    "output_uri": "/data/out",
    "belt_version": "0.1.0",
    "finished_at": "2026-01-02T03:04:05+00:00",
    "num_rejected": 1,
}


def quality(value: str) -> str:
    """The page of rejected rows, of one row."""
    row = {"source_uri": value, "row_index": 7, "doc_id": value, "reason": "text_null", "detail": value}
    rejected = RejectedRows(
        by_reason=pl.DataFrame({"reason": ["text_null"], "len": [1]}),
        by_source=pl.DataFrame({"source_uri": ["file"], "reason": ["text_null"], "len": [1]}),
        rows=pl.DataFrame(
            {name: ["file" if name in {"source_uri", "doc_id", "detail"} else row[name]] for name in row}
        ),
    )
    contents = report_contents.of_quality(RUN, rejected)
    contents["rows"] = [row]  # also what no table could hold
    contents["sources"] = [{"source_uri": value, "reason": "text_null", "len": 1}]
    return pages.render("rejected.html.j2", contents).decode()


class Reader(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_value_is_shown_as_it_is(value):
    found = Reader(quality(value))

    assert found.tags == Reader(quality("x")).tags
    shown = pages.spelt_out(pages.short(value, 80))
    assert shown in found.text
    assert not set(found.text) & set("\x00\x07\x1b\u202e\u2066\u200b\r")


@given(value=st.text(alphabet=st.characters(exclude_categories=[]), max_size=30))
def test_no_value_changes_what_a_page_is_made_of(value):
    page = quality(value)

    assert Reader(page).tags == Reader(quality("x")).tags
    assert pages.spelt_out(value) in Reader(page).text


@given(text=st.text(alphabet=st.characters(exclude_categories=[]), max_size=50))
def test_what_is_spelt_out_can_be_read(text):
    spelt = pages.spelt_out(text)

    kinds = {unicodedata.category(character) for character in spelt if character not in "\n\t"}
    assert not [kind for kind in kinds if kind[0] == "C" or kind in {"Zl", "Zp"}]
    assert spelt.encode().decode("utf-8") == spelt
    assert [line for line in spelt if line in "\n\t"] == [line for line in text if line in "\n\t"]


def test_invisible_characters_are_spelt_as_python_does():
    assert (
        pages.spelt_out("a\x00b\u202ec\U000e0041d\u00e9\N{SNOWMAN}") == "a\\x00b\\u202ec\\U000e0041d\u00e9\N{SNOWMAN}"
    )


@pytest.mark.parametrize(("length", "shown"), [(80, 80), (81, 60), (10_000, 60)])
def test_what_is_long_is_shortened_with_its_length(length, shown):
    text = "".join(chr(ord("a") + i % 26) for i in range(length))

    found = pages.short(text, 80)

    assert found.startswith(text[:shown])
    assert (found == text) == (length <= 80)
    assert (f"{text[-20:]} ({length:,} characters)" in found) == (length > 80)


def test_a_page_may_do_nothing_but_show_itself():
    page = quality("x")

    policy = dict(Reader(page).tags[3][1])["content"]
    style = resources.files("belt_tasks").joinpath("templates/style.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    directives = dict(directive.strip().split(" ", 1) for directive in policy.split(";"))
    assert directives == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert f"<style>{style}</style>" in page
    tags = Reader(page).tags
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "embed", "form", "base"}
    named = [
        value for _, attributes in tags for name, value in attributes if name in {"src", "href", "srcset", "action"}
    ]
    assert set(named) == {"data:,", "index.html"}
    assert not [name for _, attributes in tags for name, _ in attributes if name.startswith("on") or name == "style"]
    assert not re.search(r"url\(|@import|expression", style)


def test_templates_trust_no_value():
    for template in resources.files("belt_tasks").joinpath("templates").iterdir():
        text = template.read_text()
        assert "safe" not in re.findall(r"\|\s*(\w+)", text), template.name
        assert "autoescape" not in text, template.name


def test_every_reason_is_explained():
    assert "The row has no text. An empty text would be accepted." in Reader(quality("x")).text
