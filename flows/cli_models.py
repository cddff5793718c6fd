"""The command line's group `belt models`: what is in a registry of models."""

import getpass
import os
from typing import Annotated

import typer

from flows.options import Who, WrongUsageError
from flows.terminal import ListsByDefault, show, user_errors

app = typer.Typer(cls=ListsByDefault, no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def models(registry: Annotated[str, typer.Argument(help="Registry of `belt promote`; any fsspec URL.")]) -> None:
    """List the models of REGISTRY: which is the champion, where each is from, who moved which alias, and why."""
    with user_errors():
        from belt_tasks import model_store, model_summaries  # noqa: PLC0415 - imports torch

        show(model_summaries.models_summary(model_store.list_models(registry)))


@app.command("rollback")
def roll_back_model(
    registry: Annotated[str, typer.Argument(help="Registry of `belt promote`; any fsspec URL.")],
    alias: Annotated[str, typer.Option(help="What to move.", metavar="<str>")] = "champion",
    why: Annotated[str, typer.Option(help="Stands in the history.", metavar="<str>")] = "rolled back",
    who: Who = None,
) -> None:
    """Move the champion back to the checkpoint that it was before, by one entry of the history; twice undoes itself."""
    with user_errors():
        from belt_tasks import model_summaries  # noqa: PLC0415 - imports torch
        from belt_tasks import registry as models_of  # noqa: PLC0415 - takes a moment

        show(model_summaries.alias_summary(models_of.roll_back(registry, alias, who=name_of(who), why=why)))


@app.command("assign")
def assign_model(
    registry: Annotated[str, typer.Argument(help="Registry of `belt promote`; any fsspec URL.")],
    digest: Annotated[str, typer.Argument(help="Of a checkpoint that `belt models` lists, in full.")],
    why: Annotated[str, typer.Option(help="Stands in the history.", metavar="<str>")],
    alias: Annotated[str, typer.Option(help="What to move.", metavar="<str>")] = "champion",
    who: Who = None,
) -> None:
    """Move the champion, or another alias, to a checkpoint of REGISTRY, whatever the gate said of it."""
    with user_errors():
        from belt_tasks import model_summaries  # noqa: PLC0415 - imports torch
        from belt_tasks import registry as models_of  # noqa: PLC0415 - takes a moment

        show(model_summaries.alias_summary(models_of.put_alias(registry, alias, digest, who=name_of(who), why=why)))


def name_of(given: str | None) -> str:
    """Whom the history of a registry names."""
    if given is not None:
        return given
    try:
        return os.environ.get("BELT_USER") or getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        raise WrongUsageError("--who: this system's user has no name; say who you are, or set BELT_USER") from None
