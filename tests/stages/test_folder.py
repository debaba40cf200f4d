"""The folder of a run is one process's at a time, and free again however that process ends."""

import signal
import subprocess
import sys

import pytest

from fettle.core.errors import RegistryError
from fettle.core.home import Home
from fettle.stages.folder import run_folder

HOLD = """
import sys
from pathlib import Path
from fettle.core.home import Home
from fettle.stages.folder import run_folder
with run_folder(Home(Path(sys.argv[1])), "tiny"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_at_a_time_for_each_name(tmp_path):
    home = Home(tmp_path)
    with run_folder(home, "tiny") as root:
        assert root == tmp_path / "runs" / "tiny"
        with pytest.raises(RegistryError, match="one run of 'tiny' at a time"), run_folder(home, "tiny"):
            pass
        with run_folder(home, "other"):
            pass
    with run_folder(home, "tiny"):
        pass


def test_a_run_that_raises_gives_it_back(tmp_path):
    with pytest.raises(ValueError, match="stop"), run_folder(Home(tmp_path), "tiny"):
        raise ValueError("stop")
    with run_folder(Home(tmp_path), "tiny"):
        pass


def test_a_killed_process_gives_it_back(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RegistryError), run_folder(Home(tmp_path), "tiny"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
    with run_folder(Home(tmp_path), "tiny"):
        pass
