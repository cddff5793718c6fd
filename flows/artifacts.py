"""Artifacts: what people see of a flow run on its page, beside its log."""

import base64
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from belt_tasks import storage, summaries
from belt_tasks.errors import BeltError, ConfigError, RejectedError
from belt_tasks.report import ScoreReport

log = logging.getLogger(__name__)


class LinkSettings(BaseSettings):
    """Whether pages in an object store can be opened from a summary; read from the environment."""

    model_config = SettingsConfigDict(env_prefix="BELT_", env_ignore_empty=True, extra="ignore")

    report_link_hours: int | None = Field(None, ge=1, le=168)
    """Hours for which the links to the report in a run's summary work, for whoever sees it; None has no such links."""


def read_link_settings() -> LinkSettings:
    """What the environment says.

    Raises:
        ConfigError: it is wrong.
    """
    try:
        return LinkSettings()
    except ValidationError as error:
        (first,) = error.errors()
        raise ConfigError(f"BELT_REPORT_LINK_HOURS: {first['msg']}, got {first['input']!r}") from error


def show(key: str, markdown: str) -> None:
    """Make an artifact of the present run, in a series of its kind.

    Args:
        key: of the series: lowercase letters, digits and hyphens.
        markdown: what it shows.
    """
    create_markdown_artifact(markdown, key=key, description=flow_run.get_name())


def show_picture(key: str, what: str, uri: str) -> None:
    """Make an artifact of a picture, which is copied into it: who sees the run's page need not see the store.

    Args:
        key: see `show`.
        what: of the picture, in words.
        uri: a small PNG.
    """
    data = base64.b64encode(storage.read_bytes(uri)).decode()
    show(key, f"![{what}](data:image/png;base64,{data})\n\n`{uri}`\n")


def report_links(report: ScoreReport | None, settings: LinkSettings) -> dict[str, str]:
    """Signed addresses, by URI, of those pages of a report that are in an object store.

    One that signs nothing is a warning: no run fails for it.
    """
    return {} if report is None else _signed([report.report_uri, report.quality_uri], settings)


@contextmanager
def refusal() -> Iterator[LinkSettings]:
    """Show where the rejected rows are of a run that is refused for them.

    Raises:
        ConfigError: the environment's settings of links are wrong; nothing was done.
    """
    settings = read_link_settings()
    try:
        yield settings
    except RejectedError as error:
        links = _signed([error.quality_uri], settings)
        show("score-refused", summaries.refusal_summary(error, links=links))
        raise


def _signed(uris: Sequence[str], settings: LinkSettings) -> dict[str, str]:
    if settings.report_link_hours is None:
        return {}
    valid_for = timedelta(hours=settings.report_link_hours)
    try:
        signed = {uri: storage.signed_url(uri, valid_for) for uri in uris}
    except BeltError as error:
        log.warning("the report cannot be opened from the summary: %s", error)
        return {}
    return {uri: url for uri, url in signed.items() if url is not None}
