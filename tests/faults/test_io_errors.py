"""A disk with input/output errors, at each system call by which the plugin keeps its state, and under the agent's feet.

strace makes the calls fail: this one (once), or this one and all after it (a disk that stays broken). The call says so with code 5, the
attachment is undone or not begun, and what the broken disk kept from being removed goes with the next DEL.
"""

import contextlib
import os
import shutil
import subprocess

import pytest

import mncni
from deploy import lab as labs
from tests.e2e.conftest import is_well, lab_up, node_sh, stream, things, wg_peers
from tests.faults.test_traffic import STATE, ghost_record, status
from tests.integration.conftest import PLUGIN, Host

pytestmark = [pytest.mark.root, pytest.mark.skipif(not shutil.which("strace"), reason="needs strace: apt-get install strace")]

CALLS = ("mkdir", "openat", "flock", "write", "rename", "unlink", "read")
PORTS = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]


@pytest.fixture(scope="module")
def lab():
    with lab_up(f"mncni-io-{os.getpid()}") as made:
        yield made


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path)
    yield made
    made.close()


def state_paths(host):
    """What an ADD of c1's eth0 touches of its own: files, and where they are while they are written."""
    key = mncni.short_hash("net", "c1", "eth0")
    net, ports = f"{host.tmp}/data/net", f"{host.tmp}/run/portmap"
    files = [f"{net}/10.88.0.2", f"{net}/last.0", f"{net}/attachments/{key}", f"{ports}/{key}"]
    locks = [f"{net}/lock", f"{ports}/lock", f"{host.tmp}/run/bridge.lock", f"{host.tmp}/run/attachments/{key[-3:]}"]
    return [*files, *map(mncni.unfinished, files), *locks, *{os.path.dirname(path) for path in [*files, *locks]}]


class Broken:
    """The plugin as a program whose system call number `number` of a name fails, of those on its own files; `lasting`: and all after it."""

    def __init__(self, host, call, number, lasting):
        self.log, self.path = f"{host.tmp}/strace", f"{host.tmp}/broken"
        words = [arg for path in state_paths(host) for arg in ("-P", path)]
        inject = f"inject={call}:error=EIO:when={number}{'+' if lasting else ''}"
        argv = ["strace", "-f", "-qq", "-o", self.log, "-e", f"trace={call}", "-e", inject, *words, PLUGIN]
        with open(self.path, "w") as file:
            file.write(f"#!/bin/sh\nexec {mncni.Command(argv)}\n")
        os.chmod(self.path, 0o755)

    def failed(self):
        """Whether there was such a call."""
        with open(self.log) as file:
            return "(INJECTED)" in file.read()

    def remove(self):
        for path in (self.log, self.path):
            os.unlink(path)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from-then-on"])
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_no_io_error_leaves_anything_behind(host, command, lasting, fault):
    pod, points = host.pod("a"), 0
    conf = host.conf(plugin=["naivewg", "portmap"], runtimeConfig={"portMappings": PORTS})
    host.add(conf, "c0", pod)
    host.cni("DEL", conf, "c0", pod)
    before = host.snapshot()
    for call in CALLS:
        number = 1
        while is_overcome(host, conf, pod, call, Broken(host, call, number, lasting), command):
            assert host.snapshot() == before, f"{command}: {call} number {number}"
            number, points = number + 1, points + 1
    fault(f"{command}: I/O error at each of {points} calls, {'and after it' if lasting else 'once'}", leaks=0)
    assert points > 10


def is_overcome(host, conf, pod, call, broken, command):
    """Whether there was a call to fail; then DEL has removed everything, and with ADD the error was the disk's."""
    reset_marks(host)
    if command == "DEL":
        host.add(conf, "c1", pod)
    exit_code, reply, stderr = host.cni(command, conf, "c1", pod, program=broken.path)
    failed = broken.failed()
    broken.remove()
    assert "Traceback" not in stderr, stderr
    if exit_code:
        assert failed and reply["code"] == 5 and "Input/output error" in reply["msg"], reply
        assert host.tmp in reply["msg"] or call in ("flock", "write"), reply  # which file: a descriptor has no name
        assert host.cni("DEL", conf, "c1", pod)[0] == 0
    elif command == "ADD":
        assert host.cni("DEL", conf, "c1", pod)[0] == 0
    return failed


def reset_marks(host):
    """The search for an address begins anew: each ADD gets the same one, whose file state_paths names."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{host.tmp}/data/net/last.0")


AGENT_FILES = ("nodes.json", ".nodes.json.new", "key", "key.new", ".key.new.new")


@contextlib.contextmanager
def broken_disk(lab, call):
    """This system call of node1's agent fails on its key and its list of nodes, as long as the with block lasts."""
    paths = [word for path in [STATE, *(f"{STATE}/{name}" for name in AGENT_FILES)] for word in ("-P", path)]
    pid = labs.agent_pid(lab.inside("node1", "/"))
    argv = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:error=EIO", *paths, "-p", str(pid)]
    with subprocess.Popen([*labs.node_argv(lab, "node1"), *argv]) as tracer:
        try:
            labs.wait_until(lambda: "TracerPid:\t0\n" not in node_sh(lab, "node1", f"cat /proc/{pid}/status"), 20, "strace")
            yield
        finally:
            # Not the tracer, which is nsenter. Asked to end, strace may wait forever: for a thread that waits for one it has let go of.
            node_sh(lab, "node1", "pkill -KILL -x strace")
            tracer.wait(20)


@pytest.mark.parametrize("call", ["openat", "write", "fsync", "rename"])
def test_io_errors_under_the_agent_are_no_loss(lab, call, fault):
    """A node comes; the key cannot be read, or is gone and cannot be written: the network stays, and the agent says what is wrong until
    the disk works again."""
    before = things(lab, "node1")

    def act():
        key = node_sh(lab, "node1", f"cat {STATE}/key")
        with broken_disk(lab, call):
            labs.write_atomically(lab.store / "new.json", ghost_record(lab, "new", 99, "A"))
            if call in ("write", "rename"):  # the list of nodes is a help: nobody waits for it to be on the disk
                labs.wait_until(lambda: is_told("nodes.json", status(lab)["store"]), 60, "word of the list of nodes")
            if call != "openat":
                node_sh(lab, "node1", f"rm {STATE}/key")
            labs.wait_until(lambda: is_told("key", status(lab)["reason"]), 60, "word of the key")
        labs.wait_until(lambda: len(wg_peers(lab, "node1")) == 2, 60, "peer")
        labs.wait_until(lambda: is_well(lab) and not status(lab)["store"], 60, "agent that is well")
        assert node_sh(lab, "node1", f"cat {STATE}/key") == key
        (lab.store / "new.json").unlink()
        labs.wait_until(lambda: len(wg_peers(lab, "node1")) == 1, 60, "end of the peer")

    [flow] = stream(lab, act, count=500, rate=500)
    fault(f"I/O error at each {call} of the agent", flow.lost, flow.sent, 0, leaks=len(things(lab, "node1") - before))
    assert flow.lost == 0


def is_told(name, text):
    return f"{STATE}/{name}" in text and "Input/output error" in text
