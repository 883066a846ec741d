"""What every test may use, and when a test is left out, which is never in silence:

    @pytest.mark.root                 needs root and network namespaces
    @pytest.mark.kernel("netem")      needs what some kernels lack, one or more names of FEATURES
    @pytest.mark.vm                   is worth a run over the kernel's own WireGuard, too
    @pytest.mark.alone                measures time, or watches the whole machine: no other test runs beside it, see tests/lanes.py

`make test-vm` runs those with one of the last two marks in a virtual machine whose kernel has everything; there a test that is left out
has failed (--no-skips).
"""

import functools
import os
import subprocess

import pytest

import mncni
from tests.lanes import pytest_runtestloop  # noqa: F401 (a hook)

IS_ROOT = os.geteuid() == 0

# A feature of the kernel -> a command that works only where it is. It is run in a network namespace that is gone afterwards.
FEATURES = {
    "br_netfilter": "test -e /proc/sys/net/bridge/bridge-nf-call-iptables",
    "clock": "test -n \"$MNCNI_VM\"",  # one that a test may set
    "nft_queue": "nft 'table inet probe { chain probe { type filter hook postrouting priority 0; queue num 98; }; }'",
    "netem": "tc qdisc add dev lo root netem",
    "sctp": "/usr/bin/python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)'",
    "wireguard": "ip link add probe type wireguard",
}


@functools.cache
def kernel_has(feature):
    """Whether the kernel has one of FEATURES. Asking for it is what loads a module. As root."""
    argv = ["unshare", "--net", "sh", "-c", FEATURES[feature]]
    return subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60).returncode == 0


@pytest.fixture(autouse=True)
def own_directories(tmp_path_factory, monkeypatch):
    """No test of this process uses the directories that a node has for its leases and its state."""
    monkeypatch.setattr(mncni, "DEFAULT_DATA_DIR", str(tmp_path_factory.getbasetemp() / "no-leases"))
    monkeypatch.setattr(mncni, "DEFAULT_RUN_DIR", str(tmp_path_factory.getbasetemp() / "no-run"))


def pytest_addoption(parser):
    parser.addoption("--lanes", type=int, default=1, help="how many test files run at once: see tests/lanes.py")
    parser.addoption("--no-skips", action="store_true", help="a test that would be skipped fails: see tests/vm.sh")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("root") and not IS_ROOT:
            item.add_marker(pytest.mark.skip(reason="needs root and network namespaces: sudo make test"))


def pytest_runtest_setup(item):
    for mark in item.iter_markers("kernel"):
        for feature in mark.args:
            if not kernel_has(feature):
                pytest.skip(f"needs {feature} in the kernel: sudo make test-vm")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.skipped and item.config.getoption("no_skips"):
        report.outcome, report.longrepr = "failed", f"skipped where nothing may be: {report.longrepr[2]}"


def pytest_terminal_summary(terminalreporter):
    """Figures that tests measured, for people: see the fixtures `figure` and `fault`."""
    for text in getattr(terminalreporter.config, "figures", []):
        terminalreporter.write_line(f"measured: {text}")
    faults = getattr(terminalreporter.config, "faults", [])
    for line in format_table([FAULT_COLUMNS, *faults]) if faults else []:
        terminalreporter.write_line(line)


FAULT_COLUMNS = ("fault", "packets lost", "in clear", "time to heal", "leaks")


def format_table(rows):
    """Lines of a table: the first column on the left, the others, which are numbers, on the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]) for row in rows]


@pytest.fixture(scope="session")
def figure(request):
    """figure("text"): print a measured figure at the end of the run."""
    request.config.figures = getattr(request.config, "figures", [])
    return request.config.figures.append


@pytest.fixture(scope="session")
def fault(request):
    """fault("agent killed", lost=0, sent=10_000, clear=0, heal_s=1.2, leaks=0): a row of the table of faults at the end of the run.

    lost, sent, clear: packets; heal_s: seconds until all was as before; leaks: objects and files left behind. Leave out the unmeasured.
    """
    request.config.faults = getattr(request.config, "faults", [])

    def row(name, lost=None, sent=None, clear=None, heal_s=None, leaks=None):
        of = f" of {sent}" if sent else ""
        cells = (lost if lost is None else f"{lost}{of}", clear, heal_s if heal_s is None else f"{heal_s:.1f} s", leaks)
        request.config.faults.append((name, *("" if cell is None else str(cell) for cell in cells)))

    return row
