"""Object stores: s3://, gs:// and abfs:// as fsspec filesystems, with one configuration for belt and for Delta Lake.

Where it comes from, the later over the earlier: the environment (the cloud's own variables, such as AWS_ENDPOINT_URL
or GOOGLE_APPLICATION_CREDENTIALS), fsspec's configuration (its files and FSSPEC_S3_KEY and so on; s3fs's, gcsfs's and
adlfs's names are understood), and `configure`. Nothing of it is ever part of a URI, a spec, a manifest or a message.
"""

import errno
import mimetypes
import os
import re
import threading
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec.config
import obstore
from fsspec.spec import AbstractBufferedFile
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError, UnknownConfigurationKeyError
from obstore.fsspec import FsspecStore
from obstore.store import from_url

from belt_tasks.errors import BeltError, ConfigError, TransientError

if TYPE_CHECKING:
    from obstore import Attributes, GetOptions
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import ObjectStore, RetryConfig

Options = Mapping[str, Any]

FAMILIES = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "abfs": "abfs",
    "abfss": "abfs",
    "az": "abfs",
}
"""Protocols of each cloud, and the name under which it is configured."""

# a store that is throttled, restarted or out of reach for some seconds is not an error
RETRIES: "RetryConfig" = {
    "max_retries": 12,
    "retry_timeout": timedelta(seconds=90),
    "backoff": {
        "base": 2,
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=10),
    },
}
FIRST_PATIENCE = timedelta(seconds=5)  # a store that has never answered is more likely a wrong address

PROFILE = "aws_profile"  # the stores themselves know none

# fsspec's name of an option -> the store's
NAMES = {
    "s3": {
        "key": "aws_access_key_id",
        "secret": "aws_secret_access_key",
        "token": "aws_session_token",
        "endpoint_url": "aws_endpoint",
        "region_name": "aws_region",
        "anon": "aws_skip_signature",
        "profile": PROFILE,
    },
    "gs": {"token": "google_service_account", "anon": "google_skip_signature"},
    "abfs": {
        "account_name": "azure_storage_account_name",
        "account_key": "azure_storage_account_key",
        "sas_token": "azure_storage_sas_key",
        "tenant_id": "azure_storage_tenant_id",
        "client_id": "azure_storage_client_id",
        "client_secret": "azure_storage_client_secret",
        "anon": "azure_skip_signature",
    },
}
# without credentials a machine of the cloud itself is asked for some
TRACES_OF_NO_CREDENTIALS = ("/latest/api/token", "169.254.169.254", "metadata.google", "Missing AccessKeyId")
TRACES_OF_NO_ANSWER = re.compile("HTTP error|error sending|error decoding|connection|timed? ?out", re.IGNORECASE)
MEANINGS = {
    "301": "the bucket is in another region",
    "400": "refused; credentials that have expired, or a wrong region, are answered so",
    "401": "not authenticated",
    "403": "access denied: the keys are wrong, or do not permit it",
}
RETRIED_STATUSES = {"408", "429"}  # besides all that begin with 5
UNUSED = {"project", "use_listings_cache", "asynchronous", "loop", "use_ssl"}

_configured: dict[str, dict[str, str]] = {}
_lock = threading.Lock()


def configure(options: Mapping[str, Options]) -> None:
    """Set options of this process, over those of the environment and of fsspec's configuration.

    Args:
        options: by protocol; names are fsspec's or the store's own.

    Raises:
        ConfigError: there is no such protocol or option.
    """
    translated = {}
    for protocol, values in options.items():
        if protocol not in FAMILIES:
            raise ConfigError(
                f"storage options are for one of {', '.join(sorted(set(FAMILIES.values())))}, got {protocol!r}"
            )
        translated[FAMILIES[protocol]] = _translate(FAMILIES[protocol], values)
    with _lock:
        _configured.clear()
        _configured.update(translated)
        filesystem.cache_clear()


def configured() -> dict[str, dict[str, str]]:
    """What `configure` set, to configure another process alike; it may hold secrets."""
    with _lock:
        return {family: dict(values) for family, values in _configured.items()}


def options(protocol: str) -> dict[str, str]:
    """What is configured for a protocol beside the environment, in the store's names.

    Raises:
        ConfigError: fsspec's configuration has an option that is not known.
    """
    family = FAMILIES[protocol]
    found: dict[str, str] = {}
    for name in (name for name, its in FAMILIES.items() if its == family):
        found |= _translate(family, fsspec.config.conf.get(name, {}))
    return found | _configured.get(family, {})


def delta_options(protocol: str) -> dict[str, str]:
    """What Delta Lake is told of a protocol's store beside the environment.

    Raises:
        ConfigError: the configuration is wrong.
    """
    found = {name: value for name, value in options(protocol).items() if name != PROFILE} | {"allow_http": "true"}
    profile = filesystem(protocol).profile
    if profile is None:
        return found
    who = profile()
    of_profile = {
        "aws_access_key_id": who["access_key_id"],
        "aws_secret_access_key": who["secret_access_key"],
        "aws_session_token": who.get("token"),
        "aws_region": profile.config.get("region"),
    }
    return {name: value for name, value in of_profile.items() if value is not None} | found


@cache
def filesystem(protocol: str) -> "ObjectFileSystem":
    """The filesystem of a protocol, as it is configured.

    Raises:
        ConfigError: the configuration is wrong.
    """
    chosen = options(protocol)
    profile = _profile(chosen) if FAMILIES[protocol] == "s3" else None
    found = ObjectFileSystem(  # type: ignore[call-overload]
        protocol,
        config={name: value for name, value in chosen.items() if name != PROFILE} or None,
        client_options={"allow_http": True},  # where an endpoint says so
        retry_config=RETRIES,
        credential_provider=profile,
        skip_instance_cache=True,
    )
    found.profile = profile
    return found  # type: ignore[no-any-return]


class ObjectFileSystem(FsspecStore):
    """obstore's filesystem, with paths taken literally, one listing for a whole tree, and whole names of objects."""

    profile: "Boto3CredentialProvider | None" = None

    def _split_path(self, path: str) -> tuple[str, str]:
        bucket, _, key = self._strip_protocol(path).partition("/")
        return bucket, key

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:  # noqa: ANN401 - fsspec's
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return re.sub(r"^[a-z0-9]+://", "", str(path)).rstrip("/")

    def _construct_store(self, bucket: str) -> "ObjectStore":
        """A bucket's store, once something has answered there; called once a bucket."""
        try:
            self.store(bucket, RETRIES | {"retry_timeout": FIRST_PATIENCE}).head(".belt-probe")
        except (BaseError, FileNotFoundError) as error:
            if "status code" not in str(error) and isinstance(error_of(error, "reach it"), TransientError):
                raise
        return self.store(bucket, RETRIES)

    def store(self, bucket: str, retries: "RetryConfig") -> "ObjectStore":
        """A bucket's store; nothing is asked of it."""
        return from_url(
            f"{self.protocol}://{bucket}",
            config=self._config,  # type: ignore[arg-type]  # of this protocol
            client_options=self._client_options,
            retry_config=retries,
            credential_provider=self._credential_provider,  # type: ignore[arg-type]
        )

    def signed_url(self, path: str, valid_for: timedelta) -> str:
        """An address that needs no credentials, to get an object by; whoever has it may."""
        bucket, key = self._split_path(path)
        return obstore.sign(self.store(bucket, RETRIES), "GET", key, valid_for)  # type: ignore[call-overload,no-any-return]  # one of these

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 - fsspec's
        info: dict[str, Any] = await super()._info(path, **kwargs)
        return info | {"name": self._strip_protocol(path)}

    async def _pipe_file(self, path: str, value: Any, mode: str = "overwrite", **_: Any) -> None:  # noqa: ANN401 - fsspec's
        bucket, key = self._split_path(path)
        store = self._construct_store(bucket)
        content_type = mimetypes.guess_type(key)[0]  # without it a browser saves pages instead of showing them
        attributes: Attributes | None = {"Content-Type": content_type} if content_type else None
        if mode != "create":
            await store.put_async(key, value, attributes=attributes)
            return
        try:
            await store.put_async(key, value, attributes=attributes, mode="create", use_multipart=False)
        except AlreadyExistsError as error:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error

    def _open(self, path: str, mode: str = "rb", **_: Any) -> "ObjectFile":  # type: ignore[override]  # noqa: ANN401
        return ObjectFile(self, path, mode, cache_type="none")

    async def _find(self, path: str, maxdepth: int | None = None, *, withdirs: bool = False, **kwargs: Any) -> Any:  # noqa: ANN401 - fsspec's
        if maxdepth is not None or withdirs:
            return await super()._find(path, maxdepth=maxdepth, withdirs=withdirs, **kwargs)
        bucket, prefix = self._split_path(path)
        found = {}
        async for objects in self._construct_store(bucket).list(prefix or None):
            for it in objects:
                name = f"{bucket}/{it['path']}"
                found[name] = {"name": name, "size": it["size"], "type": "file"}
                found[name] |= {"e_tag": it["e_tag"], "last_modified": it["last_modified"]}
        return found if kwargs.get("detail") else sorted(found)


class ChangedError(OSError):
    """An object was replaced while it was read."""


class ObjectFile(AbstractBufferedFile):  # type: ignore[misc]
    """An object to read from, as it was when it was opened; whoever reads chooses how much at a time."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        bucket, key = self.fs._split_path(self.path)  # noqa: SLF001 - its own filesystem
        options: GetOptions = {"range": (start, end), "if_match": self.details["e_tag"]}
        try:
            return bytes(self.fs._construct_store(bucket).get(key, options=options).bytes())  # noqa: SLF001
        except PreconditionError as error:
            raise ChangedError(f"{self.path} changed while it was read") from error
        except BaseError as error:
            meaning = error_of(error, f"read {self.path}")
            raise (ConnectionError if isinstance(meaning, TransientError) else OSError)(str(meaning)) from None


def error_of(error: Exception, action: str) -> BeltError:
    """What an error of a store, or of Delta Lake on one, means to a user: worth a retry, or something to mend.

    Nothing secret is in it.
    """
    text = re.sub("\x1b\\[[0-9]+m", "", str(error)).partition("Debug source")[0].strip()
    lines = [line.strip(" ↳") for line in text.splitlines()]  # from what failed to its cause
    status = re.search(r"status code: (\d+)", text)
    code = re.search(r"<Code>([^<]*)</Code>", text)
    message = re.search(r"<Message>([^<]*)</Message>", text)
    if isinstance(error, UnknownConfigurationKeyError):
        return ConfigError(f"cannot {action}: {text}")
    if any(trace in text for trace in TRACES_OF_NO_CREDENTIALS):
        return ConfigError(f"cannot {action}: no credentials are configured")
    # not in the answer to a HEAD request; the numbers of the request follow in more lines
    said = ", ".join(part[1].strip().partition("\n")[0] for part in (code, message) if part)
    what = said or (status and MEANINGS.get(status[1])) or _plain(": ".join(dict.fromkeys([lines[0], lines[-1]])))
    if status is None:
        kind = TransientError if TRACES_OF_NO_ANSWER.search(text) else ConfigError
        return kind(f"cannot {action}: {what}")
    if status[1] in RETRIED_STATUSES or status[1].startswith("5"):
        return TransientError(f"cannot {action}: {what}")
    return ConfigError(f"cannot {action}: {what} ({status[1]})")


def _plain(line: str) -> str:
    """An error without how often it was tried, and without the address's path and query, which may hold a signature."""
    request = re.search(r"Error performing \w+ (\w+://[^/?\s]+)\S* in .* - (.*)", line)
    return re.sub(r"(\w+://[^/?\s]+)\S*", r"\1", line if request is None else f"{request[2]} ({request[1]})")


def _translate(family: str, values: Options) -> dict[str, str]:
    """A store's names and strings for fsspec's."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name == "client_kwargs":
            flat |= value
        elif name == "config_kwargs":
            style = value.get("s3", {}).get("addressing_style")
            flat |= {} if style is None else {"aws_virtual_hosted_style_request": style == "virtual"}
        elif name not in UNUSED:
            flat[name] = value
    names = NAMES[family]
    known = tuple(f"{prefix}_" for prefix in ("aws", "google", "azure"))
    unknown = sorted(name for name in flat if name not in names and not name.startswith(known))
    if unknown:
        raise ConfigError(
            f"storage options of {family}: {', '.join(unknown)} not known; allowed: {', '.join(sorted(names))}, and "
            "Delta Lake's own names"
        )
    return {
        names.get(name, name): str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in flat.items()
        if value is not None
    }


def _profile(chosen: Options) -> "Boto3CredentialProvider | None":
    """Credentials of a profile of AWS's own configuration, where nothing else names any."""
    given = {name.lower() for name in os.environ} | set(chosen)
    if {"aws_access_key_id", "aws_skip_signature", "aws_web_identity_token_file"} & given:
        return None
    folder = Path.home() / ".aws"
    if PROFILE not in given and not (folder / "credentials").exists() and not (folder / "config").exists():
        return None
    try:
        import boto3  # noqa: PLC0415 - optional
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415 - optional
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415 - needs boto3
    except ImportError as error:
        raise ConfigError("AWS profiles need boto3: pip install boto3") from error
    try:
        return Boto3CredentialProvider(boto3.Session(profile_name=chosen.get(PROFILE)))
    except BotoCoreError as error:
        raise ConfigError(f"AWS's own configuration: {error}") from None
    except ValueError:
        raise ConfigError(f"no credentials are configured in {folder}") from None
