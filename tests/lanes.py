"""Test files side by side: `pytest --lanes 4` runs four at once, each in a forked process of its own, and reports each when it is done.

Output, counts and exit status are pytest's own: the reports of all processes are given to the one that the user started. Tests marked
`alone` measure time, or watch the whole machine. They run last, one file at a time.
"""

import ctypes
import os
import pickle
import signal
import sys
import tempfile
import traceback

import pytest
from _pytest.runner import runtestprotocol

LONGEST = ("test_snoop.py", "test_nodeipam.py", "test_healing.py", "test_kubernetes.py")  # begin first: they are what all wait for
KEPT = ("figures", "faults")  # lists in the configuration that tests add to, see tests/conftest.py
PR_SET_PDEATHSIG = 1  # prctl(2)


def pytest_runtestloop(session):
    """Run the tests of a session, or return None: then pytest's own loop does it."""
    option = session.config.option
    files = {}
    for item in session.items:
        files.setdefault((bool(item.get_closest_marker("alone")), item.path), []).append(item)
    if option.lanes < 2 or len(files) < 2 or option.collectonly or option.usepdb or session.testsfailed:
        return None
    session.config._tmp_path_factory.getbasetemp()  # made here, so that one process removes it
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))
    try:
        together = [(path, items) for (alone, path), items in reversed(files.items()) if not alone]  # tests/unit last: they fill the gaps
        together.sort(key=lambda file: file[0].name not in LONGEST or file[0].parent.name == "unit")
        run_files(session, [items for _, items in together], option.lanes)
        run_files(session, [items for (alone, _), items in files.items() if alone], 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    return True


def run_files(session, waiting, lanes):
    """Run lists of tests, so many lists at once. Whatever ends this ends their processes."""
    running = {}  # process ID -> (tests, file of results)
    try:
        while waiting or running:
            while waiting and len(running) < lanes:
                items, results = waiting.pop(0), tempfile.TemporaryFile()  # noqa: SIM115 (closed when it is read)
                running[start(session, items, results)] = items, results
            pid, status = os.wait()
            if pid in running:
                report(session, *running.pop(pid), status)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGINT)
        for pid, (items, results) in running.items():
            os.waitpid(pid, 0)
            report(session, items, results, None)


def report(session, items, results, status):
    """Tell pytest what a process found. A test that ended the process has failed. status: its wait status, None if it was told to end."""
    hook, left = session.config.hook, {item.nodeid: item for item in items}
    with results:
        results.seek(0)
        while True:
            try:
                kind, content = pickle.load(results)
            except (EOFError, pickle.UnpicklingError):
                break
            if kind == "warning":
                hook.pytest_warning_recorded.call_historic(kwargs=content)
            elif kind == "kept":
                for name, rows in content.items():
                    setattr(session.config, name, [*getattr(session.config, name, []), *rows])
            else:
                found = hook.pytest_report_from_serializable(config=session.config, data=content)
                log(hook, found)
                if found.when == "teardown":
                    del left[found.nodeid]
    if status or (left and status == 0 and not session.shouldfail):
        item = next(iter(left.values()), items[-1])
        why = f"its process ended here with wait status {status}; tests of this file that did not run: {max(0, len(left) - 1)}"
        log(hook, pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call"))


def log(hook, found):
    if found.when == "setup":
        hook.pytest_runtest_logstart(nodeid=found.nodeid, location=found.location)
    hook.pytest_runtest_logreport(report=found)
    if found.when == "teardown":
        hook.pytest_runtest_logfinish(nodeid=found.nodeid, location=found.location)


# ---- in the forked process ----


def start(session, items, results):
    """The ID of a process that runs the tests and writes what it finds into the file."""
    sys.stdout.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGINT, interrupted_once)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() == parent:
            run_here(session, items, results)
            status = 0
    except (KeyboardInterrupt, pytest.exit.Exception):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        results.flush()
        sys.stdout.flush()
        os._exit(status)


def interrupted_once(*_):
    """Ctrl-C reaches all processes of the terminal, and the parent passes it on. The second must not stop the tidying up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_here(session, items, results):
    config, option = session.config, session.config.option
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()  # it writes into a file that all processes would share
    capture.start_global_capturing()
    capture.suspend_global_capture()
    for name in KEPT:
        setattr(config, name, [])
    recorder = Recorder(config)
    config.pluginmanager.register(recorder)  # which tells it of all warnings so far
    recorder.results = results
    try:
        for item, following in zip(items, [*items[1:], None]):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if option.maxfail and recorder.failed >= option.maxfail:
                break
    finally:
        recorder.write("kept", {name: getattr(config, name) for name in KEPT})
        session._setupstate.teardown_exact(None)


class Recorder:
    """A plugin that writes reports and warnings into a file, in place of what would print them."""

    def __init__(self, config):
        self.config, self.results, self.failed = config, None, 0

    def write(self, kind, content):
        if self.results:
            pickle.dump((kind, content), self.results)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        for found in runtestprotocol(item, nextitem=nextitem, log=False):
            self.failed += found.failed
            self.write("report", self.config.hook.pytest_report_to_serializable(config=self.config, report=found))
        self.results.flush()
        return True

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        self.write("warning", dict(warning_message=warning_message, when=when, nodeid=nodeid, location=location))
