"""The terminal: how a command tells what it does, what it did and what is wrong, in words and by its exit code."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import rich.markdown
import typer
from rich.console import Console
from typer.core import TyperGroup

from belt_tasks import logs, progress
from belt_tasks.errors import BeltError
from flows.local_server import local_server
from flows.options import WrongUsageError
from flows.progress_bars import ProgressBars

GO_ON = "Finished shards, if any, are kept; run the same command again to go on."
console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True, highlight=False)
log = logging.getLogger(__name__)


class ListsByDefault(TyperGroup):
    """`belt runs OUTPUT` lists, so that the commonest of its commands needs no name."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """As of every group, after `list` where no command is named."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@contextmanager
def user_errors() -> Iterator[None]:
    """Say what is wrong in words, and leave with the right exit code."""
    try:
        yield
    except WrongUsageError as error:
        for line in str(error).split("\n"):
            complain(line)
        raise typer.Exit(2) from None
    except BeltError as error:
        complain(str(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends within seconds, in order
        _tell_end(f"Interrupted. {GO_ON}")
        raise typer.Exit(128 + signal.SIGINT) from None
    except SystemExit as error:
        if error.code in (128 + signal.SIGTERM, 128 + signal.SIGHUP):
            with suppress(OSError):  # the terminal may be gone
                _tell_end(f"Terminated. {GO_ON}")
        raise


def complain(message: str) -> None:
    """Say what is wrong."""
    if logs.writes_json():
        log.error(message)
        return
    errors.print("[red]Error:[/red]", end=" ")
    errors.print(message, markup=False)


@contextmanager
def running() -> Iterator[None]:
    """A Prefect server to run against; progress bars on a terminal, a line now and then elsewhere, or the log."""
    if logs.writes_json():
        with local_server():
            yield
        return
    with local_server(), ProgressBars(errors) as bars, progress.listen(bars.advance, bars.say):
        yield


def show(*summaries: str) -> None:
    """Rendered on a terminal, plain Markdown elsewhere, where long paths must stay in one piece."""
    for summary in summaries:
        console.print(rich.markdown.Markdown(summary) if console.is_terminal else summary, markup=False)


def _tell_end(words: str) -> None:
    if logs.writes_json():
        log.warning(words)
    else:
        errors.print(words)
