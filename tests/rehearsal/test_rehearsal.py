"""Nights on a whole stack: real servers, workers and triggers; whatever is killed, the tables are those of a quiet run.

The tests share the stack and run beside its schedule: a night of its own accord, and a run whose machine is lost at the
beginning, go on while the other tests run, and are looked at in the end.
"""

import itertools
import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID

import polars as pl
import psutil
import pytest
from playwright.sync_api import BrowserContext, Page
from prefect import flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed

from belt_tasks import registry, score_tables, storage
from belt_tasks.score_corpus import score_corpus
from deployments import supervision
from tests.browser import Watch, launched
from tests.conftest import labelled_rows
from tests.integration.fault_runs import assert_same, comparable, entity_tags, finished_objects, read
from tests.rehearsal.rehearsal import BIN, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DEPLOYMENTS = {
    "score/score-nightly": {},
    "score/score-on-demand": {"output_uri": "s3://belt/on-demand"},
    "preview/preview": {},
    "evaluate/evaluate": {},
    "fine-tune/fine-tune": {"spec": {"epochs": 1}},
    "watch/watch-labels": {},
    "maintain/maintenance": {},
}
OUTPUT = "s3://belt/predictions"
SOME_SHARDS = 10
# what Prefect's own pages say in the console whatever they show
PREFECT_SAYS = (
    "Failed to load resource: the server responded with a status of 404",
    "Invalid TaskInputResponse",
    "Schema property with anyOf had a value but could not be associated with a definition",
    "GL Driver Message",
)


@pytest.fixture(scope="module")
def expected(rehearsal, tmp_path_factory) -> pl.DataFrame:
    """The predictions of a run in this process, with neither Prefect nor S3 beneath its tables."""
    from belt_tasks import object_stores

    output = str(tmp_path_factory.mktemp("quiet"))
    object_stores.configure(rehearsal.stack.storage_options)
    score_corpus(rehearsal.site["BELT_CORPUS_URI"], rehearsal.site["BELT_CHECKPOINT_URI"], output)
    object_stores.configure({})
    return comparable(score_tables.read_table(output, "predictions"), "predictions")


@dataclass(kw_only=True)
class Receiver:
    """A web hook's other end, and what it was told."""

    url: str
    told: list[dict[str, Any]] = field(default_factory=list)

    def subjects_of(self, run_name: str) -> list[str]:
        """Of messages that name the run."""
        return [each["subject"] for each in list(self.told) if run_name in each["body"]]


@pytest.fixture(scope="module")
def receiver(rehearsal) -> Iterator[Receiver]:
    """Somebody who wants to be told; the automations are brought up to date for it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Quietly."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with temporary_settings({PREFECT_API_URL: rehearsal.stack.api_url}):
        message = {"subject": "{{subject}}", "body": "{{body}}"}
        CustomWebhookNotificationBlock(name="ops", url=receiver.url, json_data=message).save("ops")
    rehearsal.make("up", BELT_ALERT_BLOCK="custom-webhook/ops", **rehearsal.site)
    yield receiver
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def lost(rehearsal) -> UUID:
    """A run whose process and worker went at once, as with their machine: nobody is left to tell the server."""
    run_id = rehearsal.trigger("preview/preview", output_uri="s3://belt/lost")
    rehearsal.wait(run_id, "Running")
    process, worker = rehearsal.process_of(run_id), rehearsal.service("worker-cpu")
    process.suspend()  # the worker's end must not be the last thing that it tells
    worker.kill()
    process.kill()
    return run_id


def test_everything_listens_to_this_machine_alone_and_secrets_are_for_the_owner(rehearsal):
    supervisor = rehearsal.supervisor()
    listening = {
        connection.laddr.ip
        for process in supervisor.children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    folder = rehearsal.stack.folder

    assert listening == {"127.0.0.1"}
    assert (folder.stat().st_mode | (folder / "stack.json").stat().st_mode) & 0o077 == 0
    told = " ".join(word for process in supervisor.children(recursive=True) for word in process.cmdline())
    assert rehearsal.stack.postgres_password not in told
    assert rehearsal.stack.s3_secret not in told
    assert rehearsal.stack.s3_secret not in rehearsal.logs()


def test_a_stack_that_runs_is_brought_up_to_date_and_nothing_doubles(rehearsal, receiver, lost):  # noqa: ARG001
    deployments = rehearsal.ask(lambda client: client.read_deployments())
    automations = rehearsal.ask(lambda client: client.read_automations())

    assert Counter(each.name for each in deployments) == Counter(
        ["promote", *(name.partition("/")[2] for name in DEPLOYMENTS)]
    )
    assert len({each.name for each in automations}) == len(automations) == 8
    with pytest.raises(AssertionError, match=r"--server-port: the services run with .*, got 1; stop them first"):
        rehearsal.make("up", "--server-port", "1")


def test_each_deployment_runs_when_it_is_triggered(rehearsal, stores, expected):  # noqa: ARG001
    score = rehearsal.trigger("score/score-nightly")
    rehearsal.wait(score, "Completed")
    runs = [rehearsal.trigger(name, **more) for name, more in DEPLOYMENTS.items() if name != "score/score-nightly"]
    for run_id in runs:
        rehearsal.wait(run_id, "Completed")

    assert_same(read("s3://belt/predictions", "predictions"), expected)
    assert_same(read("s3://belt/on-demand", "predictions"), expected)


def by_automation(rehearsal) -> list[FlowRun]:
    """Runs that a trigger made."""
    runs = rehearsal.ask(lambda client: client.read_flow_runs())
    return [run for run in runs if run.created_by is not None and run.created_by.type == "AUTOMATION"]


def kinds(runs: list[FlowRun]) -> Counter[str]:
    """How many are of which flow, once they have begun."""
    return Counter(run.name.partition(" ")[0] for run in runs)


def test_new_labels_start_a_retraining_once_and_its_model_is_promoted(rehearsal, stores):  # noqa: ARG001
    """Two fine-tunings are completed, one by hand and one for the labels: each is followed by a comparison."""
    more = labelled_rows(40, seed=3, most_words=60).with_columns(doc_id="more-" + pl.col("doc_id")).drop("split")
    storage.write_parquet("s3://belt/labelled/part-1.parquet", more.to_arrow())
    rehearsal.wait(rehearsal.trigger("watch/watch-labels"), "Completed")
    found: list[FlowRun] = []

    def all_ended() -> bool:
        found[:] = by_automation(rehearsal)
        return len(found) >= 3 and all(run.state.is_final() for run in found)

    wait_until(all_ended, lambda: f"{found}\n{rehearsal.logs()}")
    assert kinds(found) == {"fine-tune": 1, "promote": 2}
    assert {run.state.name for run in found} == {"Completed"}
    champion = registry.aliases(registry.history("s3://belt/models/registry"))["champion"]
    assert champion.why


def of_run(run_id: UUID) -> ArtifactFilter:
    """Artifacts of a run."""
    return ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))


@pytest.fixture
def pages(rehearsal) -> Iterator[BrowserContext]:
    """Prefect's UI, in a browser."""
    with launched() as browser, browser.new_context(base_url=rehearsal.stack.api_url.removesuffix("/api")) as context:
        yield context


def opened(pages: BrowserContext, path: str, *, shows: str) -> tuple[Page, Watch]:
    """A page of Prefect's, once it shows some words."""
    page = pages.new_page()
    watch = Watch(page, may_ask=("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:"), may_say=PREFECT_SAYS)
    page.goto(path)
    page.get_by_text(shows).first.wait_for()
    return page, watch


@pytest.mark.browser
def test_prefects_pages_show_runs_by_name_their_progress_and_the_way_to_the_report(rehearsal, pages, tmp_path):
    runs = [rehearsal.run(run_id) for run_id in rehearsal.run_ids]
    nightly = next(run for run in runs if run.name.startswith("score") and run.parameters["output_uri"] == OUTPUT)
    assert nightly.name == f"score s3://belt/corpus {nightly.expected_start_time:%Y-%m-%d %H:%M} UTC"
    made = rehearsal.ask(lambda client: client.read_artifacts(artifact_filter=of_run(nightly.id)))
    found = {each.key: each for each in made}
    assert found.keys() == {"score-progress", "score-summary"}
    summary, progress = (f"/artifacts/artifact/{found[f'score-{kind}'].id}" for kind in ("summary", "progress"))
    shown = [
        opened(pages, path, shows=words)
        for path, words in (
            ("/dashboard", "Flow Runs"),
            ("/runs", nightly.name),
            (f"/runs/flow-run/{nightly.id}", "planned: 60 shards"),  # in the log
            ("/deployments", "score-nightly"),
            (f"/deployments/deployment/{nightly.deployment_id}/run", "a Parquet file, a directory of them or a glob"),
            ("/automations", "belt: a run that crashed goes on"),
            (progress, "719 of 719 documents"),
            (summary, "rejected rows"),
        )
    ]
    for number, (page, watch) in enumerate(shown):
        page.screenshot(path=tmp_path / f"{number}.png")
        assert watch.said == [], page.url

    summary_page = shown[-1][0]
    with summary_page.expect_popup() as report:
        summary_page.get_by_role("link", name="open").first.click()
    assert report.value.locator("h1").inner_text().startswith("Scoring run ")


def test_wrong_parameters_are_refused_by_the_command_line(rehearsal):
    with pytest.raises(AssertionError, match="device"):
        rehearsal.trigger("score/score-on-demand", spec={"device": "tpu"})


@pytest.mark.parametrize(
    ("phase", "victim"),
    [
        ("scoring", "flow"),
        ("scoring", "worker-gpu"),
        ("scoring", "postgres"),
        ("publishing", "flow"),
        ("publishing", "server"),
    ],
)
def test_a_night_ends_with_the_same_table_whatever_is_killed(rehearsal, stores, expected, victim, phase):  # noqa: ARG001
    output = f"s3://belt/{victim}-{phase}"
    run_id = rehearsal.trigger("score/score-on-demand", output_uri=output)

    def has_come_so_far() -> bool:
        there = entity_tags(output)
        if phase == "publishing":
            return any(path.endswith("manifest.json") for path in there)
        return sum("/receipts/" in path for path in there) >= SOME_SHARDS

    wait_until(has_come_so_far, rehearsal.logs)
    done = finished_objects(output)
    rehearsal.victim(victim, run_id).kill()
    run = rehearsal.wait(run_id, "Completed")

    now = entity_tags(output)
    assert {path: now[path] for path in done} == done
    assert_same(read(output, "predictions"), expected)
    names = [state.name for state in rehearsal.states(run_id)]
    # taken up once for each crash; a busy worker tells of one twice, the second time before the next attempt begins
    assert names.count("Crashed") == names.count("AwaitingRetry") >= run.run_count - 1
    if victim == "flow":
        assert run.run_count == 2


def test_a_cancelled_night_stops_and_another_goes_on_from_it(rehearsal, stores, expected):  # noqa: ARG001
    output = "s3://belt/cancelled"
    run_id = rehearsal.trigger("score/score-on-demand", output_uri=output)
    wait_until(lambda: sum("/receipts/" in path for path in entity_tags(output)) >= SOME_SHARDS, rehearsal.logs)
    process = rehearsal.process_of(run_id)

    asked_at = datetime.now(UTC)
    rehearsal.command(BIN / "prefect", "--no-prompt", "flow-run", "cancel", str(run_id))
    rehearsal.wait(run_id, "Cancelled")
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    print(f"cancelled after {(datetime.now(UTC) - asked_at).total_seconds():.1f} s")  # noqa: T201 - the figure that matters
    assert "predictions" not in {path.partition("/")[0] for path in entity_tags(output)}

    done = finished_objects(output)
    again = rehearsal.trigger("score/score-on-demand", output_uri=output)
    rehearsal.wait(again, "Completed")

    now = entity_tags(output)
    assert {path: now[path] for path in done} == done
    assert_same(read(output, "predictions"), expected)


def test_a_night_on_ray_is_one_by_threads(rehearsal, stores, expected):  # noqa: ARG001
    output = "s3://belt/on-ray"
    ray = {"num_workers": 2, "start_timeout_s": 600}
    run_id = rehearsal.trigger("score/score-on-demand", output_uri=output, runner="ray", ray=ray)
    rehearsal.wait(run_id, "Completed")

    assert_same(read(output, "predictions"), expected)


def test_who_wants_to_be_told_is_told_once_of_a_run_that_failed(rehearsal, receiver):
    run_id = rehearsal.trigger("score/score-on-demand", corpus_uri="s3://belt/nowhere", output_uri="s3://belt/none")
    run = rehearsal.wait(run_id, "Failed")

    wait_until(lambda: receiver.subjects_of(run.name))
    assert receiver.subjects_of(run.name) == ["belt: score is Failed"]
    assert "s3://belt/nowhere" in next(each["body"] for each in receiver.told if run.name in each["body"])


def test_who_wants_to_be_told_is_told_of_a_run_that_nobody_takes(rehearsal, receiver):
    with supervision.supervised(rehearsal.stack) as supervisor:
        supervisor.stopProcess("worker-cpu")
    run_id = rehearsal.trigger("preview/preview")
    run = rehearsal.wait(run_id, "Late")
    wait_until(lambda: receiver.subjects_of(run.name))
    with supervision.supervised(rehearsal.stack) as supervisor:
        supervisor.startProcess("worker-cpu")

    assert receiver.subjects_of(run.name) == ["belt: preview is Late"]
    rehearsal.wait(run_id, "Completed")


def test_who_wants_to_be_told_is_told_of_a_run_whose_process_never_begins(rehearsal, receiver):
    """As with a library that is missing: belt itself, which counts its attempts, has no part in it."""

    @flow(name="preview")
    def begins_nowhere() -> None:
        """It has no pool: nobody takes its runs."""

    with temporary_settings({PREFECT_API_URL: rehearsal.stack.api_url}):
        deployment_id = begins_nowhere.to_deployment("nowhere", tags=["belt"]).apply()
    run = rehearsal.ask(lambda client: client.create_flow_run_from_deployment(deployment_id, tags=["belt"]))
    for _ in range(3):
        rehearsal.ask(lambda client: client.set_flow_run_state(run.id, Crashed(), force=True))
        wait_until(lambda: rehearsal.run(run.id).state.name != "Crashed", rehearsal.logs)

    wait_until(lambda: receiver.subjects_of(run.name), rehearsal.logs, patience_s=120)
    assert receiver.subjects_of(run.name) == ["belt: preview crashes again and again"]
    rehearsal.ask(lambda client: client.delete_flow_run(run.id))
    rehearsal.ask(lambda client: client.delete_deployment(deployment_id))


def test_a_run_whose_machine_was_lost_is_noticed_and_goes_on(rehearsal, lost):
    run = rehearsal.wait(lost, "Completed")

    assert run.run_count == 2
    assert [state.name for state in rehearsal.states(lost)].count("AwaitingRetry") == 1


def test_a_night_comes_of_its_own_accord(rehearsal, night):
    found: list[Any] = []

    def is_there() -> bool:
        runs = rehearsal.ask(lambda client: client.read_flow_runs())
        found[:] = [each for each in runs if each.auto_scheduled and each.expected_start_time == night]
        return bool(found) and found[0].state.name == "Completed"

    wait_until(is_there, lambda: f"{found}\n{rehearsal.logs()}")


def test_the_gpu_holds_one_model_at_a_time(rehearsal):
    busy = []
    for run in rehearsal.ask(lambda client: client.read_flow_runs()):
        states = rehearsal.states(run.id) if run.work_pool_name == "gpu" else []
        busy += [
            (state.timestamp, after.timestamp, run.name)
            for state, after in itertools.pairwise(states)
            if state.name == "Running"
        ]
    busy.sort()

    assert len(busy) > len(DEPLOYMENTS)
    for (_, end, _), (start, _, _) in itertools.pairwise(busy):
        assert end <= start


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_stopped_and_started_again_nothing_is_lost(rehearsal, stores, expected, how):  # noqa: ARG001
    """Also where what supervises all is killed, and where the first attempt to start again is interrupted."""
    output = f"s3://belt/{how}"
    run_id = rehearsal.trigger("score/score-on-demand", output_uri=output)
    wait_until(lambda: sum("/receipts/" in path for path in entity_tags(output)) >= SOME_SHARDS, rehearsal.logs)
    supervisor = rehearsal.supervisor()
    processes = [supervisor, *supervisor.children(recursive=True)]

    if how == "killed":
        supervisor.kill()
    rehearsal.make("down")
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []
    with rehearsal.started("up", **rehearsal.site) as interrupted:
        wait_until(lambda: supervision.runs(rehearsal.stack))
        interrupted.send_signal(signal.SIGINT)
        assert interrupted.wait(60) == 128 + signal.SIGINT
    rehearsal.make("up", **rehearsal.site)
    rehearsal.wait(run_id, "Completed")

    assert_same(read(output, "predictions"), expected)
    assert_same(read("s3://belt/predictions", "predictions"), expected)


def test_drift_starts_a_retraining_once(rehearsal, stores):  # noqa: ARG001
    """The last of all: the main output is of another corpus after it."""
    before = {run.id for run in by_automation(rehearsal)}
    drifted = labelled_rows(240, seed=7, most_words=600)
    storage.write_parquet("s3://belt/drifted/part-0.parquet", drifted.to_arrow())
    found: list[FlowRun] = []

    def followed() -> bool:
        found[:] = [run for run in by_automation(rehearsal) if run.id not in before]
        return len(found) >= 2 and all(run.state.is_final() for run in found)

    for _ in range(2):
        run_id = rehearsal.trigger("score/score-nightly", corpus_uri="s3://belt/drifted")
        rehearsal.wait(run_id, "Completed")
        wait_until(followed, lambda: f"{found}\n{rehearsal.logs()}")

    told = rehearsal.ask(lambda client: client.read_artifacts(artifact_filter=of_run(run_id)))
    assert any("Drift: " in each.data for each in told if each.type == "markdown")
    assert kinds(found) == {"fine-tune": 1, "promote": 1}
    assert {run.state.name for run in found} == {"Completed"}


def test_what_has_ended_is_never_started_again(rehearsal):
    """Whatever reached the server after the end, such as a sign of life that was late."""
    ended = 0
    for run in rehearsal.ask(lambda client: client.read_flow_runs(limit=200)):
        names = [state.name for state in rehearsal.states(run.id)]
        finals = [name for name in names if name in ("Completed", "Failed", "Cancelled")]
        ended += len(finals)
        assert len(finals) <= 1, (run.name, names)
        assert not finals or names[-1] == finals[0], (run.name, names)

    assert ended > 2 * len(DEPLOYMENTS)
