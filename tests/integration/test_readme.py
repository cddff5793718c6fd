"""What the README tells people to type works, in the order in which it stands there, after a small demo."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from belt_tasks.demo_corpus import DemoCorpusSpec
from belt_tasks.specs import ChunkSpec, DriftSpec, TrainSpec

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACEHOLDERS = (
    "CORPUS",
    "FILE",
    "DIR_OR_NAME",
    "BELT_NLP_DIR",
    " OUTPUT",
    " REGISTRY",
)  # lines that show a form, not a command

SMALL_DEMO = """
from belt_tasks.demo_corpus import DemoCorpusSpec
from belt_tasks.specs import TrainSpec
from belt_tasks.summaries import demo_summary
from flows.demo import demo
import sys
result = demo(".belt/demo", DemoCorpusSpec.model_validate_json(sys.argv[1]), TrainSpec.model_validate_json(sys.argv[2]))
print(demo_summary(**dict(result)))
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def after_demo(tmp_path_factory):
    """A folder that looks like a checkout after `make demo`, with a small demo."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / ".belt/prefect").mkdir(parents=True)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    (folder / "README.md").write_text(README, encoding="utf-8")
    corpus = DemoCorpusSpec(libraries=("numpy", "prefect"), documents_per_library=32, num_long=0, maximal_words=120)
    training = TrainSpec(chunks=ChunkSpec(maximal_text_length=100), epochs=1, dropout=0.0)
    shown = run([sys.executable, "-c", SMALL_DEMO, corpus.model_dump_json(), training.model_dump_json()], folder)
    (folder / "summary.md").write_text(shown)
    return folder


def run(command, folder):
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PREFECT_HOME": str(folder / ".belt/prefect"), "PREFECT_LOGGING_LEVEL": "CRITICAL"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_demo_says_what_it_did_on_one_screen(after_demo):
    shown = (after_demo / "summary.md").read_text()

    assert re.search(r"^\| score \| 64 \| \d+ \| \d+\.\d s \| [\d,]+ \|$", shown, re.MULTILINE)
    assert "rejected rows: 3 (doc_id_duplicate 1, doc_id_null 1, text_null 1)" in shown
    assert "polars found 64 predictions, DuckDB 64" in shown
    command = re.search(r"^    (\.venv/bin/python .*)$", shown, re.MULTILINE).group(1)
    assert "shape: (64, " in run(["bash", "-c", command], after_demo)
    for path in re.findall(r"`(/[^`*]*)`", shown):
        assert Path(path).exists(), path


def test_every_python_block_runs(after_demo):
    found = blocks("python")

    assert len(found) >= 4
    for block in found:
        run([sys.executable, "-c", block], after_demo)


@pytest.mark.timeout(1200)  # a process each
def test_every_command_runs(after_demo):
    commands = [
        command
        for block in blocks("sh")
        for command in block.replace("\\\n", " ").splitlines()
        if ".venv/bin/belt" in command and not any(word in command for word in PLACEHOLDERS) and "demo\n" not in command
    ]
    commands = [command for command in commands if not command.rstrip().endswith("belt demo")]

    assert len(commands) >= 4
    for command in commands:
        assert run(["bash", "-c", command], after_demo)


def test_the_config_file_is_accepted(after_demo):
    (after_demo / "config.yaml").write_text("".join(blocks("yaml")), encoding="utf-8")  # sections of one file
    command = ".venv/bin/belt score .belt/demo/corpus --checkpoint .belt/demo/model --output .belt/configured"

    assert "## score" in run(["bash", "-c", f"{command} --config config.yaml"], after_demo)


def test_every_command_and_parameter_is_mentioned():
    from flows.cli import app

    for command in app.registered_commands:
        name = (command.name or command.callback.__name__).replace("_", "-")
        assert f"belt {name}" in README
    for parameter in ChunkSpec.model_fields.keys() - {"seed"}:
        assert f"`{parameter}`" in README
    for limit in DriftSpec.model_fields:
        assert f"{limit}: " in README


def test_the_worked_example_is_right():
    import numpy as np
    import torch

    from belt_tasks.pooling import pool_chunks
    from belt_tasks.specs import PoolingSpec
    from belt_tasks.windows import chunk_windows

    windows = chunk_windows(np.array([23]), ChunkSpec(chunk_size=10, stride=6))
    rows = re.findall(r"^\| \d \| (-?[\d.]+) \| (-?[\d.]+) \|$", README, flags=re.MULTILINE)
    logits = torch.tensor([[float(value) for value in row] for row in rows])

    shown = [(int(a), int(b)) for a, b in re.findall(r"█ +\[(\d+), (\d+)\)", README)]
    assert shown == list(zip(windows.start_C.tolist(), windows.stop_C.tolist(), strict=True))
    pooled = {
        strategy: pool_chunks(
            logits,
            torch.zeros(4, dtype=torch.int64),
            torch.from_numpy(windows.new_tokens_C()),
            num_documents=1,
            spec=PoolingSpec(pooling_strategy=strategy),
            task="multiclass",
        )[0].tolist()
        for strategy in ("mean", "max", "length_weighted_mean")
    }
    assert pooled["mean"] == [1.0, 1.0]
    assert pooled["max"] == [2.0, 3.0]
    assert pooled["length_weighted_mean"] == pytest.approx([1.0, 1.35], abs=0.005)
