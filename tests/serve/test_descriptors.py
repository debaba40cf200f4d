"""How many connections there is room for, in processes of their own: a limit that was lowered stays so."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from fettle.serve.descriptors import room_for
soft, hard, connections = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(room_for(connections), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "expected"),
    [
        (256, 512, 100, (100, 256)),
        (256, 512, 192, (192, 256)),
        (256, 512, 193, (193, 257)),
        (256, 512, 10_000, (448, 512)),
        (50, 50, 10, (1, 50)),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_needed_and_allowed(soft, hard, connections, expected):
    command = [sys.executable, "-c", SCRIPT, str(soft), str(hard), str(connections)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert tuple(map(int, found.split())) == expected
