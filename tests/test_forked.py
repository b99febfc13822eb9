"""What the tests of several processes rest on: one fork server, ports that stay free, and nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import forked
import psutil
import pytest
import torch.distributed as dist
from ranks import Ranks

STOPPED = """
import os, signal, sys
from pathlib import Path
import forked
forked.PRELOAD = []  # for once: what they import is not asked
from faults import Command
command = Command(["--help"], Path(sys.argv[1]))
os.kill(command.processes[0].pid, signal.SIGSTOP)
print(command.processes[0].pid, flush=True)
raise AssertionError("as a test that fails between a command and its wait()")
"""


def runs(pid: int) -> bool:
    """Soon it does not, once it is killed."""
    try:
        psutil.Process(pid).wait(10)
    except psutil.NoSuchProcess:
        return False
    except psutil.TimeoutExpired:
        return True
    return False


def test_a_process_that_a_failed_test_left_does_not_keep_python_from_ending(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    left = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], env=environment, stdout=subprocess.PIPE)
    with forked.ended(left):
        pid = int(left.stdout.readline())
        assert left.wait(timeout=60) == 1
    assert not runs(pid)


def not_preloaded() -> list[str]:
    return sorted(set(forked.PRELOAD) - set(sys.modules))


def test_ranks_have_what_is_preloaded_and_leave_no_folder():
    processes = Ranks(1)
    try:
        assert processes.run(not_preloaded) == [[]]
        folder = Path(processes.folder.name)
        assert folder.is_dir()
    finally:
        processes.close()
    assert not folder.exists()


def test_a_port_is_kept_for_those_who_meet_there():
    with forked.Port() as port:
        for host in ("", "127.0.0.1"):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((host, port))
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        assert store.port == port


def test_a_launcher_is_ended_with_its_workers():
    launcher = subprocess.Popen(["bash", "-c", "setsid sleep 100 & echo $! && wait"], stdout=subprocess.PIPE)
    with pytest.raises(KeyError), forked.ended(launcher):
        worker = int(launcher.stdout.readline())
        raise KeyError
    assert launcher.returncode == -signal.SIGKILL
    assert not runs(worker)
