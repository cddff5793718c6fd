"""Object stores, on a real S3 server: configuration, errors in words, retries, reads of what does not stand still."""

import os
import socket
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import fsspec.config
import httpx
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from belt_tasks import object_stores, sorted_files, storage
from belt_tasks.errors import BeltError, ConfigError, TransientError
from tests.delta_readers import by_delta_lake
from tests.s3_server import BUCKET, KEYS, PUBLIC_BUCKET

SECRET = "not-to-be-seen-anywhere"  # noqa: S105


@contextmanager
def proxy(endpoint, answer):
    """A server whose connections are each given to `answer(number, client, forward)`; yields its endpoint."""
    host, port = endpoint.removeprefix("http://").split(":")

    def forward(client, *, most_bytes=None):
        with socket.create_connection((host, int(port))) as server:
            threading.Thread(target=pump, args=(client, server), daemon=True).start()
            pump(server, client, most_bytes)

    def serve():
        number = 0
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(number, client), daemon=True).start()
            number += 1

    def one(number, client):
        with client:
            answer(number, client, forward)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def pump(source, target, most_bytes=None):
    passed = 0
    try:
        while data := source.recv(65536):
            target.sendall(data[: None if most_bytes is None else most_bytes - passed])
            passed += len(data)
            if most_bytes is not None and passed >= most_bytes:
                break
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def refuse(client):
    client.recv(65536)
    client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.fixture
def quick_retries(monkeypatch):
    """Give up soon."""
    monkeypatch.setitem(object_stores.RETRIES, "max_retries", 1)
    object_stores.configure({})


@pytest.mark.usefixtures("s3", "quick_retries")
@pytest.mark.parametrize(
    ("variables", "error", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": SECRET}, ConfigError, "SignatureDoesNotMatch|access denied"),
        (
            {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": SECRET},
            ConfigError,
            "InvalidAccessKeyId|access denied",
        ),
        ({"AWS_SKIP_SIGNATURE": "true"}, ConfigError, "AccessDenied|access denied"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, TransientError, "error sending request"),
        ({"AWS_ENDPOINT_URL": "http://nowhere.invalid"}, TransientError, "error sending request"),
    ],
)
def test_a_wrong_configuration_is_one_clear_error_without_secrets(s3_root, monkeypatch, variables, error, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    object_stores.configure({})

    for call in (
        lambda: storage.list_files(s3_root, suffix=".parquet"),
        lambda: storage.check_writable(s3_root),
        lambda: storage.read_bytes(f"{s3_root}/a"),
        lambda: storage.is_directory(s3_root),
    ):
        with pytest.raises(error, match=words) as raised:
            call()
        said = f"{raised.value!s}{raised.value!r}{raised.value.__cause__!r}"
        assert SECRET not in said
        assert s3_root in said
        assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            (
                "Generic S3 error: Error performing PUT https://host.test:9000/bucket/key?X-Amz-Signature=secret "
                "in 5.2s, after 8 retries, max_retries: 12, retry_timeout: 5s  - HTTP error: error sending request"
            ),
            "cannot act: HTTP error: error sending request (https://host.test:9000)",
        ),
        (
            (
                "Generic MicrosoftAzure error: Error performing GET https://a.blob.core.windows.net/c?sig=secret "
                "in 1ms - Server returned non-2xx status code: 404 Not Found"
            ),
            "cannot act: Server returned non-2xx status code: 404 Not Found (https://a.blob.core.windows.net) (404)",
        ),
        (
            (
                "Generic MicrosoftAzure error: Error performing list request: Error performing GET "
                "https://a.blob.core.windows.net/c?sig=secret in 1ms - "
                "Server returned non-2xx status code: 404 Not Found: <Error>"
                "<Code>ContainerNotFound</Code><Message>The container does not exist.\nRequestId:7e13\nTime:2026"
                "</Message></Error>"
            ),
            "cannot act: ContainerNotFound, The container does not exist. (404)",
        ),
        ("something else at https://host.test/path?sig=secret", "cannot act: something else at https://host.test"),
    ],
)
def test_an_address_is_told_without_its_path_and_signature(line, words):
    assert str(object_stores.error_of(Exception(line), "act")) == words


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_is_named():
    with pytest.raises(ConfigError, match=r"s3://nothing-here/corpus: NoSuchBucket, The specified bucket"):
        storage.list_files("s3://nothing-here/corpus", suffix=".parquet")


def test_a_place_that_may_be_read_only_cannot_be_written(s3, s3_root, monkeypatch):
    storage.write_bytes(f"{s3_root}/a.parquet", b"")
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    object_stores.configure({})

    assert len(storage.list_files(s3_root, suffix=".parquet")) == 1
    with pytest.raises(ConfigError, match=rf"{s3_root}: cannot be written to .*AccessDenied"):
        storage.check_writable(s3_root)


def test_a_signed_address_needs_no_credentials_and_ends(s3_root):
    page = f"{s3_root}/a (b) c%/index.html"
    storage.write_bytes(page, b"<p>hello")

    url = storage.signed_url(page, timedelta(hours=1))
    answer = httpx.get(url)
    assert (answer.content, answer.headers["content-type"]) == (b"<p>hello", "text/html")

    short = storage.signed_url(page, timedelta(seconds=1))
    time.sleep(2.5)
    for refused in (short, url.partition("?")[0], url.replace("index", "other")):
        assert httpx.get(refused).status_code == httpx.codes.FORBIDDEN


def test_a_local_file_has_no_signed_address(tmp_path):
    assert storage.signed_url(str(tmp_path / "index.html"), timedelta(hours=1)) is None


def test_a_public_bucket_is_read_without_a_signature(s3, s3_root, tmp_path, monkeypatch):
    s3.make_bucket(PUBLIC_BUCKET)
    public = s3_root.replace(BUCKET, PUBLIC_BUCKET, 1)
    storage.write_parquet(f"{public}/a.parquet", pa.table({"a": [1]}))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    object_stores.configure({})

    (file,) = storage.list_files(public, suffix=".parquet")

    assert storage.read_parquet(file.uri)["a"].to_pylist() == [1]
    for uri in (public, s3_root):
        with pytest.raises(ConfigError, match=r"cannot be written to .*(AccessDenied|access denied)"):
            storage.check_writable(uri)


def test_without_any_credentials_that_is_said(s3_root, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", str(tmp_path))
    # what a machine outside AWS answers for AWS's own source of credentials
    with proxy("http://127.0.0.1:1", lambda _, client, __: refuse(client)) as endpoint:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", endpoint)
        monkeypatch.setitem(object_stores.RETRIES, "max_retries", 0)
        object_stores.configure({})
        with pytest.raises(BeltError, match="no credentials are configured"):
            storage.list_files(s3_root, suffix=".parquet")


@pytest.fixture
def aws_folder(s3, s3_root, tmp_path, monkeypatch):  # noqa: ARG001 - after the server's own variables
    """AWS's own configuration with one profile, and nothing else that says who one is."""
    folder = tmp_path / ".aws"
    folder.mkdir()
    key, secret, _ = KEYS["belt"]
    (folder / "credentials").write_text(f"[night]\naws_access_key_id={key}\naws_secret_access_key={secret}\n")
    (folder / "config").write_text("[profile night]\nregion=us-east-1\n[profile nobody]\nregion=us-east-1\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    object_stores.configure({})
    yield folder
    object_stores.configure({})


@pytest.mark.usefixtures("aws_folder")
@pytest.mark.parametrize("way", ["environment", "configure"])
def test_a_profile_of_aws_s_configuration_is_taken_for_objects_and_tables(s3_root, monkeypatch, way):
    if way == "environment":
        monkeypatch.setenv("AWS_PROFILE", "night")
    else:
        object_stores.configure({"s3": {"profile": "night"}})

    storage.write_bytes(f"{s3_root}/a", b"here")
    write_deltalake(f"{s3_root}/table", pa.table({"a": [1]}), storage_options=storage.delta_options(s3_root))

    assert storage.read_bytes(f"{s3_root}/a") == b"here"
    assert by_delta_lake(f"{s3_root}/table")["a"].to_list() == [1]


@pytest.mark.usefixtures("aws_folder")
@pytest.mark.parametrize(
    ("profile", "words"),
    [("day", r"AWS's own configuration: .*\(day\) could not be found"), ("nobody", "no credentials are configured in")],
)
def test_a_profile_that_is_missing_or_empty_is_said(s3_root, profile, words):
    object_stores.configure({"s3": {"profile": profile}})
    with pytest.raises(ConfigError, match=words):
        storage.read_bytes(f"{s3_root}/a")


@pytest.mark.parametrize("way", ["fsspec", "configure"])
def test_fsspec_s_own_names_are_understood_and_win_over_the_environment(s3, s3_root, monkeypatch, way):
    key, secret, _ = KEYS["belt"]
    options = {
        "key": key,
        "secret": secret,
        "use_listings_cache": False,
        "client_kwargs": {"endpoint_url": s3.endpoint, "region_name": "us-east-1"},
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    }
    for name in s3.environment():
        monkeypatch.setenv(name, "wrong")
    if way == "fsspec":
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        object_stores.configure({})
    else:
        monkeypatch.setitem(fsspec.config.conf, "s3", {"key": "wrong", "anon": True})
        object_stores.configure({"s3": options | {"anon": False}})

    storage.write_bytes(f"{s3_root}/a", b"here")

    assert storage.read_bytes(f"{s3_root}/a") == b"here"
    assert object_stores.options("s3") == object_stores.options("s3a")
    assert object_stores.options("s3")["aws_secret_access_key"] == secret


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"s3": {"secrte": SECRET}}, "storage options of s3: secrte not known; allowed: anon, endpoint_url, key"),
        ({"ftp": {}}, "storage options are for one of abfs, gs, s3, got 'ftp'"),
        ({"abfs": {"connection_string": SECRET}}, "connection_string not known; allowed: account_key, account_name"),
    ],
)
def test_an_unknown_option_is_named_and_its_value_is_not(options, words):
    with pytest.raises(ConfigError, match=words) as raised:
        object_stores.configure(options)
    assert SECRET not in str(raised.value)


def test_options_of_every_cloud_are_those_of_delta_lake():
    object_stores.configure(
        {
            "gcs": {"token": "/key.json", "project": "mine"},
            "az": {"account_name": "me", "account_key": "a2V5", "anon": False},
        }
    )
    try:
        assert object_stores.options("gs") == {"google_service_account": "/key.json"}
        assert object_stores.options("abfss") == {
            "azure_storage_account_name": "me",
            "azure_storage_account_key": "a2V5",
            "azure_skip_signature": "false",
        }
        # taken by the store itself, which does not look for anything yet
        assert object_stores.filesystem("az").store("container", object_stores.RETRIES) is not None
    finally:
        object_stores.configure({})


def test_a_store_that_is_throttled_for_a_while_is_waited_for(s3, s3_root, monkeypatch):
    numbers = []

    def answer(number, client, forward):
        numbers.append(number)
        refuse(client) if number < 4 else forward(client)

    with proxy(s3.endpoint, answer) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        object_stores.configure({})
        storage.write_bytes(f"{s3_root}/a", b"x")

        assert storage.read_bytes(f"{s3_root}/a") == b"x"
    assert len(numbers) > 4


@pytest.mark.usefixtures("quick_retries")
def test_a_store_that_is_throttled_for_good_is_worth_another_attempt_later(s3, s3_root, monkeypatch):
    with proxy(s3.endpoint, lambda _, client, __: refuse(client)) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        object_stores.configure({})
        with pytest.raises(TransientError, match=f"cannot read {s3_root}/a: "):
            storage.read_bytes(f"{s3_root}/a")


def test_a_connection_that_drops_in_the_middle_of_an_object_is_made_again(s3, s3_root, monkeypatch):
    data = os.urandom(3_000_000)
    storage.write_bytes(f"{s3_root}/a", data)
    cut = []

    def answer(number, client, forward):
        if number == 1:  # the first one only asks whether the store is there
            forward(client, most_bytes=1_000_000)
            cut.append(number)
        else:
            forward(client)

    with proxy(s3.endpoint, answer) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        object_stores.configure({})
        assert storage.read_bytes(f"{s3_root}/a") == data
    assert cut


@pytest.mark.usefixtures("s3")
def test_an_object_that_changes_while_it_is_read_is_not_read_as_a_mixture(s3_root):
    uri = f"{s3_root}/a.parquet"
    table = pa.table({"number": range(100_000), "word": ["some words"] * 100_000})
    storage.write_parquet(uri, table)

    with storage.open_parquet(uri) as parquet:
        storage.write_parquet(uri, table.slice(1))
        with pytest.raises(OSError, match=r"a\.parquet changed while it was read"):
            parquet.read()


@pytest.mark.usefixtures("s3")
def test_a_listing_is_complete_and_names_are_taken_literally(s3_root):
    names = [f"part=1/{i:04}.parquet" for i in range(1100)] + ["a b#c?d=%20/é*[x].parquet", "z+y&.parquet"]
    filesystem = object_stores.filesystem("s3")
    path = s3_root.removeprefix("s3://")
    filesystem.pipe({f"{path}/{name}": name.encode() for name in names})

    found = storage.list_files(s3_root, suffix=".parquet")

    assert [file.uri for file in found] == sorted(f"{s3_root}/{name}" for name in names)
    assert [file.num_bytes for file in found] == [
        len(name.encode()) for name in sorted(names, key=lambda name: f"{s3_root}/{name}")
    ]
    assert storage.read_bytes(f"{s3_root}/{names[-2]}") == names[-2].encode()
    assert len(storage.list_files(f"{s3_root}/part=1/*0.parquet", suffix=".parquet")) == 110
    assert f"s3://{BUCKET}/" in found[0].uri


@pytest.mark.usefixtures("s3")
def test_a_table_s_source_that_changes_while_it_is_read_is_worth_another_attempt(s3_root):
    uri = f"{s3_root}/a.parquet"
    table = pa.table({"key": [f"{i:06}" for i in range(1000)]})
    sorted_files.put_sorted(uri, table, by=["key"])
    before = sorted_files.SortedFile.read(uri, "key")
    filesystem = object_stores.filesystem("s3")
    opened = filesystem.open(uri, "rb")
    sorted_files.put_sorted(uri, table.slice(1), by=["key"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(filesystem), "_open", lambda *_, **__: opened)
        with pytest.raises(TransientError, match=rf"cannot read {uri}: .*a\.parquet changed while it was read"):
            before.rows(None, None, table.schema)
