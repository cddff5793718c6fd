"""The doctor: a finding for each question, whatever happens, and nothing secret in it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from belt_tasks import attention_cpu, doctor, object_stores, storage
from belt_tasks.doctor import Finding
from belt_tasks.errors import ConfigError, without_credentials
from tests.conftest import labelled_rows
from tests.integration.fault_proxy import Request, fault_proxy


def of_place(**places: str) -> Finding:
    """The one finding about a place."""
    (found,) = doctor.examine("places", lambda: doctor.place_checks(**places))
    return found


def install(folder: Path, name: str, version: str, *more: str) -> None:
    """What an installer leaves behind of a distribution."""
    path = folder / f"{name}-{version}.dist-info"
    path.mkdir()
    (path / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *more]))


def test_this_machine_is_fit():
    found = doctor.examine("this machine", doctor.machine_checks)

    assert not doctor.has_problem(found)
    assert [each.check for each in found] == [name for name, _ in doctor.machine_checks()]
    assert {each.check: each.status for each in found}["torch"] == "ok"


def test_a_version_out_of_range_is_a_problem(tmp_path, monkeypatch):
    install(tmp_path, "torch", "1.13.0")
    monkeypatch.syspath_prepend(str(tmp_path))

    found = {each.check: each for each in doctor.examine("this machine", doctor.machine_checks)}

    assert found["torch"].status == "problem"
    assert found["torch"].found == "1.13.0, but belt needs >=2.13"
    assert found["transformers"].status == "ok"


def test_what_is_not_installed_is_a_problem(tmp_path, monkeypatch):
    needs = [f"Requires-Dist: {name}" for name in (*doctor.TOLD_LIBRARIES, "no-such-library>=7", "fastapi>=999")]
    install(tmp_path, "belt", "9.9.9", "Requires-Python: >=3.99", *needs, "Requires-Dist: extra-one; extra == 'x'")
    monkeypatch.syspath_prepend(str(tmp_path))

    found = {each.check: each for each in doctor.examine("this machine", doctor.machine_checks)}

    assert found["Python"].status == "problem"
    assert found["Python"].found.endswith(", but belt needs >=3.99")
    assert found["other libraries"].status == "problem"
    assert "no-such-library not installed" in found["other libraries"].found
    assert "but belt needs >=999" in found["other libraries"].found
    assert "extra-one" not in found["other libraries"].found


@pytest.mark.parametrize(
    ("name", "check"), [("LEAST_MEMORY_BYTES", "memory"), ("LEAST_FREE_BYTES", "temporary folder")]
)
def test_what_is_scarce_is_a_warning(monkeypatch, name, check):
    monkeypatch.setattr(doctor, name, 2**62)

    found = {each.check: each for each in doctor.examine("this machine", doctor.machine_checks)}

    assert found[check].status == "warning"
    assert found[check].advice is not None


def test_cores_that_are_given_away_are_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.joblib, "cpu_count", lambda: 4)  # this machine may have one

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert doctor.check_cores().status == "warning"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert doctor.check_cores().status == "ok"


def test_a_missing_kernel_is_a_warning(monkeypatch):
    monkeypatch.setattr(attention_cpu, "load_kernel", lambda: None)

    assert doctor.check_kernel().status == "warning"


@given(st.sampled_from([ValueError, OSError, KeyError, ConfigError, ZeroDivisionError]), st.text())
def test_a_check_that_raises_is_a_problem_and_the_others_go_on(kind, words):
    def breaks() -> Finding:
        raise kind(words)

    fine = Finding(check="b", status="ok", found="all well")
    found = doctor.examine("group", lambda: [("a", breaks), ("b", lambda: fine)])

    assert [(each.check, each.status) for each in found] == [("a", "problem"), ("b", "ok")]
    assert "\n" not in found[0].found


def test_checks_that_cannot_even_be_named_are_a_problem():
    def breaks():
        raise ImportError("half of it is missing")

    (found,) = doctor.examine("Prefect", breaks)

    assert (found.check, found.status) == ("Prefect", "problem")
    assert found.found == "unexpected ImportError: half of it is missing"


@given(
    st.sampled_from(["http", "https", "s3", "postgresql"]), st.from_regex(r"[a-zA-Z0-9%._~!-]{1,20}", fullmatch=True)
)
def test_credentials_of_addresses_are_not_told(protocol, word):
    secret = f"hush{word}"
    text = f"cannot reach {protocol}://user:{secret}@host:1/path?signature={secret} today"

    assert without_credentials(text) == f"cannot reach {protocol}://host:1/path today"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://user:p@ss@host/x", "http://host/x"),
        ("s3://AKIA:abc/def+gh@bucket/x", "s3://bucket/x"),
        ("https://token@host/x?y", "https://host/x"),
        ("s3://bucket/registry@champion", "s3://bucket/registry@champion"),
        ("two http://a:b@c and http://d:e@f", "two http://c and http://f"),
        ("no address: me@host", "no address: me@host"),
    ],
)
def test_odd_addresses_tell_no_credentials_either(text, told):
    assert without_credentials(text) == told


def test_what_is_well_tells_no_credentials_either():
    (found,) = doctor.examine(
        "places", lambda: [("a", lambda: Finding(check="a", status="ok", found="read http://user:hush@host/x"))]
    )

    assert found.found == "read http://host/x"


def test_a_corpus_is_read(write_corpus):
    uri = write_corpus(labelled_rows(10), num_files=2)

    found = of_place(corpus_uri=uri)

    assert found.status == "ok"
    assert found.found.startswith(f"{uri}: 2 files")
    assert found.found.endswith("columns doc_id, text, label, split")


def test_what_is_no_corpus_is_a_problem(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not Parquet at all")

    assert of_place(corpus_uri=str(tmp_path)).status == "problem"
    assert "not a Parquet file" in of_place(corpus_uri=str(tmp_path)).found
    assert of_place(corpus_uri=str(tmp_path / "nowhere")).status == "problem"


def test_a_checkpoint_is_loaded(tiny_checkpoint, tmp_path):
    assert of_place(checkpoint_uri=tiny_checkpoint).status == "ok"
    assert "multiclass (3 labels)" in of_place(checkpoint_uri=tiny_checkpoint).found
    missing = of_place(checkpoint_uri=str(tmp_path))
    assert missing.status == "problem"
    assert "no checkpoint there" in missing.found


def test_an_output_is_tried_and_left_as_it_was(output):
    storage.write_bytes(storage.join(output, "mine"), b"stays")

    found = of_place(output_uri=output)

    assert found == Finding(check="output", status="ok", found=f"{output}: {doctor.CAN_COMMIT}")
    assert [file.uri for file in storage.list_files(output, suffix="", hidden=True)] == [storage.join(output, "mine")]


def test_an_output_that_was_not_there_is_not_made(tmp_path):
    assert of_place(output_uri=str(tmp_path / "new")).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_may_be_made_by_its_first_object(s3, monkeypatch):
    for name, value in s3.environment("admin").items():
        monkeypatch.setenv(name, value)
    object_stores.configure({})

    assert of_place(output_uri="s3://made-by-the-doctor/out").status == "ok"


def test_an_output_that_may_only_be_read_is_a_problem(s3, s3_root, monkeypatch):
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    object_stores.configure({})

    found = of_place(output_uri=s3_root)

    assert found.status == "problem"
    assert found.found.startswith(f"cannot write {s3_root}/.belt-doctor-")
    assert "Access Denied" in found.found
    assert "secret" not in found.found
    assert found.advice == "choose a place that this user may write to"


def test_wrong_keys_are_a_problem_with_advice(s3_root, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    object_stores.configure({})

    found = of_place(output_uri=s3_root)

    assert (found.status, found.advice[:15]) == ("problem", "check the keys:")


def test_a_place_that_is_not_there_is_a_problem_with_advice(tmp_path):
    found = of_place(corpus_uri=str(tmp_path / "corpus"))

    assert (found.status, found.advice[:18]) == ("problem", "check the spelling")


def test_a_full_disk_is_told_before_a_night_finds_out(tmp_path, monkeypatch):
    free = SimpleNamespace(free=2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: free)

    found = of_place(output_uri=str(tmp_path))

    assert (found.status, found.found) == ("warning", f"{tmp_path}: 0.00 GiB are free")
    assert found.advice.startswith("free some space")


def test_a_store_that_ignores_conditions_is_a_problem(s3, s3_root, monkeypatch):
    def agree(request: Request) -> bytes | None:
        answer = request.forward()
        if answer.split(b" ", 2)[1] == b"412":  # there is one already
            return b'HTTP/1.1 200 OK\r\nETag: "0"\r\nContent-Length: 0\r\n\r\n'
        return answer

    with fault_proxy(s3.endpoint, agree) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        object_stores.configure({})
        found = of_place(output_uri=s3_root)

    assert found.status == "problem"
    assert "ignores If-None-Match" in found.found


def test_a_store_that_lets_two_win_is_a_problem():
    found = of_place(output_uri="memory://bucket/out")

    assert found.status == "problem"
    assert "one has to win" in found.found


def test_only_names_of_storage_options_are_told(monkeypatch):
    object_stores.configure({"s3": {"key": "whisper", "secret": "hush", "endpoint_url": "http://127.0.0.1:1"}})
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "hush")
    try:
        found = doctor.check_storage_options()
    finally:
        object_stores.configure({})

    assert "s3: aws_access_key_id, aws_endpoint, aws_secret_access_key" in found.found
    assert "AZURE_STORAGE_ACCOUNT_KEY" in found.found
    assert "hush" not in found.found
    assert "whisper" not in found.found


@pytest.mark.parametrize(("name", "value"), [("BELT_LOG_FORMAT", "xml"), ("BELT_METRICS_PORT", "many")])
def test_wrong_settings_of_logs_and_metrics_are_a_problem(monkeypatch, name, value):
    monkeypatch.setenv("BELT_METRICS_TEXTFILE", "/var/lib/node_exporter/belt.prom")
    assert doctor.check_logs_and_metrics().found == "log as text; metrics by textfile"
    monkeypatch.setenv(name, value)

    found = {each.check: each for each in doctor.examine("this machine", doctor.machine_checks)}["logs and metrics"]

    assert found.status == "problem"
    assert value in found.found


@pytest.mark.gpu
def test_a_gpu_is_told():
    found = doctor.check_device()

    assert found.status == "ok"
    assert found.found.startswith(f"cuda:0 {torch.cuda.get_device_name(0)}, ")
    assert found.found.endswith((", bf16", ", fp16"))


@given(st.lists(st.builds(Finding), min_size=1))
def test_what_is_told_to_people_and_to_machines_is_the_same(findings):
    told = json.loads(doctor.as_json(findings))

    assert [Finding.model_validate(each) for each in told["findings"]] == findings
    assert told["ok"] == all(each.status != "problem" for each in findings)
    assert f"problem: {sum(each.status == 'problem' for each in findings)}" in doctor.as_text(findings)
