"""``kill -9`` at any moment, then the same command again: nothing finished is redone, and the result is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parents[1] / "tiny.yaml"
KILLS = 10

# Imports what the command imports, then forks a process for each line that it reads: that process runs the command in
# a session of its own and is the one that is killed. Importing torch ten times would take longer than the runs do.
NURSERY = """
import os, signal, sys, warnings
import torch
torch.set_num_threads(1)
import sklearn.ensemble, skops.io, matplotlib.figure, jinja2, torch._dynamo
import robustexplain.evaluation, robustexplain.evaluation.report, robustexplain.attacks, robustexplain.defenses
import robustexplain.cli
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        # A shell that runs the tests in the background lets them ignore Ctrl-C, which is inherited.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["robustexplain", *line.split("\\0")[:-1]]
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        try:
            robustexplain.cli.main()
        except SystemExit as left:
            os._exit(int(left.code or 0))
        except BaseException:
            os._exit(70)
        os._exit(0)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@dataclass
class Nursery:
    """Starts the command, may kill it, and tells its exit code."""

    process: subprocess.Popen[str]

    def say(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, *words: object) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{word}\0" for word in words) + "\n")
        self.process.stdin.flush()
        return int(self.say())

    def end(self) -> int:
        return int(self.say())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", NURSERY], cwd=ROOT, env=environment, **pipes) as process:  # type: ignore[call-overload]
        made = Nursery(process)
        assert made.say() == "ready"
        yield made
        assert process.stdin is not None
        process.stdin.close()


def finished_cells(root: Path) -> dict[str, int]:
    """When the arrays of each were written; its JSON is written again with what the audit says of it."""
    return {p.stem: p.with_suffix(".safetensors").stat().st_mtime_ns for p in root.glob("cells/*.json")}


def epochs(root: Path) -> dict[str, int]:
    """Finished epochs by checkpoint, from its metadata; whatever bears a checkpoint's name must be whole."""
    found = {}
    for path in root.rglob("training/**/*.safetensors"):
        if path.name.startswith("."):
            continue
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata()
            assert len(json.loads(meta["history"])) == int(meta["epochs"])
        found[str(path.relative_to(root))] = int(meta["epochs"])
    return found


def progress(root: Path) -> int:
    """How much there is: counts files and finished epochs, for choosing the moment of a kill."""
    if not root.is_dir():
        return 0
    return sum(1 for path in root.rglob("*") if path.is_file()) + sum(epochs(root).values())


def wait_for(root: Path, pid: int, amount: int) -> bool:
    """Wait until there is so much; False if the process ended before that."""
    for _ in range(12_000):
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return False
        if progress(root) >= amount:
            return True
        time.sleep(0.01)
    raise AssertionError("no progress within two minutes")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_run_that_is_killed_ten_times_equals_one_that_was_left_alone(nursery: Nursery, tmp_path: Path) -> None:
    """Moments: after a random amount of further progress, plus a random delay, so that writes are hit as well."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    nursery.start("run", TINY, "--out", alone)
    assert nursery.end() == 0
    chance = random.Random(20201)
    kills, stages = 0, set()
    for _ in range(4 * KILLS):
        if kills == KILLS:
            break
        cells, done, had = finished_cells(killed), epochs(killed), progress(killed)
        pid = nursery.start("run", TINY, "--out", killed)
        if wait_for(killed, pid, had + chance.randint(0, 17)):
            time.sleep(chance.uniform(0, 0.06))
            os.kill(pid, signal.SIGKILL)
        ended = nursery.end()
        assert ended in (-signal.SIGKILL, 0)
        kills += ended == -signal.SIGKILL
        after, later = finished_cells(killed), epochs(killed)
        assert cells.items() <= after.items(), "a finished cell was redone or lost"
        assert all(later[name] >= count for name, count in done.items()), "a finished epoch was lost"
        stages.add("cells" if after else "attacks" if (killed / "attacked").is_dir() else "training")
        if ended == 0:
            break
    assert kills == KILLS
    assert len(stages) == 3, f"kills must hit every stage of a run, hit {stages}"
    # The last word is the user's own command, in a process of its own.
    cells, done = finished_cells(killed), epochs(killed)
    words = [sys.executable, "-m", "robustexplain", "run", str(TINY), "--out", str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    last = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr
    assert cells.items() <= finished_cells(killed).items()
    assert (killed / "matrix.csv").read_bytes() == (alone / "matrix.csv").read_bytes()
    assert epochs(killed) == epochs(alone)
    for path in alone.glob("training/**/*.safetensors"):
        mine, theirs = load_file(path), load_file(killed / path.relative_to(alone))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), f"{path.name} differs"


def chunks(root: Path) -> dict[str, int]:
    """Finished batches of attacked and judged inputs, and when each was written."""
    folders = (root / "attacked", root / "judged")
    found = (path for folder in folders for path in folder.rglob("*.safetensors") if not path.name.startswith("."))
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in found}


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_run_loses_no_finished_batch(nursery: Nursery, tmp_path: Path) -> None:
    root, seen = tmp_path / "run", {}
    for least in (1, 4, 9):
        pid = nursery.start("run", TINY, "--out", root)
        for _ in range(60_000):
            if len(chunks(root)) >= least:
                break
            time.sleep(0.002)
        os.kill(pid, signal.SIGINT)
        assert nursery.end() == 130
        now = chunks(root)
        assert seen.items() <= now.items(), "a finished batch was lost or made again"
        assert len(now) >= least
        seen = now
    nursery.start("run", TINY, "--out", root)
    assert nursery.end() == 0


@pytest.mark.slow
def test_a_checkpoint_of_a_finished_epoch_is_gone_on_with_and_not_trained_again(
    nursery: Nursery, tmp_path: Path
) -> None:
    """The epoch counter of each checkpoint rises by one each time it is written."""
    root, seen = tmp_path / "run", [0]
    pid = nursery.start("run", TINY, "--out", root, "--set", "model.train.epochs=6")
    for kill_at in (2, 4):
        for _ in range(60_000):
            now = epochs(root).get("training/classifier.safetensors", 0)
            if now != seen[-1]:
                seen.append(now)
            if now >= kill_at:
                break
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        assert nursery.end() == -signal.SIGKILL
        pid = nursery.start("run", TINY, "--out", root, "--set", "model.train.epochs=6")
    while epochs(root).get("training/classifier.safetensors", 0) < 6:
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    assert nursery.end() == -signal.SIGKILL
    assert seen == sorted(seen), "an epoch was trained again"
