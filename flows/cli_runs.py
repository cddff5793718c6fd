"""The command line's group `belt runs`: what is at an output."""

from datetime import timedelta
from typing import Annotated

import typer

from flows.terminal import ListsByDefault, show, user_errors

app = typer.Typer(cls=ListsByDefault, no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def runs(output: Annotated[str, typer.Argument(help="Output of earlier commands; any fsspec URL.")]) -> None:
    """List the runs of OUTPUT: which one readers see, what each did and cost, and which did not finish."""
    with user_errors():
        from belt_tasks import run_list, summaries  # noqa: PLC0415 - imports torch

        show(summaries.runs_summary(run_list.list_runs(output)))


@app.command()
def clean(
    output: Annotated[str, typer.Argument(help="Output of `belt score`; any fsspec URL.")],
    older_than: Annotated[
        float, typer.Option(min=0.0, help="Days; what changed since is left alone.", metavar="<float>")
    ] = 7.0,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove what runs left behind and no table refers to: unfinished runs, and files that the tables have taken in."""
    with user_errors():
        from belt_tasks import clean as cleaning  # noqa: PLC0415 - imports torch
        from belt_tasks import summaries  # noqa: PLC0415 - imports torch

        done = cleaning.clean_up(output, older_than=timedelta(days=older_than), dry_run=dry_run)
        show(summaries.clean_summary(done, dry_run=dry_run))


@app.command()
def check(output: Annotated[str, typer.Argument(help="Output of `belt score`; any fsspec URL.")]) -> None:
    """Read the published tables of OUTPUT, and check every row against its contract."""
    with user_errors():
        from belt_tasks import maintenance, summaries  # noqa: PLC0415 - imports torch

        show(summaries.checks_summary(maintenance.check_tables(output)))
