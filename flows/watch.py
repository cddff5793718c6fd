"""Tell of a labelled corpus that has changed, so that whoever retrains can be started by it."""

from uuid import NAMESPACE_URL, uuid5

from prefect import flow
from prefect.events import emit_event
from prefect.events.worker import EventsWorker

from belt_tasks.specs import CorpusSpec
from belt_tasks.watch import CorpusVersion
from flows import tasks
from flows.attempt import Seconds, attempt

LABELS = "belt.labels"


@flow(name="watch", flow_run_name="watch {corpus_uri}")
def watch(
    corpus_uri: str,
    seen_uri: str,
    corpus: CorpusSpec = CorpusSpec(),
    storage_block: str | None = None,
    time_limit_s: Seconds | None = None,
) -> CorpusVersion:
    """Emit the event `belt.labels` for each version of a corpus, the first included; the files are listed, not read.

    It is emitted at least once: a version counts as seen after its event was sent.

    Args:
        corpus_uri: a Parquet file, a directory of them or a glob; any fsspec URL.
        seen_uri: directory in which it is noted which versions were seen.
        corpus: columns and split.
        storage_block: a Prefect Secret block with the options of object stores; None takes those of the environment.
        time_limit_s: seconds after which it ends, to be taken up again by the next attempt; None is no limit.
    """
    with attempt(storage_block, time_limit_s):
        version = tasks.look_at(corpus_uri, seen_uri, corpus)
        if version.is_new:
            emit_event(
                LABELS,
                resource={"prefect.resource.id": f"belt.corpus.{corpus_uri}", "prefect.resource.name": corpus_uri},
                payload={"data_version": version.data_version, "num_files": version.num_files},
                id=uuid5(NAMESPACE_URL, f"{LABELS} {version.seen_uri}"),
            )
            EventsWorker.instance().drain()  # a thread sends it
            tasks.remember(version)
        return version
