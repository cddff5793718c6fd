"""Stored values: what belt wrote is read back as it was, and what is no such value is said in words."""

import pytest

from belt_tasks import storage
from belt_tasks.errors import ConfigError
from belt_tasks.specs import ChunkSpec
from belt_tasks.stored import read_json


def test_a_value_is_read_back_as_it_was(output):
    spec = ChunkSpec(chunk_size=30, stride=15)
    storage.write_bytes(f"{output}/spec.json", spec.model_dump_json().encode())

    assert read_json(f"{output}/spec.json", ChunkSpec, "a spec") == spec


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", r"spec\.json: not a spec that this belt reads \(Invalid JSON: .*\); it is damaged, or another version"),
        (b'{"chunk_size": -1}', r"not a spec that this belt reads \(chunk_size: Input should be greater than"),
        (b'{"new": 1}', r"not a spec that this belt reads \(new: Extra inputs are not permitted\)"),
        (b"\xff\xfe", "not a spec that this belt reads"),
    ],
)
def test_what_is_no_such_value_is_said_in_words(tmp_path, data, words):
    (tmp_path / "spec.json").write_bytes(data)

    with pytest.raises(ConfigError, match=words):
        read_json(str(tmp_path / "spec.json"), ChunkSpec, "a spec")


def test_what_is_not_there_is_said_too(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*/spec\.json: no such file"):
        read_json(str(tmp_path / "spec.json"), ChunkSpec, "a spec")
