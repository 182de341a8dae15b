"""One run at a time in a directory: the second is told so at once, and a dead process holds nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustexplain.errors import RobustExplainWarning, RunBusyError
from robustexplain.evaluation import lock
from robustexplain.evaluation.lock import LOCK, held

HOLDER = """
import importlib.util, sys, time
from pathlib import Path
from robustexplain.evaluation.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the directory ``run``."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(words, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_process_that_is_paused_still_holds_it_and_one_that_was_killed_does_not(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    os.kill(other.pid, signal.SIGSTOP)
    with pytest.raises(RunBusyError, match=rf"run is being written by process {other.pid} on .* since 20"):
        held(tmp_path / "run").__enter__()
    other.kill()
    other.wait()
    assert (tmp_path / "run" / LOCK).is_file(), "nobody removed it"
    with held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_second_run_in_this_process_is_refused_and_a_child_holds_nothing(tmp_path: Path) -> None:
    with held(tmp_path):
        with pytest.raises(RunBusyError):
            held(tmp_path).__enter__()
        child = os.fork()
        if child == 0:
            os._exit(0 if not lock._HELD else 1)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(RunBusyError):
            held(tmp_path).__enter__()
    with held(tmp_path):
        pass


@pytest.fixture
def _without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuses)


@pytest.mark.usefixtures("_without_locks")
@pytest.mark.parametrize(
    ("holder", "free"),
    [
        ({"process": 2**22 + 1}, True),
        ({"process": os.getppid()}, False),
        ({"process": 1, "host": "elsewhere"}, False),
        ({"process": "?"}, True),
    ],
)
def test_a_file_system_without_locks_says_so_and_goes_by_the_file(
    tmp_path: Path, holder: dict[str, object], free: bool
) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"host": lock.socket.gethostname(), **holder}))
    outcome = contextlib.nullcontext() if free else pytest.raises(RunBusyError, match="is no more, delete")
    with pytest.warns(RobustExplainWarning, match="has no locks"), outcome, held(tmp_path):
        pass


def test_the_lock_of_a_run_that_came_after_is_left_there(tmp_path: Path) -> None:
    """Somebody deleted the file of a run that goes on, and another one began."""
    path = tmp_path / LOCK
    first = held(tmp_path)
    first.__enter__()
    path.unlink()
    with held(tmp_path):
        first.__exit__(None, None, None)
        assert path.is_file()
        with pytest.raises(RunBusyError), held(tmp_path):
            pass


def test_a_link_in_place_of_the_lock_empties_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / LOCK).symlink_to("precious")
    with pytest.raises(OSError, match=LOCK), held(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "x"
