"""Tell of a labelled corpus that has changed, so that whoever retrains can be started by it."""

from prefect import flow

from belt_tasks.specs import CorpusSpec
from belt_tasks.watch import CorpusVersion
from flows import events, run_names, tasks
from flows.attempt import Seconds, attempt


@flow(name="watch", flow_run_name=run_names.of("corpus_uri"))
def watch(
    corpus_uri: str,
    seen_uri: str,
    corpus: CorpusSpec = CorpusSpec(),
    storage_block: str | None = None,
    time_limit_s: Seconds | None = None,
) -> CorpusVersion:
    """Emit the event `belt.labels` for each new version of a corpus; the files are listed, not read.

    The first version is noted without an event. For each other the event is emitted at least once: a version counts as
    seen after its event was taken. One that comes back is told of again.

    Args:
        corpus_uri: a Parquet file, a directory of them or a glob; any fsspec URL.
        seen_uri: directory in which it is noted which version was seen last.
        corpus: columns and split.
        storage_block: a Prefect Secret block with the options of object stores; None takes those of the environment.
        time_limit_s: seconds after which it ends, to be taken up again by the next attempt; None is no limit.
    """
    with attempt(storage_block, time_limit_s):
        version = tasks.look_at(corpus_uri, seen_uri, corpus)
        if version.is_new:
            if not version.is_first:
                events.announce_labels(version)
            tasks.remember(version)
        return version
