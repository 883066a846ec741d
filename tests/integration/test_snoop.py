"""cnisnoop under a real kernel: the same calls with each backend, many at once, bad input, an end at any time, changes, its price."""

import contextlib
import ctypes
import functools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cnisnoop
from deploy import lab as labs
from tests import snoop
from tests.e2e.conftest import lab_up
from tests.integration.conftest import Host

pytestmark = pytest.mark.root
PROGRAM = os.path.realpath(cnisnoop.__file__)
REFERENCE = next((path for path in ("/usr/lib/cni", "/opt/cni/bin") if os.access(f"{path}/bridge", os.X_OK)), "")
needs_reference = pytest.mark.skipif(not REFERENCE, reason="needs the reference plugins: apt-get install containernetworking-plugins")
READY_S, END_S = 400, 30  # bounds, not expectations


def require(backend):
    """Skip, aloud, where a backend cannot be used."""
    try:
        cnisnoop.choose_backend(cnisnoop.parse_options(["trace", "--backend", backend, "--pid", str(os.getpid())]))
    except cnisnoop.SnoopError as error:
        pytest.skip(f"cnisnoop with {backend}: {error}")


class Snoop:
    """A running `cnisnoop.py trace --json`: finish() ends it as Ctrl-C does and returns the calls below a directory."""

    def __init__(self, backend, *words, argv=()):
        # To files: a process that strace holds cannot read from a pipe what is said about it.
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by __exit__
        words = [*(["--backend", backend] if backend else []), *words]
        self.process = subprocess.Popen([*argv, sys.executable, PROGRAM, "trace", "--json", *words], stdout=self.out, stderr=self.err)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()  # what it started ends with it
            self.process.wait()
        self.out.close()
        self.err.close()

    def said(self):
        return os.pread(self.err.fileno(), 1 << 20, 0).decode()

    def wait(self, text, timeout_s=READY_S):
        """Until it says this."""
        deadline = time.monotonic() + timeout_s
        while text not in self.said():
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {text!r}: {self.said()}"
            time.sleep(0.05)
        return self

    def end(self, number=signal.SIGINT):
        """As whoever wants to end it does: the interpreter may lose a signal that comes while it starts, so try again."""
        for _ in range(3):
            self.process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=END_S)
                return
        raise AssertionError(f"three signals did not end it: {self.said()}")

    def finish(self, directory="", may_lose=False):
        self.end()
        assert self.process.returncode == 0 and "Traceback" not in self.said(), self.said()
        assert may_lose or "events lost" not in self.said(), f"this machine makes too many CNI calls beside the tests: {self.said()}"
        self.out.seek(0)
        return [call for call in map(json.loads, self.out) if call["path"].startswith(str(directory))]


@contextlib.contextmanager
def tracing(backend, *words, argv=()):
    require(backend)
    with Snoop(backend, *words, argv=argv) as running:
        yield running.wait("watching with")


@contextlib.contextmanager
def calling(directory):
    """A caller that strace can attach to."""
    process = snoop.caller(directory)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["bpftrace", "strace"])
def backend(request):
    require(request.param)
    return request.param


def descendants(pid):
    """Process IDs below pid."""
    found = []
    with contextlib.suppress(OSError):  # it ended while we looked
        for task in list(Path(f"/proc/{pid}/task").glob("*/children")):
            for child in task.read_text().split():
                found += [int(child), *descendants(child)]
    return found


@pytest.mark.vm  # whose kernel has another verifier of BPF programs
def test_every_call_is_seen_complete_and_nested(backend, tmp_path):
    with calling(tmp_path) as caller, tracing(backend, "--show-secrets", "--pid", str(caller.pid)) as running:
        caller.stdin.write("go\n")
        caller.stdin.flush()
        assert caller.stdout.readline() == "done\n"
        snoop.check_calls(running.finish(tmp_path), tmp_path)


EXECVEAT = """
import ctypes, os, platform, sys
call, directory = ctypes.CDLL(None).syscall, sys.argv[1].encode()
number = 322 if platform.machine() == "x86_64" else 281
words = (b"CNI_COMMAND=ADD", b"CNI_CONTAINERID=c1", b"CNI_PATH=/nowhere:" + directory, b"PATH=/usr/bin:/bin")
print("ready", flush=True)
sys.stdin.readline()
here = os.open(directory, os.O_RDONLY)
os.set_inheritable(here, True)
file = os.open(directory + b"/reader", os.O_RDONLY)
os.set_inheritable(file, True)
for fd, path, flags in ((-100, directory + b"/reader", 0), (here, b"reader", 0), (file, b"", 0x1000), (here, b"lost", 0)):
    stdin, writer = os.pipe()
    os.write(writer, b'{"cniVersion": "1.0.0"}')
    os.close(writer)
    if os.fork() == 0:
        os.dup2(stdin, 0)
        name = path.rpartition(b"/")[2] or b"reader"
        call(number, fd, path, (ctypes.c_char_p * 2)(name, None), (ctypes.c_char_p * 5)(*words, None), flags)
        os._exit(9)
    os.close(stdin)
    os.wait()
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="needs the number of execveat on this machine")
def test_calls_by_execveat_are_seen_with_the_plugins_path(backend, tmp_path):
    """By a path, by one relative to a directory's descriptor, by the descriptor of the program, and one that fails."""
    snoop.write_plugins(tmp_path)
    argv = ["/usr/bin/python3", "-c", EXECVEAT, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as caller:
        while "ready" not in caller.stdout.readline():
            assert caller.poll() is None
        with tracing(backend, "--pid", str(caller.pid)) as running:
            caller.stdin.write("go\n")
            caller.stdin.flush()
            while "done" not in caller.stdout.readline():
                assert caller.poll() is None
            calls = running.finish(tmp_path)
        caller.stdin.close()
    assert [call["path"] for call in calls] == [f"{tmp_path}/{name}" for name in ("reader", "reader", "reader", "lost")]
    assert [(call["plugin"], call["exit"], bool(call["stdout"])) for call in calls[:3]] == [("reader", 0, True)] * 3
    assert calls[3]["error"] == "No such file or directory"


def test_fifty_calls_at_once_are_all_there(backend, tmp_path, figure):
    conf = {**snoop.CONF, "padding": "p" * 2000}
    stdins = [json.dumps({**conf, "number": number}) for number in range(50)]
    snoop.write_plugins(tmp_path)

    def one(number):
        env = snoop.environment(tmp_path, "ADD", f"c{number}")
        subprocess.run([f"{tmp_path}/meta"], input=stdins[number].encode(), env=env, capture_output=True, check=True, timeout=60)

    with tracing(backend, "--pid", str(os.getpid())) as running, ThreadPoolExecutor(50) as pool:
        begin = time.monotonic()
        list(pool.map(one, range(50)))
        took = time.monotonic() - begin
        calls = {call["container_id"]: call for call in running.finish(tmp_path)}
    whole = [number for number in range(50) if is_whole(calls.get(f"c{number}"), stdins[number])]
    figure(f"cnisnoop with {backend}: of 50 calls with a delegate each, at once, in {took:.1f} s, {len(whole)} seen complete")
    assert len(whole) == 50


def is_whole(call, stdin):
    """Whether a call of the plugin `meta` was seen with everything that belongs to it."""
    if not call or (call["stdin"], json.loads(call["stdout"]), call["exit"]) != (stdin, snoop.RESULT, 0):
        return False
    seen = [(entry["plugin"], entry["container_id"], entry["stdin"].strip(), entry["exit"]) for entry in call["delegates"]]
    return seen == [("ipam", call["container_id"], stdin, 0)]


def test_what_is_lost_is_counted_and_said(tmp_path):
    """A backend that gets no processor for a while, and calls on one whose buffer, of 4 MB, is too small for what they write."""
    plugin, processors = tmp_path / "loud", os.sched_getaffinity(0)
    plugin.write_text("#!/bin/bash\nhead -c 65536 /dev/zero | tr '\\0' x\n")
    plugin.chmod(0o755)
    with tracing("bpftrace") as running:
        (child,) = [pid for pid in descendants(running.process.pid) if Path(f"/proc/{pid}/comm").read_text() == "bpftrace\n"]
        os.kill(child, signal.SIGSTOP)
        try:
            os.sched_setaffinity(0, {min(processors)})
            for _ in range(100):
                subprocess.run([plugin], env=snoop.environment(tmp_path, "DEL"), capture_output=True, check=True, timeout=60)
        finally:
            os.sched_setaffinity(0, processors)
            os.kill(child, signal.SIGCONT)
        running.wait("events lost: bpftrace cannot keep up", 120)
        calls = running.finish(tmp_path, may_lose=True)
        said = running.said()
    assert f"running for 5 s: DEL {tmp_path}" not in said
    assert len(calls) < 100 and not any(call["running"] for call in calls)


def test_a_backend_that_ends_by_itself_is_an_error():
    with tracing("bpftrace") as running:
        (child,) = [pid for pid in descendants(running.process.pid) if Path(f"/proc/{pid}/comm").read_text() == "bpftrace\n"]
        os.kill(child, signal.SIGKILL)
        assert running.process.wait(timeout=END_S) == 1 and "bpftrace ended" in running.said()


@pytest.fixture(scope="module")
def lab():
    with lab_up(f"mncni-snoop-{os.getpid()}", nodes=1, families=("ipv4",)) as made:
        yield made


def test_a_pod_of_the_lab_comes_and_goes(lab, backend):
    capabilities = {
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
        "bandwidth": {"ingressRate": 10**7, "ingressBurst": 10**6},
    }
    name = f"web-{os.getpid()}"
    with tracing(backend, "--pid", str(os.getpid())) as running:
        result = labs.add_pod(lab, "node1", name, capabilities)
        labs.del_pod(lab, "node1", name)
        calls = [call for call in running.finish() if cnisnoop.pod_of(call) == f"default/{name}"]  # not those of another lab
    assert [(call["command"], call["plugin"], call["exit"]) for call in calls] == [
        ("ADD", "loopback", 0),
        ("ADD", "mncni", 0),
        ("DEL", "mncni", 0),
        ("DEL", "loopback", 0),
    ]
    add, gone = calls[1:3]
    given, taken = json.loads(add["stdin"]), json.loads(gone["stdin"])
    assert given["plugin"] == ["naivewg", "portmap", "bandwidth", "lat"] and given["runtimeConfig"] == capabilities
    assert json.loads(add["stdout"]) == taken["prevResult"] == result and gone["stdout"] == ""
    assert (add["ifname"], add["netns"]) == ("eth0", f"/run/netns/{name}")
    for call in (add, gone):
        assert {"ip", "tc", "nft"} & {word for entry in call["commands"] for word in entry["argv"]} and not call["incomplete"]
        assert all(entry["exit"] is not None for entry in call["commands"])


def test_a_megabyte_on_stdin_is_shown_cut_with_its_size(backend, tmp_path):
    snoop.write_plugins(tmp_path)
    data = b'{"cniVersion": "1.0.0", "x": "' + b"y" * 1_000_000 + b'"}'
    plugin = tmp_path / "big"
    plugin.write_text("#!/usr/bin/python3 -IS\nimport sys\nsys.stdin.buffer.read()\n")
    plugin.chmod(0o755)
    with tracing(backend, "--pid", str(os.getpid())) as running:
        subprocess.run([plugin], input=data, env=snoop.environment(tmp_path, "DEL"), check=True, timeout=60)
        (call,) = running.finish(tmp_path)
    assert (call["stdin_size"], call["exit"]) == (len(data), 0) and call["stdin"].encode() == data[:65536]


@needs_reference
def test_the_reference_plugins_chained_with_a_delegate_and_the_replay_line_repeats_the_error(host, backend):
    common = {"cniVersion": "0.4.0", "name": "net"}
    ipam = {"type": "host-local", "dataDir": f"{host.tmp}/data", "ranges": [[{"subnet": "10.88.0.0/24"}]]}
    bridge = {**common, "type": "bridge", "bridge": "br0", "isGateway": True, "ipam": ipam}
    ports = {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}
    portmap = {**common, "type": "portmap", "runtimeConfig": ports}
    pod = host.pod("a")

    def call(command, conf):
        return host.cni(command, conf, "c1", pod, program=f"{REFERENCE}/{conf['type']}", CNI_PATH=REFERENCE)

    with tracing(backend, "--pid", str(os.getpid())) as running:
        code, result, stderr = call("ADD", bridge)
        assert code == 0, (result, stderr)
        assert call("ADD", {**portmap, "prevResult": result})[:2] == (0, result)
        code, error, _ = call("ADD", bridge)
        assert [call("DEL", {**conf, "prevResult": result})[0] for conf in (portmap, bridge)] == [0, 0]
        add, chained, again, unmapped, gone = (call for call in running.finish(REFERENCE) if call["netns"] == pod)
    assert json.loads(add["stdout"]) == json.loads(chained["stdout"]) == result and json.loads(add["stdin"]) == bridge
    assert [(entry["plugin"], entry["command"], entry["exit"]) for entry in add["delegates"]] == [("host-local", "ADD", 0)]
    assert json.loads(add["delegates"][0]["stdin"]) == bridge and json.loads(add["delegates"][0]["stdout"])["ips"]
    assert [(call["plugin"], call["exit"]) for call in (add, chained)] == [("bridge", 0), ("portmap", 0)]
    assert code == again["exit"] == 1 and json.loads(again["stdout"]) == error
    assert [(call["plugin"], call["command"]) for call in (unmapped, gone)] == [("portmap", "DEL"), ("bridge", "DEL")]
    assert [entry["command"] for entry in gone["delegates"]] == ["DEL"]
    call("ADD", bridge)
    again["parent"] = {}  # it was this test, which sees what the namespace's shell sees
    line = cnisnoop.replay_line(again)
    done = subprocess.run(["nsenter", f"--net=/run/netns/{host.netns}", "bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, json.loads(done.stdout)["msg"]) == (1, error["msg"])


@pytest.mark.alone
def test_the_changes_of_each_call_on_the_host_and_in_the_pod(host):
    conf, pod = host.conf(cniVersion="1.0.0", ipMasq=True), host.pod("a")
    with tracing("bpftrace", "--changes", argv=["nsenter", f"--net=/run/netns/{host.netns}"]) as running:
        result = host.add(conf, "c1", pod)
        time.sleep(1)  # a pod lives on; what its namespace looks like is read when the call has ended
        limited = {**conf, "plugin": "bandwidth", "ingressRate": 10**6, "ingressBurst": 10**5, "prevResult": result}
        assert host.cni("ADD", limited, "c1", pod)[0] == 0
        time.sleep(1)
        assert host.cni("DEL", conf, "c1", pod)[0] == 0
        time.sleep(1)
        calls = [call for call in running.finish() if call["netns"] == pod]
    veth, address = result["interfaces"][1]["name"], result["ips"][0]["address"]
    add, limit, gone = (call["changes"] for call in calls)
    assert f"veth {veth}" in add and "bridge mncni0" in add and "rules in inet mncni_masq" in add
    assert "pod: " in add and address in add.partition("pod: ")[2] and "eth0" in add
    assert "qdisc tbf" in limit and "veth" not in limit
    assert f"gone: veth {veth}" in gone and address in gone.partition("pod: gone: ")[2]


LENGTH = f"""#!/usr/bin/python3 -IS
import sys
sys.path.append({os.path.dirname(PROGRAM)!r})
import mncni


def add(request, run):
    mncni.apply([mncni.ip_batch([f"link set dev {{request.ifname}} txqueuelen 500 mtu 1400"], request.netns)], run)
    return request.prev_result


mncni.main({{"length": {{"ADD": add, "chained": True}}}})
"""


@pytest.mark.alone
def test_a_change_belongs_to_the_call_that_made_it(host, tmp_path):
    """Settings that are changed right after another's ADD, a failed ADD, a DEL that does nothing right before one that does all."""
    own = tmp_path / "length"
    own.write_text(LENGTH)
    own.chmod(0o755)
    ports = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
    conf = host.conf(plugin=["naivewg", "portmap"], spoofCheck=True, runtimeConfig={"portMappings": ports})
    pod, other = host.pod("a"), host.pod("b")
    host.add(conf, "c0", other)  # so the tables are there
    with tracing("bpftrace", "--changes", argv=["nsenter", f"--net=/run/netns/{host.netns}"]) as running:
        result = host.add({**conf, "runtimeConfig": {"portMappings": [{**ports[0], "hostPort": 8081}]}}, "c1", pod)
        chained = {"cniVersion": "1.1.0", "name": "net", "type": "length", "prevResult": result}
        host.add(chained, "c1", pod, program=str(own))
        assert host.cni("ADD", conf, "c2", pod)[0] == 1  # eth0 is there
        assert host.cni("DEL", chained, "c1", pod, program=str(own))[0] == 0
        assert host.cni("DEL", conf, "c1", pod)[0] == 0
        time.sleep(1)
        calls = [call for call in running.finish() if call["netns"] == pod]
    add, settings, failed, nothing, gone = (call["changes"] for call in calls)
    address, veth = result["ips"][0]["address"], result["interfaces"][1]["name"]
    assert f"host port 8081/tcp -> {address.partition('/')[0]}:80" in add and "8080" not in add and f"veth {veth}" in add
    assert "txqlen of eth0 1000 -> 500" in settings and "host: " not in settings
    assert (failed, nothing) == ("", "")
    assert f"host port 8081/tcp -> {address.partition('/')[0]}:80" in gone.partition("gone: ")[2] and f"veth {veth}" in gone


def test_what_another_pod_or_another_host_does_at_the_same_time_is_not_told_of_a_call(host, tmp_path_factory):
    """Three ADDs and DELs at once, a call in another host's namespace, and a pod whose namespace goes without a DEL."""
    pods, elsewhere = {name: host.pod(name) for name in "abcd"}, Host(tmp_path_factory.mktemp("other"))
    conf = host.conf(cniVersion="1.0.0")
    try:
        other = elsewhere.pod("x")
        with tracing("bpftrace", "--changes", argv=["nsenter", f"--net=/run/netns/{host.netns}"]) as running:
            begun = [host.start("ADD", conf, f"c{name}", pods[name]) for name in "abc"]
            begun.append(elsewhere.start("ADD", elsewhere.conf(cniVersion="1.0.0"), "cx", other))
            results = [json.loads(process.communicate(timeout=60)[0]) for process in begun]
            time.sleep(1)
            for process in [host.start("DEL", conf, f"c{name}", pods[name]) for name in "ab"]:
                process.communicate(timeout=60)
            host.drop(pods["c"])
            host.add(conf, "cd", pods["d"])
            time.sleep(3)  # by then the kernel has removed c's link
            host.cni("DEL", conf, "cd", pods["d"])
            time.sleep(1)
            calls = [call for call in running.finish() if call["netns"] in (*pods.values(), other)]
    finally:
        elsewhere.close()
    links = {call: result["interfaces"][1]["name"] for call, result in zip(("ca", "cb", "cc", "cx"), results)}
    for call in calls:
        own = links.get(call["container_id"], "")
        strangers = [name for name in links.values() if name != own and name in call["changes"]]
        assert not strangers, (call["command"], call["container_id"], call["changes"], links)
        if call["container_id"] == "cx":
            assert own not in call["changes"].partition("pod: ")[0]  # the host of this trace has no such link
        elif own:
            assert f"veth {own}" in call["changes"]


@needs_reference
def test_the_changes_of_plugins_that_start_no_commands(host):
    """The reference plugins speak netlink themselves, and each is called by itself."""
    common, ports = {"cniVersion": "1.0.0", "name": "net"}, [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
    ipam = {"type": "host-local", "dataDir": f"{host.tmp}/data", "ranges": [[{"subnet": "10.88.0.0/24"}]]}
    chain = [{**common, "type": "bridge", "bridge": "br0", "isGateway": True, "ipam": ipam}, {**common, "type": "tuning", "mtu": 1400}]
    chain.append({**common, "type": "portmap", "runtimeConfig": {"portMappings": ports}})
    pod, result = host.pod("a"), None

    def call(command, conf, prev_result):
        given = {**conf, **({"prevResult": prev_result} if prev_result else {})}
        return host.cni(command, given, "c1", pod, program=f"{REFERENCE}/{conf['type']}", CNI_PATH=REFERENCE)

    with tracing("bpftrace", "--changes", argv=["nsenter", f"--net=/run/netns/{host.netns}"]) as running:
        for conf in chain:
            code, result, stderr = call("ADD", conf, result)
            assert code == 0, (result, stderr)
            time.sleep(0.3)  # bridge ends before anybody can have looked into the pod
        for conf in reversed(chain):
            assert call("DEL", conf, result)[0] == 0
        time.sleep(1)
        calls = {(call["command"], call["plugin"]): call["changes"] for call in running.finish() if call["netns"] == pod}
    veth = next(link["name"] for link in result["interfaces"] if link["name"].startswith("veth"))
    assert f"veth {veth}" in calls["ADD", "bridge"] and "10.88.0.2/24" in calls["ADD", "bridge"].partition("pod: ")[2]
    assert calls["ADD", "tuning"] == "pod: mtu of eth0 1500 -> 1400"
    assert "8080/tcp -> 10.88.0.2:80" in calls["ADD", "portmap"] and "pod: " not in calls["ADD", "portmap"]
    assert calls["DEL", "tuning"] == "pod: mtu of eth0 1400 -> 1500"
    assert f"gone: veth {veth}" in calls["DEL", "bridge"] and "veth" not in calls["DEL", "portmap"]


def test_secrets_are_masked_in_the_recording_and_view_prints_it(tmp_path):
    snoop.write_plugins(tmp_path)
    with tracing("bpftrace", "--out", f"{tmp_path}/calls.jsonl", "--plugin", "reader") as running:
        conf = b'{"cniVersion": "1.0.0", "name": "net", "password": "swordfish"}'
        snoop.make_calls(tmp_path, [("reader", "ADD", conf), ("silent", "DEL", b"{}")])
        (call,) = running.finish(tmp_path)
    recording = (tmp_path / "calls.jsonl").read_text()
    assert (tmp_path / "calls.jsonl").stat().st_mode & 0o777 == 0o600
    assert json.loads(call["stdin"])["password"] == "***" and "swordfish" not in recording
    argv = [sys.executable, PROGRAM, "view", f"{tmp_path}/calls.jsonl", "--replay", "always"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "ADD reader  default/web-0 c1 eth0  network net" in done.stdout and "--show-secrets" in done.stdout


def test_a_call_that_hangs_is_told_of_and_shown_at_the_end(backend, tmp_path):
    plugin = tmp_path / "hanging"
    plugin.write_text("#!/bin/bash\nread -r conf\nsleep 600\n")
    plugin.chmod(0o755)
    with tracing(backend, "--pid", str(os.getpid())) as running:
        with subprocess.Popen(
            [plugin], stdin=subprocess.PIPE, env=snoop.environment(tmp_path, "ADD"), start_new_session=True
        ) as process:
            try:
                process.stdin.write(b'{"name": "net"}\n')
                process.stdin.flush()
                running.wait("running for 5 s: ADD", 60)
                (call,) = running.finish(tmp_path)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
    assert call["running"] and call["exit"] is None and json.loads(call["stdin"]) == {"name": "net"}


ENDS = [(when, signal.SIGINT) for when in (0.02, 0.15, 0.5, 1, 2.5, "watching with")]
ENDS += [(when, number) for when in (0.5, "watching with") for number in (signal.SIGTERM, signal.SIGKILL)]


@pytest.mark.parametrize("when, number", ENDS, ids=str)
def test_whatever_ends_it_and_when_nothing_is_left(backend, when, number):
    programs, mounts = traced_programs(), tracing_mounts()
    with Snoop(backend, "--pid", str(os.getpid()), "--changes") as running:
        if when == "watching with":
            running.wait(when)
        else:
            time.sleep(when)
        below = descendants(running.process.pid)
        running.end(number)
        assert "in main" not in running.said()  # no traceback, unless the interpreter was still reading the program
    wait_until(lambda: not [pid for pid in below if is_alive(pid)] and traced_programs() <= programs)
    assert "TracerPid:\t0" in Path("/proc/self/status").read_text() and tracing_mounts() == mounts


def tracing_mounts():
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "tracefs" in line or "bpf" in line]


def wait_until(probe, timeout_s=END_S):
    deadline = time.monotonic() + timeout_s
    while not probe():
        assert time.monotonic() < deadline, "a process or a probe is left"
        time.sleep(0.05)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def traced_programs():
    """The IDs of the programs that the kernel has at tracepoints, as `bpftool prog` lists them."""
    bpf = functools.partial(ctypes.CDLL(None, use_errno=True).syscall, {"x86_64": 321, "aarch64": 280}[platform.machine()])
    found, attributes = set(), (ctypes.c_uint32 * 32)()
    while bpf(11, attributes, 12) == 0:  # BPF_PROG_GET_NEXT_ID: the number before, the number found
        number = attributes[0] = attributes[1]
        handle = bpf(13, (ctypes.c_uint32 * 3)(number), 12)  # BPF_PROG_GET_FD_BY_ID
        if handle >= 0:
            found |= {number} if "prog_type:\t5\n" in Path(f"/proc/self/fdinfo/{handle}").read_text() else set()
            os.close(handle)
    return found


HIDE = 'mount -t tmpfs tmpfs "$0" && mkdir -p "$0/events" && exec "$@"'


def test_a_kernel_without_btf_will_do(tmp_path):
    with tracing("bpftrace", argv=["unshare", "--mount", "sh", "-c", HIDE, "/sys/kernel/btf"]) as running:
        snoop.write_plugins(tmp_path)
        snoop.make_calls(tmp_path, snoop.STEPS[:1])
        (call,) = running.finish(tmp_path)
    assert (call["exit"], json.loads(call["stdout"])) == (0, snoop.RESULT)


def test_a_kernel_without_tracepoints_takes_strace_or_says_so(tmp_path):
    require("strace")
    hidden = ["unshare", "--mount", "sh", "-c", HIDE, "/sys/kernel/tracing", sys.executable, PROGRAM, "trace"]
    done = subprocess.run([*hidden, "--backend", "bpftrace"], capture_output=True, text=True, timeout=READY_S)
    assert done.returncode == 1 and "this kernel has no tracepoints for system calls" in done.stderr
    with Snoop("", "--pid", str(os.getpid()), argv=hidden[:-3]) as running:
        running.wait("watching with strace").finish()


def test_without_root_it_says_so_in_a_line():
    argv = ["setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-", "trace"]
    done = subprocess.run(argv, stdin=open(PROGRAM), capture_output=True, text=True, timeout=60)  # noqa: SIM115
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("cnisnoop: trace needs root: sudo ")
