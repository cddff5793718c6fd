"""deployments/ on a Prefect server: deployed twice, nothing doubles, and mistakes are named before anything is made."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.schemas.objects import State
from prefect.states import Cancelling, Completed, Pending, Running

from belt_tasks.errors import ConfigError
from flows.deploy import DeploySettings, automations, deploy, is_same, read_settings, take_up

BIN = Path(sys.executable).parent
DEPLOYMENTS = {
    "score/score-nightly",
    "score/score-on-demand",
    "preview/preview",
    "evaluate/evaluate",
    "fine-tune/fine-tune",
    "promote/promote",
    "watch/watch-labels",
    "maintain/maintenance",
}
OURS = {"belt: a run that crashed goes on", "belt: a run whose process is gone goes on"}


@pytest.fixture(scope="module")
def site(labelled_corpus, tiny_checkpoint, tiny_encoder, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("site")
    return {
        "BELT_CORPUS_URI": labelled_corpus,
        "BELT_CHECKPOINT_URI": tiny_checkpoint,
        "BELT_OUTPUT_URI": str(root / "predictions"),
        "BELT_LABELLED_URI": labelled_corpus,
        "BELT_HELD_OUT_URI": labelled_corpus,
        "BELT_ENCODER": str(tiny_encoder),
        "BELT_MODELS_URI": str(root / "models"),
        "BELT_CRON": "30 3 * * 1-5",
        "BELT_TIMEZONE": "Europe/Warsaw",
    }


def command(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BELT_")} | more
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=250)


@pytest.fixture(scope="module")
def deployed(site, prefect_server) -> dict[str, str]:
    """The server after `belt deploy`, twice."""
    for _ in range(2):
        done = command(str(BIN / "belt"), "deploy", **site)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith(f"to {prefect_server}.")
    return site


def test_deployed_twice_everything_is_there_once(deployed, client):
    tagged = [each for each in client.read_deployments() if "belt" in each.tags]  # other tests have theirs
    found = {f"{client.read_flow(each.flow_id).name}/{each.name}": each for each in tagged}
    assert found.keys() == DEPLOYMENTS
    nightly = found["score/score-nightly"]
    assert nightly.parameters == {
        "corpus_uri": deployed["BELT_CORPUS_URI"],
        "checkpoint_uri": deployed["BELT_CHECKPOINT_URI"],
        "output_uri": deployed["BELT_OUTPUT_URI"],
        "storage_block": "belt-storage",
        "time_limit_s": 36000,
    }
    (schedule,) = nightly.schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone) == ("30 3 * * 1-5", "Europe/Warsaw")
    assert nightly.global_concurrency_limit.limit == 1
    assert nightly.concurrency_options.collision_strategy == "CANCEL_NEW"
    for each in found.values():
        assert each.tags == ["belt"]
        assert each.description
        assert each.enforce_parameter_schema
        assert "{{" not in str(each.parameters)
    assert sorted(each.name for each in client.read_automations()) == [
        "belt: a run that crashed goes on",
        "belt: a run whose process is gone goes on",
        "belt: fine-tuned, so promote",
        "belt: new labels, so fine-tune",
        "belt: scores drift, so fine-tune",
    ]
    assert Secret.load("belt-storage").get() == {}


@pytest.mark.parametrize("described", automations("00000000-0000-0000-0000-000000000001"), ids=lambda each: each.name)
@given(data=st.data())
def test_automations_are_the_same_in_whatever_order_their_events_are_named(described, data):
    trigger = described.trigger.model_dump()
    named = {name: data.draw(st.permutations(sorted(trigger[name]))) for name in ("after", "expect", "for_each")}
    other = type(described.trigger).model_validate(trigger | named)

    assert is_same(described, described.model_copy(update={"trigger": other, "id": uuid4()}))
    for event in described.trigger.expect:
        fewer = other.model_copy(update={"expect": described.trigger.expect - {event}})
        assert not is_same(described, described.model_copy(update={"trigger": fewer}))


def test_an_automation_that_stays_as_it_is_is_not_written_anew(deployed, client):
    settings = {name.removeprefix("BELT_").lower(): value for name, value in deployed.items()}

    def written_at() -> dict[str, str]:
        there = client._client.post("/automations/filter", json={}).json()
        return {each["name"]: each["updated"] for each in there if each["name"] in OURS}

    before = written_at()
    deploy(DeploySettings(**settings))

    assert before.keys() == OURS
    assert written_at() == before


def test_what_was_under_way_when_everything_stopped_goes_on_and_nothing_else_does(deployed, client):  # noqa: ARG001
    deployment = client.read_deployment_by_name("preview/preview")

    def run(*states: State) -> UUID:
        made = client.create_flow_run_from_deployment(deployment.id)
        for state in states:
            client.set_flow_run_state(made.id, state)
        return made.id

    pending, running = run(Pending()), run(Pending(), Running())
    others = [run(), run(Pending(), Running(), Completed()), run(Pending(), Running(), Cancelling())]
    stopped_at = datetime.now(UTC)
    others.append(run(Pending(), Running()))
    before = {each: client.read_flow_run(each).state.id for each in others}
    names = {client.read_flow_run(each).name for each in (pending, running)}

    assert set(take_up(stopped_at)) == names
    assert take_up(stopped_at) == []

    assert [client.read_flow_run(each).state.name for each in (pending, running)] == ["AwaitingRetry"] * 2
    assert {each: client.read_flow_run(each).state.id for each in others} == before
    for each in (pending, running, *others):
        client.delete_flow_run(each)


def test_wrong_parameters_are_refused_before_anything_runs(deployed, client):  # noqa: ARG001 - deployed
    told = command(
        str(BIN / "prefect"), "deployment", "run", "score/score-on-demand", "--param", 'spec={"device": "tpu"}'
    )

    assert told.returncode == 1
    assert "device" in told.stdout + told.stderr


def test_those_who_want_to_be_told_are(deployed, client):
    CustomWebhookNotificationBlock(name="ops", url="http://127.0.0.1:9/").save("ops", overwrite=True)
    settings = {name.removeprefix("BELT_").lower(): value for name, value in deployed.items()}

    deploy(DeploySettings(**settings, alert_block="custom-webhook/ops"))

    actions = {each.name: each.actions[0].type for each in client.read_automations()}
    assert sorted(actions.values()) == sorted(
        ["change-flow-run-state"] * 2 + ["send-notification"] * 3 + ["run-deployment"] * 3
    )
    with pytest.raises(ConfigError, match=r"no block 'slack-webhook/nobody' on this Prefect server"):
        deploy(DeploySettings(**settings, alert_block="slack-webhook/nobody"))


def test_options_of_stores_are_kept_in_the_block_alone(deployed):
    settings = {name.removeprefix("BELT_").lower(): value for name, value in deployed.items()}
    options = '{"s3": {"key": "k", "secret": "whisper"}}'

    deploy(DeploySettings(**settings, storage_block="apart", storage_options=options))
    deploy(DeploySettings(**settings, storage_block="apart"))

    assert Secret.load("apart").get() == {"s3": {"key": "k", "secret": "whisper"}}
    with pytest.raises(ConfigError, match="BELT_STORAGE_OPTIONS must be a JSON object") as raised:
        deploy(DeploySettings(**settings, storage_options="whisper"))
    assert "whisper" not in str(raised.value)


def test_a_second_site_has_deployments_of_its_own(deployed, client):
    settings = {name.removeprefix("BELT_").lower(): value for name, value in deployed.items()}

    names = deploy(DeploySettings(**settings | {"output_uri": "/elsewhere"}, suffix="-reviews"))

    assert "score-nightly-reviews" in names
    outputs = {each.name: each.parameters.get("output_uri") for each in client.read_deployments()}
    assert outputs["score-nightly-reviews"] == "/elsewhere"
    assert outputs["score-nightly"] == deployed["BELT_OUTPUT_URI"]


@pytest.mark.parametrize("written", ["file://{}/out", "{}/out/", "{}/./x/../out"])
def test_a_place_has_one_name_in_parameters_and_triggers(written, site, tmp_path, monkeypatch):
    """A run's events name its output as `storage.absolute` does, and triggers compare letters."""
    for name, value in (site | {"BELT_OUTPUT_URI": written.format(tmp_path)}).items():
        monkeypatch.setenv(name, value)

    environment = read_settings().environment()

    assert environment["BELT_OUTPUT_URI"] == f"{tmp_path}/out"
    assert environment["BELT_ENCODER"] == site["BELT_ENCODER"]


def test_a_slash_at_the_end_leads_to_the_same_place(site, monkeypatch):
    for name, value in (site | {"BELT_MODELS_URI": "s3://b/models/", "BELT_OUTPUT_URI": "s3://b/out/"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("BELT_CHECKPOINT_URI", raising=False)

    environment = read_settings().environment()

    assert (environment["BELT_MODELS_URI"], environment["BELT_OUTPUT_URI"]) == ("s3://b/models", "s3://b/out")
    assert environment["BELT_CHECKPOINT_URI"] == "s3://b/models/registry@champion"


def test_what_is_missing_is_named(deployed):
    told = command(str(BIN / "belt"), "deploy", **deployed | {"BELT_CORPUS_URI": ""})
    nowhere = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    alone = subprocess.run([BIN / "belt", "deploy"], env=nowhere, capture_output=True, text=True, check=False)

    assert (told.returncode, alone.returncode) == (2, 2)
    assert told.stderr == "Error: BELT_CORPUS_URI must be set; see deployments/README.md\n"
    assert "PREFECT_API_URL must be the address" in alone.stderr


def test_automations_that_tell_somebody_need_a_block():
    assert len(automations(None)) == 2
    assert len(automations("11111111-1111-1111-1111-111111111111")) == 5
