"""The kernel of Triton without a GPU: tests of the transport in a process that interprets it"""
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_triton_in_its_interpreter():
    pytest.importorskip("triton")
    chosen = (
        "triton and (equals_the_oracle or equal_the_oracle or nan-targets or regularisation or "
        "of_pot or rebuild)"
    )
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen,
            "tests/test_transport.py",
        ],
        cwd=Path(__file__).parents[1], env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
