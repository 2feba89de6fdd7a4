"""Random calls by threads, signals, forks and processes; `--stress SECONDS` lets it take longer."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from per_td import kernels
from tests.support.stress import KINDS

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_calls_from_everywhere_at_once_break_nothing(kind, request):
    seconds = request.config.getoption("--stress") / len(KINDS) / len(kernels.CHOICES)
    for choice in kernels.CHOICES:
        seed = random.SystemRandom().randrange(10**6)
        command = [sys.executable, "-m", "tests.support.stress", kind, str(seconds), str(seed)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, kernels.VARIABLE: choice},
            capture_output=True,
            text=True,
            timeout=10 * seconds + 120,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}, {choice}: {done.stderr[-3000:]}"
