"""The whole path on a real S3 server, configured by the environment or by a Prefect block that keeps the secrets."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import httpx
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

from belt_tasks import checkpoint, object_stores, publishing, score_tables, storage
from belt_tasks.errors import ConfigError
from flows.evaluate import evaluate
from flows.score import score
from flows.storage_block import use_storage_block
from tests.flows.test_flows import artifact
from tests.flows.test_launch import OPTIONS, machines
from tests.s3_server import KEYS

BELT = Path(sys.executable).parent / "belt"


@pytest.fixture
def on_s3(s3_root, labelled_corpus, tiny_checkpoint) -> str:
    """A prefix with a corpus and a checkpoint."""
    storage.put_directory(Path(labelled_corpus), f"{s3_root}/corpus", last="")
    folder = Path(checkpoint.resolve(tiny_checkpoint))
    storage.put_directory(folder, f"{s3_root}/model", last="card.json")
    return s3_root


@pytest.fixture
def block(s3) -> str:
    """A Secret block with the options; the environment has none."""
    key, secret, _ = KEYS["belt"]
    options = {"key": key, "secret": secret, "endpoint_url": s3.endpoint, "region_name": "us-east-1"}
    Secret(value=json.dumps({"s3": options})).save("store", overwrite=True)
    return "store"


def predictions(output: str) -> pl.DataFrame:
    return score_tables.read_table(output, "predictions").drop("scored_at", "run_id").sort("doc_id")


def test_s3_gives_what_local_files_give(on_s3, labelled_corpus, tiny_checkpoint, tmp_path):
    far = score(f"{on_s3}/corpus", f"{on_s3}/model", f"{on_s3}/out")
    near = score(labelled_corpus, tiny_checkpoint, str(tmp_path / "out"))

    assert_frame_equal(predictions(f"{on_s3}/out"), predictions(str(tmp_path / "out")), abs_tol=1e-6)
    assert far.rejected_by_reason == near.rejected_by_reason == {"text_null": 1}
    again = score(f"{on_s3}/corpus", f"{on_s3}/model", f"{on_s3}/out")
    assert again == far


def test_a_report_opens_from_the_summary_for_as_long_as_asked_for(on_s3, client, monkeypatch):
    monkeypatch.setenv("BELT_REPORT_LINK_HOURS", "24")
    state = score(f"{on_s3}/corpus", f"{on_s3}/model", f"{on_s3}/out", return_state=True)

    told = artifact(client, state, "score-summary")
    links = dict(re.findall(r"^- (.+?): `[^`]+` \(\[open\]\((http\S+)\)\)$", told, flags=re.MULTILINE))
    assert links.keys() == {"report", "data quality"}
    run_id = state.result().run["run_id"]
    for url in links.values():
        assert "X-Amz-Expires=86400" in url
        answer = httpx.get(url)
        assert run_id in answer.text
        assert answer.headers["content-type"] == "text/html"


def test_a_report_that_cannot_be_signed_for_is_no_reason_to_fail(on_s3, client, monkeypatch, caplog):
    def refused(*_):
        raise ConfigError("no keys to sign with")

    monkeypatch.setenv("BELT_REPORT_LINK_HOURS", "1")
    monkeypatch.setattr(storage, "signed_url", refused)
    state = score(f"{on_s3}/corpus", f"{on_s3}/model", f"{on_s3}/out", return_state=True)

    assert state.is_completed()
    assert "[open]" not in artifact(client, state, "score-summary")
    assert "the report cannot be opened from the summary: no keys to sign with" in caplog.text


@pytest.mark.parametrize("hours", ["0", "169", "a week"])
def test_how_long_a_report_opens_is_checked_before_any_work(
    labelled_corpus, tiny_checkpoint, tmp_path, monkeypatch, hours
):
    monkeypatch.setenv("BELT_REPORT_LINK_HOURS", hours)

    with pytest.raises(ConfigError, match=rf"BELT_REPORT_LINK_HOURS: .*, got '{hours}'"):
        score(labelled_corpus, tiny_checkpoint, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_block_has_the_secrets_and_nothing_else_does(on_s3, s3, block):
    environment = {name: value for name, value in os.environ.items() if name not in s3.environment()}
    arguments = [f"{on_s3}/corpus", "--checkpoint", f"{on_s3}/model", "--output", f"{on_s3}/out"]

    done = subprocess.run(
        [BELT, "--verbose", "score", *arguments, "--storage-block", block],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert len(predictions(f"{on_s3}/out")) == 35
    _, secret, _ = KEYS["belt"]
    assert secret not in done.stdout + done.stderr
    for file in storage.list_files(f"{on_s3}/out", suffix=""):
        assert secret.encode() not in storage.read_bytes(file.uri), file.uri
    with sqlite3.connect(PREFECT_API_DATABASE_CONNECTION_URL.value().removeprefix("sqlite+aiosqlite:///")) as server:
        dump = "\n".join(server.iterdump())
    assert f"{on_s3}/out" in dump
    assert secret not in dump


def test_the_machines_of_a_launcher_have_the_block_too(on_s3, s3, block, tiny_encoder):
    """Each asks Prefect's server: no secret goes from one to another."""
    environment = {name: value for name, value in os.environ.items() if name not in s3.environment()}
    arguments = [f"{on_s3}/corpus", "--encoder", str(tiny_encoder), "--output", f"{on_s3}/tuned"]

    codes, said = machines(["fine-tune", *arguments, *OPTIONS, "--storage-block", block], environment=environment)

    assert codes == [0, 0], said
    assert publishing.read_manifest(f"{on_s3}/tuned").run["flow"] == "fine-tune"


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("value", ["not json: tell-nobody", '["tell-nobody"]', '{"s3": "tell-nobody"}'])
def test_a_block_that_is_not_options_is_refused_without_showing_it(value):
    Secret(value=value).save("broken", overwrite=True)

    with pytest.raises(ConfigError, match="value of Secret block 'broken' must be a JSON object") as raised:
        use_storage_block("broken")

    assert "tell-nobody" not in str(raised.value)
    with pytest.raises(ConfigError, match="no Secret block 'absent' on this Prefect server"):
        use_storage_block("absent")


def test_a_subflow_has_the_block_too(on_s3, s3, block, monkeypatch):
    for name in s3.environment():
        monkeypatch.delenv(name)
    object_stores.configure({})

    with pytest.raises(ConfigError, match="of 0 labelled and 35 scored documents none is both"):  # other labels
        evaluate(f"{on_s3}/corpus", f"{on_s3}/model", f"{on_s3}/measured", storage_block=block)
