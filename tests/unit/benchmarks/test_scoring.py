"""The command: wrong options are told in a sentence, and two peers with a tiny model go all the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from belt_tasks.errors import ConfigError
from tests.benchmarks.peers import PEERS
from tests.benchmarks.scoring import check
from tests.conftest import labelled_rows

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"documents": 0}, "--documents must be at least 1, got 0"),
        ({"rounds": -1}, "--rounds must be at least 1, got -1"),
        ({"chunk_size": 0}, "--chunk-size must be at least 1, got 0"),
        ({"chunk_size": 10, "stride": 20}, r"--stride must be at most --chunk-size \(10\), got 20"),
        ({"peers": "belt,nobody"}, "--peers must name some of belt, .*, got nobody"),
        ({"peers": " , "}, "--peers must name some of belt, .*, got none"),
        ({"model": Path("/nowhere")}, "--model must be the folder of an encoder, got /nowhere: there is no such"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        check(**{"output": tmp_path, **wrong})


def test_what_is_left_open_is_filled_in(tmp_path):
    quick = check(output=tmp_path, model=tmp_path)
    full = check(output=tmp_path, model=tmp_path, full=True, rounds=2)

    assert [(chunks.chunk_size, chunks.stride) for chunks in quick.chunks] == [(510, 510)]
    assert [(chunks.chunk_size, chunks.stride) for chunks in full.chunks] == [(510, 510), (510, 255)]
    assert set(quick.peers) < set(full.peers) == set(PEERS)
    assert (quick.num_rounds, full.num_rounds) == (3, 2)
    assert check(output=tmp_path, model=tmp_path, peers="hf-loop, belt,belt").peers == ("hf-loop", "belt")


@pytest.mark.slow
def test_two_peers_go_all_the_way(tiny_encoder, write_corpus, tmp_path):
    (corpus,) = Path(write_corpus(labelled_rows(30))).iterdir()
    output = tmp_path / "out"
    command = [sys.executable, "-m", "tests.benchmarks.scoring", "--corpus", corpus, "--model", tiny_encoder]
    options = ["--documents", "12", "--rounds", "2", "--chunk-size", "30", "--stride", "20", "--peers", "belt,hf-loop"]

    result = subprocess.run(
        [*command, *options, "--output", output], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr
    figures = json.loads((output / "scoring.json").read_text())
    (scored,) = figures["corpora"]
    assert scored["title"] == "part-0, 30/20"
    belt, loop = scored["peers"]
    assert len(belt["rounds"]["seconds"]) == len(loop["rounds"]["seconds"]) == 2
    assert belt["asked"]["num_documents"] == 12
    assert belt["largest_difference"] < 1e-5
    assert loop["belt_ratio"]["fp32"] == pytest.approx(loop["seconds"] / belt["seconds"])
    assert belt["peak_rss_bytes"] > 1e7
    assert len(scored["ceilings_flops_per_s"]) == 2
    assert figures["versions"]["torch"]
    assert figures["machine"]["cores"] >= 1
    assert (output / "scoring.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "scoring.md").read_text().strip() == result.stdout.strip()
    assert sorted(path.name for path in output.iterdir()) == ["logs", "scoring.json", "scoring.md", "scoring.png"]
