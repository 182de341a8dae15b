"""Every error of the command is one message with what to do; the traceback is there on request."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustexplain import cli, evaluation, seals
from robustexplain.commands.failure import DEBUG, WarningLines, explained
from robustexplain.errors import (
    DamagedFileError,
    DataWarning,
    InputError,
    RunBusyError,
    ZeroDirectionWarning,
    at_work,
    doing,
    recorded,
)
from robustexplain.evaluation.lock import held

TINY = Path(__file__).parents[1] / "tiny.yaml"
SMALLER = [
    *("--set", "interpreters=[cam, gradient]", "--set", "model.train.epochs=1", "--set", "evaluation.bootstrap=50"),
    *("--set", "defenses=[]", "--set", "attacks=[clean]", "--limit", "4"),
]
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """The command; its exit status and what it wrote to standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(DEBUG, "")  # noted as unset, whatever a test leaves behind

    def called(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["robustexplain", *map(str, words)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(SystemExit) as left:
                cli.main()
        return int(left.value.code or 0), capsys.readouterr().err

    return called


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    root = tmp_path_factory.mktemp("failure") / "run"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["robustexplain", "run", str(TINY), *SMALLER, "--out", str(root)])
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert not left.value.code
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def failing(error: BaseException) -> Callable[..., int]:
    def run(*words: object) -> int:
        with doing("training 'classifier'"):
            raise error

    return run


ERRORS = {
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "cannot write a/b: No space left on"),
    "a quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), 1, "make room, and the same command then goes on"),
    "a read-only disk": (OSError(errno.EROFS, "Read-only file system", "a"), 1, "choose another --out"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "a"), 1, "no access to a: Permission denied"),
    "memory": (MemoryError(), 1, "training 'classifier': out of memory: lower evaluation.batch_size"),
    "the accelerator's memory": (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "lower evaluation.batch_size"),
    "a library": (KeyError("x"), 1, "training 'classifier': KeyError: 'x' (robustexplain --debug ... shows where)"),
    "several lines": (ValueError("one\n\n  two"), 1, "ValueError: one two (robustexplain --debug"),
    "another run": (RunBusyError("is being written"), 1, "is being written"),
    "a damaged file": (DamagedFileError("a is damaged"), 1, "a is damaged"),
    "bad input": (InputError("eps is wrong"), 2, "eps is wrong"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line(case: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    error, status, words = ERRORS[case]
    monkeypatch.setattr(evaluation, "run", failing(error))
    code, said = call("run", TINY)
    assert code == status
    assert said.startswith("error: ")
    assert words in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("how", ["option", "environment"])
def test_the_traceback_is_there_on_request(how: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "run", failing(KeyError("x")))
    if how == "environment":
        monkeypatch.setenv(DEBUG, "1")
    code, said = call(*(["--debug"] if how == "option" else []), "run", TINY)
    monkeypatch.delenv(DEBUG, raising=False)
    assert code == 1
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1].startswith("error: training 'classifier': KeyError")


def test_a_cause_is_found_below_what_was_raised_from_it() -> None:
    wrapped = RuntimeError("worker died")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device", "a/b")
    assert explained(wrapped)[0].startswith("cannot write a/b: No space left")


def test_a_folder_that_was_deleted_under_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError) as raised:
        os.getcwd()
    said = explained(raised.value)[0]
    monkeypatch.chdir(tmp_path)
    assert said == "the folder that this was started in is gone; start it in one that exists"
    assert explained(FileNotFoundError(errno.ENOENT, "No such file", "a"))[0] == "a: No such file"


def test_a_second_run_is_told_so(call: Call, root: Path) -> None:
    with held(root):
        code, said = call("run", TINY, *SMALLER, "--out", root)
    assert code == 1
    assert "is being written by process" in said
    assert call("run", TINY, *SMALLER, "--out", root)[0] == 0


def test_a_finished_run_in_a_directory_that_cannot_be_written_is_shown_elsewhere(
    call: Call, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, for whom permissions do not count, writing is refused by hand."""
    opened = cli.os.open
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def refuses(path: object, flags: int, *words: object, **options: object) -> int:
        if str(path).startswith(str(root)) and flags & (cli.os.O_CREAT | cli.os.O_RDWR | cli.os.O_WRONLY):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("os.open", refuses)
    code, said = call("report", root)
    assert code == 1
    assert "Read-only file system; choose another --out" in said
    assert call("report", root, "--out", tmp_path / "elsewhere") == (0, "")
    kinds = {"csv", "md", "tex", "png", "svg", "pdf"} | ({"parquet"} if importlib.util.find_spec("pyarrow") else set())
    expected = {"report.html", *(f"matrix.{kind}" for kind in kinds)}
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == expected
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(tmp_path / "zero.png")
    assert call("explain", tmp_path / "zero.png", "--run", root)[0] == 0
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_system_of_another_run_is_not_taken_for_this_ones(call: Call, root: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(tmp_path / "zero.png")
    folder = evaluation.RunFolder(root)
    for file in folder.system("cam").iterdir():
        shutil.copyfile(folder.system("gradient") / file.name, file)
    code, said = call("explain", tmp_path / "zero.png", "--run", root)
    assert code == 2
    assert f"{folder.system('cam')} holds another system than expected" in said


def test_report_says_which_files_were_left_out(call: Call, root: Path) -> None:
    path = evaluation.RunFolder(root).cell("cam", "clean")
    seals.write(path, {**seals.read(path), "row": "gradient"}, path.with_suffix(".safetensors"))
    code, said = call("report", root)
    assert code == 1
    assert said == f"left out: {path} is a cell of another place or of another run; `robustexplain run` makes it anew\n"


def test_a_warning_is_one_line_without_a_place_in_the_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = shown
            warnings.warn("two\nlines", DataWarning, stacklevel=1)
            warnings.warn("a library's", UserWarning, stacklevel=1)

    def shown(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, "x.py", 1))

    usual = warnings.formatwarning
    monkeypatch.delenv(DEBUG, raising=False)
    monkeypatch.setattr(cli, "app", app)
    cli.main()
    assert capsys.readouterr().err == "warning: two lines\nwarning: UserWarning: a library's\n"
    assert warnings.formatwarning is usual
    monkeypatch.setenv(DEBUG, "1")
    cli.main()
    assert "x.py:1: DataWarning" in capsys.readouterr().err


def test_what_is_recorded_of_an_error_ends_with_it_and_begins_with_what_was_being_done() -> None:
    with pytest.raises(RuntimeError) as caught, doing("reading the data"), doing("training 'net'"):
        raise RuntimeError("no kernel image")
    lines = recorded(caught.value).splitlines()
    assert lines[:2] == ["while reading the data:", "while training 'net':"]
    assert lines[-1] == "RuntimeError: no kernel image"


def test_warnings_name_the_work_and_those_that_differ_in_numbers_are_said_twice() -> None:
    line = WarningLines()
    with at_work("int (cam)"), doing("training 'int'"):
        said = [line(ZeroDirectionWarning(f"{n} of 32 samples"), ZeroDirectionWarning) for n in (3, 14, 15)]
    assert said[0] == "warning: int (cam): training 'int': 3 of 32 samples\n"
    assert said[1:] == ["warning: int (cam): training 'int': 14 of 32 samples (more of these are not shown)\n", ""]
    with at_work("another"):
        assert line("3 of 32 samples", UserWarning) == "warning: another: UserWarning: 3 of 32 samples\n"
    assert line("two\n  lines", UserWarning) == "warning: UserWarning: two lines\n"


def test_what_was_said_at_length_is_cut_short_for_other_work() -> None:
    line = WarningLines()
    long = "nowhere for {} of 48 samples: " + "why and what to do " * 20 + "end"
    with at_work("first"):
        assert line(long.format(1), UserWarning).endswith("to do end\n")
    with at_work("second"):
        said = line(long.format(2), UserWarning)
    assert said.startswith("warning: second: UserWarning: nowhere for 2 of 48 samples: why and")
    assert said.endswith(" ... (as above)\n")
    assert len(said) < 160
    with at_work("third"):
        assert line("short", UserWarning) == "warning: third: UserWarning: short\n"
    assert line("short", UserWarning) == "warning: UserWarning: short\n"


def test_the_same_warning_of_two_rows_is_said_of_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> int:
        for row in ("first", "second"):
            with at_work(row):
                warnings.warn("moves nowhere", ZeroDirectionWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(evaluation, "run", run)
    monkeypatch.setattr(sys, "argv", ["robustexplain", "run", str(TINY)])
    with warnings.catch_warnings():
        warnings.resetwarnings()
        monkeypatch.setattr(warnings, "showwarning", lambda *words: sys.stderr.write(warnings.formatwarning(*words)))
        with pytest.raises(SystemExit):
            cli.main()
    said = capsys.readouterr().err
    assert "warning: first: moves nowhere" in said
    assert "warning: second: moves nowhere" in said
