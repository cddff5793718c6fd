"""What belt sets for the libraries that it imports, before it does: for flows, and for notebooks."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["flows.fine_tune", "belt_tasks.notebook"])
@pytest.mark.parametrize(("given", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_of_pytorch_soon_sleep_unless_the_user_says_otherwise(module, given, expected):
    """OpenMP itself says what it took from the environment."""
    told = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env={name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
        | {"OMP_DISPLAY_ENV": "VERBOSE"}
        | given,
        capture_output=True,
        text=True,
        check=True,
    ).stderr

    assert f"GOMP_SPINCOUNT = '{expected}'" in told
