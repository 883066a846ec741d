"""The runner of test files side by side: what it reports is what pytest would, and a test that takes its process along has failed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST = """
import os, pathlib, pytest, time, warnings

HERE = pathlib.Path(__file__).parent

@pytest.fixture(scope="module")
def thing():
    yield
    (HERE / "torn-down").touch()

def test_passes(thing, figure):
    print("a word on stdout")
    figure("a figure")
    (HERE / "first").touch()
    warnings.warn("a warning")

def test_fails():
    print("a word of the one that fails")
    assert [1, 2] == [1, 3]

def test_is_skipped():
    pytest.skip("it needs a thing")

def test_may_hang_with_a_thing(thing):
    if "HANG" in os.environ:
        (HERE / "hangs-with-a-thing").touch()
        time.sleep(300)
"""
SECOND = """
import os, pathlib, time, pytest

HERE = pathlib.Path(__file__).parent

def wait_for(name):
    deadline = time.monotonic() + 30
    while not (HERE / name).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)

def test_runs_beside_the_first_file():
    (HERE / "second").touch()
    wait_for("first")

@pytest.mark.alone
def test_runs_when_the_others_are_done():
    assert (HERE / "torn-down").exists()

def test_may_end_its_process():
    if "END" in os.environ:
        os._exit(0) if os.environ["END"] == "well" else os.kill(os.getpid(), 9)

def test_may_hang():
    if "HANG" in os.environ:
        (HERE / "hangs").touch()
        time.sleep(300)
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = alone\n")
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\nfrom tests.conftest import pytest_runtestloop\n")
    (tmp_path / "test_first.py").write_text(FIRST)
    (tmp_path / "test_second.py").write_text(SECOND)
    return tmp_path


def run(files, *words, **environ):
    """(exit status, output) of the runner."""
    process = start(files, *words, **environ)
    text = process.communicate(timeout=120)[0]
    return process.returncode, text


def start(files, *words, **environ):
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "--lanes", "2", *words]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.Popen(argv, cwd=files, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def summary(text):
    """The last line without its decoration and the time."""
    return re.fullmatch(r"=+ (.*) in [0-9.]+s( \(.*\))? =+", text.splitlines()[-1]).group(1)


def test_counts_words_and_exit_status_are_those_of_pytest(files):
    code, text = run(files)
    assert (code, summary(text)) == (1, "1 failed, 6 passed, 1 skipped, 1 warning")
    assert "a word of the one that fails" in text and "a word on stdout" not in text and "At index 1 diff" in text
    assert "measured: a figure" in text and "it needs a thing" in text


def test_all_that_is_chosen_passes_or_nothing_is_chosen(files):
    assert run(files, "-k", "passes or beside")[0] == 0
    assert run(files, "-k", "nothing_like_this")[0] == 5


def test_the_first_failure_is_enough_if_so_wished(files):
    code, text = run(files, "-x", "-k", "fails or skipped or hang", HANG="1")
    assert code == 1 and "stopping after 1 failures" in text and summary(text) == "1 failed, 4 deselected"


@pytest.mark.parametrize("how, status", [("well", 0), ("killed", 9)])
def test_a_test_that_ends_its_process_has_failed_and_those_behind_it_did_not_run(files, how, status):
    code, text = run(files, "-k", "runs or may_end or may_hang or passes", END=how)
    assert code == 1 and f"its process ended here with wait status {status}; tests of this file that did not run: 1" in text
    assert summary(text) == "1 failed, 4 passed, 2 deselected, 1 warning"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_what_was_set_up_is_taken_down(files, number):
    process = start(files, HANG="1")
    deadline = time.monotonic() + 60
    while not ((files / "hangs-with-a-thing").exists() and (files / "hangs").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and (files / "torn-down").exists()
    assert summary(text) == "1 failed, 3 passed, 1 skipped, 1 warning"
