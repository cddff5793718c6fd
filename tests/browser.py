"""A real browser without a window: the machine's own Chromium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "chromium")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def launched() -> Iterator[Browser]:
    """The browser, until the end of the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


class Watch:
    """What a page did that it should not have.

    Args:
        page: to watch, before it goes anywhere.
        may_ask: beginnings of the addresses that it may ask for.
        may_say: parts of what it may say in the console.
    """

    def __init__(
        self, page: Page, *, may_ask: tuple[str, ...] = ("data:", "file:"), may_say: tuple[str, ...] = ()
    ) -> None:
        self.said: list[str] = []
        self._may_ask, self._may_say = may_ask, may_say
        page.on("console", lambda message: self._console(message.text))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("request", self._request)
        page.on("dialog", self._dialog)

    def _console(self, text: str) -> None:
        if not any(part in text for part in self._may_say):
            self.said.append(f"console: {text}")

    def _request(self, request) -> None:
        if not request.url.startswith(self._may_ask):
            self.said.append(f"request: {request.url}")

    def _dialog(self, dialog) -> None:
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()
