"""A real S3 server for tests and, with `make s3`, for people: SeaweedFS on this machine, with keys that it enforces."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import obstore
import typer

from deployments.services import free_ports, make_bucket, s3_command

STARTUP_S = 60
BUCKET = "belt"
PUBLIC_BUCKET = "public"  # made by whoever needs it; everybody may read it
KEYS = {
    "belt": ("belt-key", "belt-secret", ["Read", "Write", "List", "Tagging"]),
    "reader": ("reader-key", "reader-secret", ["Read", "List"]),
    "admin": ("admin-key", "admin-secret", ["Admin", "Read", "Write", "List", "Tagging"]),
}


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """Where it listens, and who may do what."""

    endpoint: str
    process: "subprocess.Popen[bytes]"

    def environment(self, identity: str = "belt") -> dict[str, str]:
        """The variables with which AWS's own tools and belt find it."""
        key, secret, _ = KEYS[identity]
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self, name: str) -> None:
        """An administrator's first object makes a bucket here."""
        key, secret, _ = KEYS["admin"]
        make_bucket(name, endpoint=self.endpoint, key=key, secret=secret)


@contextmanager
def s3_server(folder: Path, *, port: int | None = None) -> Iterator[S3Server]:
    """A server with one bucket, `belt`, whose objects lie under `folder`; it ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "s3.json"
    identities = [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for name, (key, secret, actions) in KEYS.items()
    ]
    identities.append({"name": "anonymous", "actions": [f"{action}:{PUBLIC_BUCKET}" for action in ("Read", "List")]})
    config.write_text(json.dumps({"identities": identities}))
    s3, *inner = free_ports(4)
    s3 = port or s3
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(s3_command(folder, s3, *inner), stdout=log, stderr=log)
    server = S3Server(endpoint=f"http://127.0.0.1:{s3}", process=process)
    try:
        _wait(server, folder / "server.log")
        yield server
    finally:
        process.kill()  # what it has confirmed is on disk; an orderly end takes ten seconds
        process.wait()


def _wait(server: S3Server, log: Path) -> None:
    """Return when it takes objects."""
    give_up_at = time.monotonic() + STARTUP_S
    while True:
        try:
            if server.process.poll() is None:
                server.make_bucket(BUCKET)
                return
        except obstore.exceptions.BaseError:
            if time.monotonic() < give_up_at:
                time.sleep(0.2)
                continue
        raise RuntimeError(f"no S3 server at {server.endpoint}; its log ends with: {log.read_text()[-1000:]}")


def main() -> None:
    """Serve under .belt/s3 on port 8333 until interrupted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with suppress(KeyboardInterrupt), s3_server(Path(".belt/s3"), port=8333) as server:
        for name, value in server.environment().items():
            typer.echo(f"export {name}={value}")
        typer.echo("export AWS_ALLOW_HTTP=true  # for other readers of Delta tables; belt does not need it")
        typer.echo(f"# the bucket is s3://{BUCKET}/ and is kept in .belt/s3; Ctrl-C stops the server")
        while True:
            signal.pause()


if __name__ == "__main__":
    main()
