"""A whole belt on one machine, without containers or system packages: `make up`, `make down`.

    python -m deployments.stack up        start all services, deploy everything, and say where they are
    python -m deployments.stack down      stop them; what they keep stays
    python -m deployments.stack status    say how each of them does
    python -m deployments.stack env       print what a shell needs to speak with them; contains secrets

supervisord keeps the services running: one that ends is started again, and waits for those that it needs.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from belt_tasks.errors import BeltError, ConfigError
from deployments import supervision
from deployments.services import BUCKET, HOST, SERVICES, Stack, make_bucket, wait_until

ROOT = Path(__file__).parents[1]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A whole belt, locally.",
)
Folder = Annotated[Path, typer.Option("--folder", envvar="BELT_STACK", help="For everything that the services keep.")]
HOME = ROOT / ".belt" / "stack"


@app.command()
def up(
    folder: Folder = HOME,
    server_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Of Prefect; 4200 if it is free.")] = None,
    s3_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Of the object store; 8333 if free.")] = None,
    postgres_port: Annotated[int | None, typer.Option(min=1, max=65535, help="5433 if it is free.")] = None,
    late_after_s: Annotated[int | None, typer.Option(min=1, help="A run that has waited so long is late; 900.")] = None,
) -> None:
    """Start all services, deploy everything, and say where they are; those that run already go on."""
    asked = {"server_port": server_port, "s3_port": s3_port, "postgres_port": postgres_port}
    asked["late_after_s"] = late_after_s
    chosen = {name: value for name, value in asked.items() if value is not None}
    folder = folder.resolve()
    try:
        with _one_at_a_time(folder):
            stack = _bring_up(folder, chosen)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. What was started runs on: `make up` goes on, `make down` stops it.", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    of_folder = "" if folder == HOME else f" --folder {shlex.quote(str(folder))}"
    typer.echo(
        f"\nPrefect: http://{HOST}:{stack.server_port}\n"
        f"S3:      {stack.s3_url}, bucket s3://{BUCKET}/\n"
        f"Logs:    {stack.folder / 'logs'}\n\n"
        f'In a shell: eval "$({shlex.quote(sys.executable)} -m deployments.stack env{of_folder})"'
    )


def _bring_up(folder: Path, chosen: dict[str, int]) -> Stack:
    if chosen and (folder / "stack.json").exists():
        _check_unchanged(Stack.at(folder), chosen)
    stack = Stack.make(folder, **chosen)
    if not supervision.runs(stack):
        supervision.end_leftovers(stack)
        supervision.check_ports(stack)
        _started_file(stack).write_text(datetime.now(UTC).isoformat(), encoding="ascii")
        supervision.start(stack)
    for name in SERVICES:
        typer.echo(f"{name} ...", nl=False)
        supervision.wait_for(stack, name)
        typer.echo(" runs")
    make_bucket(BUCKET, endpoint=stack.s3_url, key=stack.s3_key, secret=stack.s3_secret)
    _deploy(stack)
    if _started_file(stack).exists():  # also where the `up` that started all was interrupted
        _take_up(stack, before=datetime.fromisoformat(_started_file(stack).read_text(encoding="ascii")))
        _started_file(stack).unlink()
    return stack


def _started_file(stack: Stack) -> Path:
    """When everything was started, until the runs that were under way before go on."""
    return stack.folder / "started-at"


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Nobody else starts or stops the services of a folder within the block."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            typer.echo("Another `make up` or `make down` is under way; waiting for its end ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_unchanged(stack: Stack, chosen: dict[str, int]) -> None:
    """See that services which run are not asked to be elsewhere.

    Raises:
        ConfigError: they are.
    """
    for name, value in chosen.items():
        kept = getattr(stack, name)
        if kept != value and supervision.runs(stack):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: the services run with {kept}, got {value}; stop them first (`make down`)")


@app.command()
def down(folder: Folder = HOME) -> None:
    """Stop all services; what they keep stays, and runs under way go on after the next `up`."""
    stack = Stack.at(folder.resolve())
    with _one_at_a_time(stack.folder):
        if not supervision.stop(stack):
            typer.echo("Nothing runs.")
            return
    typer.echo(f"Stopped. What it keeps is in {stack.folder}.")


@app.command()
def status(folder: Folder = HOME) -> None:
    """Say how each service does; the exit code is 1 where one does not do its work."""
    stack = Stack.at(folder.resolve())
    all_serve = True
    with supervision.supervised(stack) as supervisor:
        for name in SERVICES:
            state = "STOPPED" if supervisor is None else supervisor.getProcessInfo(name)["statename"]
            problem = "does not answer" if supervisor is None else supervision.problem_of(stack, name, supervisor)
            all_serve = all_serve and problem is None
            typer.echo(f"{name:12} {state:10} {problem or 'answers'}")
    raise typer.Exit(0 if all_serve else 1)


@app.command()
def env(folder: Folder = HOME) -> None:
    """Print what a shell needs to speak with the services; contains secrets."""
    stack = Stack.at(folder.resolve())
    options = stack.storage_options["s3"]
    keys = {
        "AWS_ENDPOINT_URL": options["endpoint_url"],
        "AWS_ACCESS_KEY_ID": options["key"],
        "AWS_SECRET_ACCESS_KEY": options["secret"],
        "AWS_REGION": options["region_name"],
        "AWS_ALLOW_HTTP": "true",  # Delta Lake's readers ask for it
    }
    for name, value in (stack.environment | keys).items():
        typer.echo(f"export {name}={shlex.quote(value)}")
    typer.echo(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')  # belt and prefect


@app.command(hidden=True)
def run(name: str, folder: Folder = HOME) -> None:
    """Become a service, once those that it needs answer: what supervisord starts."""
    stack = Stack.at(folder.resolve())
    service = SERVICES[name](stack)
    for needed in service.needs:
        wait_until(f"{name}: {needed} did not answer", SERVICES[needed](stack).answers)
    service.prepare()
    os.environ.update(service.environment | {supervision.MARK: str(stack.folder)})
    supervision.end_with_parent(signal.Signals[f"SIG{service.stop_signal}"])
    os.execvp(service.command[0], service.command)  # noqa: S606 - one of our own


def _deploy(stack: Stack) -> None:
    """Run `belt deploy`; what the environment says of the site stands, the rest is an example in the object store."""
    site = {name: value for name, value in os.environ.items() if name.startswith("BELT_")}
    if not _required() <= site.keys():
        typer.echo("writing an example corpus ...", nl=False)
        site = _write_example(stack) | site
        typer.echo(" done")
    site = {"BELT_STORAGE_OPTIONS": json.dumps(stack.storage_options)} | site
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "deploy"],
        env=os.environ | stack.environment | site,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BeltError(done.stderr.strip().removeprefix("Error: "))
    typer.echo(done.stdout.strip())


def _take_up(stack: Stack, *, before: datetime) -> None:
    """Let runs go on that were under way when the stack stopped: all that worked on them ended with it."""
    from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: PLC0415 - services do without

    from flows.deploy import take_up  # noqa: PLC0415 - as above

    with temporary_settings({PREFECT_API_URL: stack.api_url}):
        for name in take_up(before):
            typer.echo(f"{name} goes on.")


def _required() -> set[str]:
    """Variables that a site must set."""
    from flows.deploy import DeploySettings  # noqa: PLC0415 - imports Prefect, which services do without

    fields = DeploySettings.model_fields.items()
    return {f"BELT_{name.upper()}" for name, field in fields if field.is_required()}


def _write_example(stack: Stack) -> dict[str, str]:
    """Put the demo's corpus into the object store, where it is not there yet; returns the site's settings for it."""
    from belt_tasks import demo, object_stores, storage  # noqa: PLC0415 - imports torch

    object_stores.configure(stack.storage_options)
    corpus_uri, labelled_uri, held_out_uri = (f"s3://{BUCKET}/{name}" for name in ("corpus", "labelled", "held-out"))
    if not storage.exists(f"{held_out_uri}/part-0.parquet"):  # the last that is written
        demo.write_demo_corpus(corpus_uri, demo.DEMO_CORPUS_SPEC)
        demo.copy_splits(corpus_uri, train_uri=labelled_uri, test_uri=held_out_uri)
    return {
        "BELT_CORPUS_URI": corpus_uri,
        "BELT_LABELLED_URI": labelled_uri,
        "BELT_HELD_OUT_URI": held_out_uri,
        "BELT_OUTPUT_URI": f"s3://{BUCKET}/predictions",
        "BELT_MODELS_URI": f"s3://{BUCKET}/models",
        "BELT_ENCODER": str(demo.demo_encoder()),
    }


def main() -> None:
    """Entry point."""
    try:
        app()
    except BeltError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
