"""A folder is one process's at a time."""

import subprocess
import sys

import pytest

from common.errors import UsageError
from common.lock import folder_lock


def test_a_held_folder_is_refused_and_a_left_one_is_free(tmp_path):
    folder = tmp_path / "run"
    held = pytest.raises(UsageError, match=rf"another process is writing into {folder}")
    with folder_lock(folder), held, folder_lock(folder):
        pass
    with folder_lock(folder):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from common.lock import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert ended.returncode == -9
    with folder_lock(tmp_path):
        pass
