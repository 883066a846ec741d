"""Hostile input to everything that reads any, tens of thousands of inputs a fuzzer. An input that fails is printed, as small as it gets.

Another seed each time; it is printed, and MNCNI_SEED=... repeats it. MNCNI_INPUTS=... for more or fewer inputs than 20,000 a fuzzer.
Good inputs to begin with are the golden cases' (tests/cases), whose commands also show what a command may look like.
"""

import contextlib
import dataclasses
import functools
import io
import ipaddress
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import agent
import cnisnoop
import kube
import mncni
import nodeipam
from tests import golden
from tests.faults.fuzz import Fence, Fuzz, fuzz
from tests.faults.shapes import inspect
from tests.integration.conftest import PLUGIN, Host
from tests.unit.agent_data import V4, V6, FakeWireGuard, key_of, make_settings, text_of
from tests.unit.test_agent_records import BAD_RECORDS
from tests.unit.test_agent_state import Bench
from tests.unit.test_snoop import sample

COUNT = int(os.environ.get("MNCNI_INPUTS", 20_000))
CODES = {1, 2, 4, 5, 6, 7, 8, 11, 50, 51, 100}  # of docs/plugin.md; a delegate's own pass through


@pytest.fixture(scope="module")
def seed():
    return int(os.environ.get("MNCNI_SEED") or random.SystemRandom().randrange(1 << 32))


class Silence(io.StringIO):
    """A stdout or stderr that remembers what was written in the course of one input. Strict as a real one is about what is no text."""

    def write(self, text):
        text.encode("utf-8", "strict" if self is sys.stdout else "backslashreplace")
        return super().write(text)

    def take(self):
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


@pytest.fixture
def ram(tmp_path):
    """A directory, in memory where there is such a place: files come and go by the hundred thousand."""
    with tempfile.TemporaryDirectory(prefix="mncni-hostile-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as path:
        yield Path(path)


NEVER_FINE = "cnisnoop doctor, cache"  # a node without plugins has findings, always


@pytest.fixture
def feed(seed, figure, ram, monkeypatch):
    """feed(name, make, check): the fuzzer `name` behind a fence around `ram`, its stdout and stderr caught in feed.out, feed.err.
    check returns whether the input was accepted; how many were is part of the figure."""
    monkeypatch.setattr("tempfile.tempdir", str(ram))
    accepted = []

    def run(name, make, check, count=COUNT):
        with Fence(ram) as run.fence:
            run.out, run.err = Silence(), Silence()
            monkeypatch.setattr(sys, "stdout", run.out)
            monkeypatch.setattr(sys, "stderr", run.err)

            def judged(parts):
                run.out.take(), run.err.take(), run.fence.breaches.clear()
                run.fence.configured = lambda path: False
                accepted.append(bool(check(parts)))
                assert not run.fence.breaches, f"outside its directories: {run.fence.breaches[0]}"
                assert "Traceback" not in run.out.getvalue() + run.err.getvalue()

            took_s = fuzz(name, seed, make, judged, count)
        assert any(accepted) or count < 1000 or name == NEVER_FINE, "not one input was taken: the test asks for nothing that works"
        figure(f"hostile input, {name}: {count:,} inputs, {sum(accepted):,} of them taken, in {took_s:.0f} s (MNCNI_SEED={seed})")

    yield run
    logging.disable(logging.NOTSET)


def emptied(directory):
    """The directory, new and empty."""
    if os.path.exists(directory):
        shutil.rmtree(directory)
    os.mkdir(directory)
    return directory


# ---- the plugin: environment and standard input, answers of commands, state ----


def corpus(with_replies=False):
    """[(environment, stdin, files, replies)] of the steps of all golden cases."""
    steps = []
    for path in golden.all_cases():
        for step in golden.parse_case(path.read_text())[1]:
            environ = dict(golden.DEFAULTS)
            for line in step["env"].splitlines():
                name, _, value = line.partition("=") if not line.startswith("called as ") else ("called as", "", line[len("called as ") :])
                environ[name] = value
            if step.get("replies") or not with_replies:
                steps.append((environ, step.get("stdin", ""), step.get("files", ""), golden.parse_replies(step.get("replies", ""))))
    return steps


class Kernel:
    """A `run` that answers as recorded, and looks at what it is asked to do. What nobody recorded is not there, or goes well."""

    def __init__(self, replies):
        self.replies = dict(replies)

    def __call__(self, command):
        inspect(command)
        known = self.replies.get("\n".join(golden.command_lines(command)))
        if known is not None:
            return known
        if command.argv[0].startswith("/"):
            return mncni.Reply(0, json.dumps({"ips": [{"address": "10.9.0.2/24"}]}), "")
        if command.argv[0] == "nft" and "list" in command.argv:
            return mncni.Reply(1, "", "Error: No such file or directory\n")
        return mncni.Reply(0, "", "")


def strict_json(text):
    """The value of a JSON text, read as strictly as others read it."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    def finite(word):
        assert abs(float(word)) != float("inf"), f"{word} is beyond what others read"
        return float(word)

    return json.loads(text, parse_constant=refuse, parse_float=finite)


def judge_answer(exit_code, stdout, delegates=False):
    """Whether a call succeeded. AssertionError unless its answer is one of the protocol's."""
    stdout.encode("utf-8")
    assert exit_code in (0, 1)
    if not stdout:
        assert exit_code == 0, "an error without an object"
        return True
    assert stdout.endswith("\n") and stdout.count("\n") == 1, f"not one line: {stdout[:300]!r}"
    reply = strict_json(stdout)
    assert isinstance(reply, dict)
    if exit_code == 0:
        return True
    assert set(reply) <= {"cniVersion", "code", "msg", "details"} and reply["msg"] and reply["cniVersion"] in mncni.CNI_VERSIONS, stdout[
        :300
    ]
    assert reply["code"] in CODES or (delegates and reply["code"] != 999), stdout[:1000]
    return False


class Plugin:
    """Calls of the plugin in a directory of its own."""

    def __init__(self, feed, ram):
        self.feed, self.names, self.root = feed, golden.Names(ram / "w"), ram / "w"

    def call(self, parts, files, kernel, delegates=False, lay=lambda: None):
        """Whether a call with these variables, called_as and stdin was answered with success. lay: puts more files in place."""
        emptied(self.root)
        (self.root / "netns").symlink_to("/proc/self/ns/net")
        golden.make_files(self.names, files)
        lay()
        shown = {name: self.names.show(text) for name, text in parts.items() if text is not None}
        stdin, called_as = shown.pop("stdin", ""), shown.pop("called as", "mncni")
        environ = {name: text.replace("\0", "") for name, text in shown.items() if name.isidentifier()}  # no variable holds a NUL
        environ["MNCNI_RUN_DIR"] = str(self.root / "run")
        self.feed.fence.configured = lambda path: self.is_configured(stdin, path)
        exit_code, stdout = mncni.answer(environ, stdin, kernel, None, called_as)
        assert not self.feed.out.getvalue(), "printed beside the answer"
        return judge_answer(exit_code, stdout, delegates)

    @staticmethod
    def is_configured(stdin, path):
        """Whether the configuration itself names the place of a path: the directory of the leases, the log."""
        conf = json.loads(stdin)
        data_dir = conf["ipam"].get("dataDir") if isinstance(conf.get("ipam"), dict) else None
        data_dir = os.path.join(data_dir or mncni.DEFAULT_DATA_DIR, conf["name"])
        log = conf.get("logFile") or "/nowhere"
        return (
            path in (os.path.abspath(log), os.path.abspath(f"{log}.1"))
            or (data_dir + "/").startswith(path + "/")
            or path.startswith(os.path.abspath(data_dir) + "/")
        )


@pytest.fixture
def plugin(feed, ram):
    return Plugin(feed, ram)


VARIABLES = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH")
NETNS = (
    "{TMP}/netns",
    "{TMP}/with space",
    "{TMP}/netns type dummy",
    "{TMP}/a'b",
    "{TMP}/ü",
    "/proc/self/ns/net",
    "{TMP}",
    "/proc/1/ns/net",
)
MORE_CONFS = [  # of keys that no golden case has
    {
        "plugin": "naivewg",
        "mtu": 1400,
        "ipMasq": True,
        "clusterCIDRs": ["10.0.0.0/8", "fd00::/8"],
        "logFile": "{TMP}/log",
        "dns": {"search": ["a"]},
        "args": {"cni": {"ips": ["10.88.0.9"], "mac": "02:00:00:00:00:09"}},
        "ipam": {
            "dataDir": "{TMP}/data",
            "resolvConf": "{TMP}/resolv.conf",
            "subnet": "10.88.0.0/24",
            "rangeStart": "10.88.0.9",
            "rangeEnd": "10.88.0.19",
            "gateway": "10.88.0.1",
            "routes": [{"dst": "10.0.0.0/8", "gw": "10.88.0.3", "mtu": 1300, "advmss": 1200, "priority": 5, "table": 100, "scope": 0}],
        },
    },
    {
        "plugin": ["naivewg", "portmap", "bandwidth", "lat"],
        "spoofCheck": True,
        "ipam": {"dataDir": "{TMP}/data", "ranges": [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00::/64"}]]},
        "runtimeConfig": {
            "portMappings": [{"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "192.0.2.1"}],
            "bandwidth": {"ingressRate": 8000, "ingressBurst": 80000, "egressRate": 8000, "egressBurst": 80000},
            "ips": ["10.88.0.7/24"],
            "io.kubernetes.cri.pod-annotations": {"lat": "delay 50ms 10ms 25% loss 1% distribution normal"},
            "mac": "02:00:00:00:00:08",
        },
    },
]


def with_shared_keys(conf):
    return json.dumps({"cniVersion": "1.1.0", "name": "net", **conf})


def test_environment_and_standard_input_of_the_plugin(feed, plugin):
    """All six commands, every plugin: an answer of the protocol, commands of our own making, and nothing written elsewhere."""
    good = corpus() + [
        (dict(golden.DEFAULTS, CNI_COMMAND=verb), with_shared_keys(conf), "resolv.conf\n  nameserver 192.0.2.53\n", [])
        for conf in MORE_CONFS
        for verb in mncni.VERBS
        for _ in range(4)
    ]

    def make(fuzz):
        number = fuzz.randrange(len(good))
        environ, stdin, _, _ = good[number]
        parts = {**environ, "stdin": stdin, "case": str(number)}
        if fuzz.random() < 0.9:
            parts["stdin"] = fuzz.mutated_json(stdin)
        if fuzz.random() < 0.3:
            name = fuzz.choice(VARIABLES)
            parts[name] = fuzz.choice(
                (fuzz.choice(NETNS) if name == "CNI_NETNS" else fuzz.spliced(parts.get(name, "")), fuzz.hostile_text())
            )
        if fuzz.random() < 0.1:
            parts["CNI_COMMAND"] = fuzz.choice((*mncni.VERBS, "VERSION", fuzz.hostile_text()))
        return parts

    def check(parts):
        _, _, files, replies = good[int(parts["case"] or 0)]
        files = "\n".join([*filter(None, files.splitlines()), *(name[len("{TMP}/") :] for name in NETNS[1:5])])
        return plugin.call(parts, files, Kernel(replies), delegates=True)

    feed("stdin and variables of the plugin", make, check)


def test_answers_of_commands_to_the_plugin(feed, plugin):
    """ip, tc, nft and an IPAM plugin that say anything at all: an error that is no defect, and no command made of it."""
    good = [step for step in corpus(with_replies=True) if step[0].get("CNI_COMMAND") != "STATUS"]

    def make(fuzz):
        number = fuzz.randrange(len(good))
        replies = good[number][3]
        which = fuzz.randrange(len(replies))
        parts = {"case": str(number)}
        for index, (_, reply) in enumerate(replies):
            if index == which or fuzz.random() < 0.1:
                parts[f"stdout {index}"] = fuzz.mutated_reply(reply.stdout)
                if fuzz.random() < 0.2:
                    parts[f"stderr {index}"] = fuzz.mutated_text(reply.stderr)
                    parts[f"exit {index}"] = fuzz.choice("012")
        return parts

    def check(parts):
        environ, stdin, files, replies = good[int(parts["case"] or 0)]
        told = []
        for index, (command, reply) in enumerate(replies):
            stdout, stderr, code = (parts.get(f"{name} {index}") for name in ("stdout", "stderr", "exit"))
            stdout, stderr = ((text or "").encode("utf-8", "replace").decode() for text in (stdout or reply.stdout, stderr or reply.stderr))
            told.append((command, mncni.Reply(int(code or reply.exit_code), stdout, stderr)))
        return plugin.call({**environ, "stdin": stdin}, files, Kernel(told), delegates=True)

    feed("answers of commands to the plugin", make, check)


STATE_CONF = with_shared_keys({**MORE_CONFS[1], "ready": "{TMP}/ready"})
STATE_FILES = {  # as an ADD leaves them, and what lies beside them
    "data/net/10.88.0.2": "c1\neth0\n{BOOT_ID}\n",
    "data/net/10.88.0.9": "c9\neth0\n{BOOT_ID}\n",
    "data/net/attachments/KEY": "c1\neth0\n{BOOT_ID}\n10.88.0.2\nfd00::2\n",
    "data/net/last.0": "10.88.0.2\n",
    "run/spoof/KEY": json.dumps({"owner": ["net", "c1", "eth0"], "mac": "0a:58:0a:58:00:02", "addresses": ["10.88.0.2", "fd00::2"]}),
    "run/portmap/KEY": json.dumps(
        {
            "owner": ["net", "c1", "eth0"],
            "since": 5,
            "device": "mncni0",
            "mappings": [{"hostPort": 80, "containerPort": 8080, "hostIP": "192.0.2.1"}],
            "ips": [{"address": "10.88.0.2/24", "interface": 2}],
        }
    ),
    "run/portmap/0123456789abcdef": json.dumps(
        {
            "owner": ["net", "c2", "eth0"],
            "since": 7,
            "device": "mncni0",
            "mappings": [{"hostPort": 53, "containerPort": 53, "protocol": "udp"}],
            "ips": [{"address": "10.88.0.3/24", "interface": 2}],
        }
    ),
    "ready": json.dumps({"bootID": "{BOOT_ID}", "device": "lo", "ok": True, "reason": ""}),
}


def test_state_files_of_the_plugin(feed, plugin, ram):
    """Leases, their index and marks, host ports, the agent's ready file: what makes no sense counts as absent, and leads nowhere else."""
    key = mncni.short_hash("net", "c1", "eth0")

    def make(fuzz):
        parts = {"CNI_COMMAND": fuzz.choice(("ADD", "DEL", "DEL", "GC", "STATUS")), **STATE_FILES}
        for name in fuzz.sample(list(STATE_FILES), fuzz.choice((1, 1, 2))):
            text = STATE_FILES[name]
            parts[name] = fuzz.mutated_json(text) if text.startswith("{") else fuzz.mutated_text(text)
        if fuzz.random() < 0.2:
            directory = fuzz.choice(("data/net/", "data/net/attachments/", "run/portmap/", "run/spoof/"))
            parts[directory + fuzz.hostile_text()[:200].replace("/", "_")] = fuzz.hostile_text()
        return parts

    def check(parts):
        shutil.rmtree(ram / "outside", ignore_errors=True)
        (ram / "outside").mkdir()
        shown = {name: text for name, text in parts.items() if text is not None and "/" in name or name == "ready"}
        lease = ram / "outside" / "lease"
        lease.write_text(f"c1\neth0\n{mncni.boot_id()}\n")

        def lay():
            for name, text in shown.items():
                path = plugin.root / name.replace("KEY", key)
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(plugin.names.show(text or "").encode("utf-8", "surrogatepass"))
                except (OSError, ValueError):  # no name of a file
                    continue

        conf = {**json.loads(STATE_CONF), "cni.dev/valid-attachments": [{"containerID": "c9", "ifname": "eth0"}]}
        call = {**golden.DEFAULTS, "CNI_COMMAND": parts["CNI_COMMAND"] or "DEL", "stdin": json.dumps(conf)}
        taken = plugin.call(call, "", Kernel([]), lay=lay)
        assert lease.exists(), "a file outside was removed"
        mncni.restore_tables(str(plugin.root / "run"), Kernel([]))
        return taken

    feed("state files of the plugin", make, check)


DRIVER = r"""
import json, os, subprocess, sys
for line in sys.stdin:
    environ, stdin = json.loads(line)
    environ = {name.encode("latin-1"): value.encode("latin-1") for name, value in environ.items()}
    done = subprocess.run([sys.argv[1]], input=stdin.encode("latin-1"), env=environ, capture_output=True, timeout=60)
    print(json.dumps([done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")]), flush=True)
"""
SEALED = 'mount --bind "$1" "$1" && for at in / /run /dev/shm; do mount -o remount,bind,ro $at; done 2>/dev/null; shift; exec "$@"'


def refused_input(chance, good, ram):
    """(variables, stdin, answer) of a hostile call that is refused in process; None for one that is not: it would leave a bridge, as it
    should, or tell about itself."""
    environ, stdin = chance.choice(good)
    stdin = chance.mutated_json(stdin) if chance.random() < 0.8 else chance.hostile_text()
    environ = {name: value for name, value in environ.items() if name.isupper()}
    if chance.random() < 0.3:
        environ[chance.choice(VARIABLES)] = chance.hostile_text().replace("\0", "")[:100_000]
    if not environ["CNI_COMMAND"]:
        return None
    apart = golden.Names(emptied(ram / "w"))
    (ram / "w" / "netns").symlink_to("/proc/self/ns/net")
    with Fence(ram):
        refused = mncni.answer({name: apart.show(value) for name, value in environ.items()}, apart.show(stdin), Kernel([]))
    return (environ, stdin, refused) if refused[0] else None


@pytest.mark.root
def test_real_processes_with_garbage_change_nothing(seed, figure, tmp_path, ram):
    """The program itself, in a host of its own whose files it cannot write: what is refused in process is refused, and nothing is left."""
    host, count, fed, place = Host(tmp_path), COUNT // 80, 0, tmp_path / "w"
    argv = [
        "nsenter",
        f"--net=/run/netns/{host.netns}",
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        SEALED,
        "sh",
        str(tmp_path),
    ]
    good = [(environ, stdin) for environ, stdin, _, _ in corpus()]
    names, number = golden.Names(place), 0
    place.mkdir()
    (place / "netns").touch()
    try:
        pod = host.pod("pod")
        host.add(host.conf(), netns=pod)
        host.cni("DEL", host.conf(), netns=pod)
        before = host.snapshot()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([*argv, "/usr/bin/python3", "-c", DRIVER, PLUGIN], **pipes) as driver:
            while fed < count:
                number += 1
                chance = Fuzz(f"processes {seed} {number}")
                found = refused_input(chance, good, ram)
                if not found:
                    continue
                environ, stdin, refused = found
                environ, stdin = {name: names.show(value) for name, value in environ.items()}, names.show(stdin)
                raw = [
                    {key: value.encode("utf-8", "surrogatepass").decode("latin-1") for key, value in environ.items()},
                    stdin.encode("utf-8", "surrogatepass").decode("latin-1"),
                ]
                print(json.dumps(raw), file=driver.stdin, flush=True)
                exit_code, stdout, stderr = json.loads(driver.stdout.readline())
                taken = judge_answer(exit_code, stdout, delegates=True)
                # A DEL of what is not there succeeds, also where the kernel of the try in process had failed.
                assert "Traceback" not in stderr and (not taken or environ["CNI_COMMAND"] == "DEL"), (raw, stdout, stderr, refused)
                assert golden.list_leases(place) == "", raw
                shutil.rmtree(place / "run", ignore_errors=True)
                fed += 1
            driver.stdin.close()
        assert host.snapshot() == before
    finally:
        host.close()
    figure(f"hostile input, real processes: {count} inputs, nothing changed (MNCNI_SEED={seed})")


# ---- configuration files: explain, install --chain, the agent's uninstall, doctor; what libcni keeps; recordings ----


def conflists():
    """Texts of configurations: ours in conf/, the agent's, and others'."""
    texts = [path.read_text() for path in sorted(Path(mncni.__file__).parent.glob("conf/*.conflist"))]
    texts += [agent.conflist(make_settings(), 1400)]
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.22.0.0/16"}]]},
    }
    plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}, {"type": "mncni", "plugin": "lat"}]
    texts += [json.dumps({"cniVersion": "1.0.0", "cniVersions": ["0.4.0", "1.1.0"], "name": "net", "plugins": plugins}, indent=2)]
    texts += [with_shared_keys(conf) for conf in MORE_CONFS] + [json.dumps({"cniVersion": "0.4.0", "name": "single", **bridge})]
    return texts + [json.dumps({"cniVersion": "1.1.0", "name": "n", "plugins": [conf, *plugins[1:]]}) for conf in MORE_CONFS]


def write(path, text):
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def told(act, *arguments):
    """Whether a command did without one of the errors that mncni.command_line shows in words."""
    try:
        act(*arguments)
    except (mncni.CNIError, OSError) as error:
        assert getattr(error, "code", 5) in CODES, f"code {error.code}: {error}"
        return False
    return True


RUNTIMES_LINES = r"\[ -e /run/netns/c1 \] \|\| ip netns add c1|export CNI_[^;&|`$]*"
EXPLAINED_LINE = re.compile(rf"(#.*|{RUNTIMES_LINES}|(CNI_COMMAND=\w+ )?(nsenter|ip|tc|nft|tee|mncni\.py|'?/[^;&|`$]*)( .*|)|)")


def test_explain_of_any_configuration(feed, ram, monkeypatch):
    """A script of our commands and comments, whatever stands in the file."""
    good = conflists()
    explained = mncni.Explainer.__call__
    monkeypatch.setattr(mncni.Explainer, "__call__", lambda self, command: (inspect(command), explained(self, command))[1])

    def make(fuzz):
        return {"conflist": fuzz.mutated_json(fuzz.choice(good)), "command": fuzz.choice(list(mncni.VERBS))}

    def check(parts):
        path = write(ram / "x.conflist", parts["conflist"] or "")
        options = SimpleNamespace(conflist=str(path), command=parts["command"] or "ADD", plugins=mncni.PLUGINS)
        feed.fence.configured = lambda path: path.startswith(mncni.DEFAULT_DATA_DIR)  # a DEL without "ipam" looks for leftovers there
        taken = told(mncni.explain_command, options, None)
        script = re.sub(r" <<'E'( \|\| true)?\n.*?\nE\n", "\n", feed.out.getvalue(), flags=re.DOTALL)
        for line in script.splitlines():
            assert EXPLAINED_LINE.fullmatch(line), f"the script has a line that is not ours: {line[:300]!r}"
        return taken

    feed("explain", make, check)


def test_install_chain_into_any_configuration_and_out_of_it(feed, ram):
    """The list with our plugin at its end, or without it, and all else as it was; or the file untouched. The agent's uninstall reads it."""
    good, settings = conflists(), dataclasses.replace(make_settings(), conf_dir=str(ram / "conf"), bin_dir=str(ram / "bin"))

    def make(fuzz):
        text = fuzz.choice(good)
        return {"conflist": fuzz.mutated_json(text) if fuzz.random() < 0.95 else text, "plugin": fuzz.choice(list(mncni.CHAINED))}

    def check(parts):
        text, plugin = parts["conflist"] or "", parts["plugin"] or "lat"
        path = write(ram / "conf" / "10-x.conflist", text)
        before = path.read_bytes()
        arguments = (plugin, str(ram / "conf"), str(emptied(ram / "backup")))
        taken = told(mncni.chain, *arguments)
        if taken and path.read_bytes() != before:
            was, now = json.loads(text), json.loads(path.read_text())
            assert now == {**was, "plugins": [*was["plugins"], mncni.CHAINED[plugin]]}
            assert told(mncni.chain, *arguments, True) and json.loads(path.read_text()) == was
        else:
            assert path.read_bytes() == before
            told(mncni.chain, *arguments, True)
        told(agent.remove_plugins, settings)
        return taken

    feed("install --chain", make, check)


def is_shown(text):
    """Text fit for a terminal."""
    return all(char.isprintable() or char == "\n" for char in text)


CACHED = {
    "kind": "cniCacheV1",
    "containerId": "c1",
    "config": "e30=",
    "ifName": "eth0",
    "networkName": "net",
    "netns": "/run/netns/c1",
    "result": {"interfaces": [{"name": "eth0", "sandbox": "/run/netns/c1"}], "ips": [{"address": "10.1.2.3/24"}]},
}


def test_doctor_and_cache_of_cnisnoop(feed, ram, monkeypatch):
    """Configurations, cached results, leases, answers of plugins and nft: findings. Only programs of the plugin directory are started."""
    good, started = conflists(), []
    for name in ("mncni", "bridge", "portmap", "host-local", "loopback"):
        write(ram / "bin" / name, "").chmod(0o755)
    write(ram / "outside", "").chmod(0o755)
    answers = {
        "VERSION": json.dumps({"cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}),
        "STATUS": json.dumps({"code": 50, "msg": "not yet"}),
        "nft": json.dumps(
            {"nftables": [{"metainfo": {}}, {"chain": {"family": "ip", "table": "f", "name": "F", "hook": "forward", "policy": "drop"}}]}
        ),
    }
    lease, cached = f"c1\neth0\n{mncni.boot_id()}\n", json.dumps(CACHED)

    def make(fuzz):
        parts = {"conflist": fuzz.choice(good), "cached": cached, "lease": lease, **answers}
        for name in fuzz.sample(list(parts), fuzz.choice((1, 1, 2))):
            parts[name] = fuzz.mutated_text(parts[name]) if name == "lease" else fuzz.mutated_json(parts[name])
        return {**parts, "json": fuzz.choice((None, "yes"))}

    def check(parts):
        def run(argv, stdin="", environ=None, timeout_s=10):
            started.append(argv)
            assert os.path.dirname(argv[0]) == str(ram / "bin") or argv[0] in ("nft", "iptables-legacy", "unshare"), f"starts {argv}"
            assert "/" not in argv[0] or os.path.realpath(argv[0]).startswith(str(ram / "bin") + "/"), f"starts {argv}"
            text = parts.get((environ or {}).get("CNI_COMMAND", argv[0])) or ""
            return int('"code"' in text), text.encode("utf-8", "replace").decode(), ""

        monkeypatch.setattr(cnisnoop, "run", run)
        write(ram / "conf" / "10-x.conflist", parts["conflist"] or "")
        write(ram / "results" / "net-c1-eth0", parts["cached"] or "")
        write(ram / "leases" / "net" / "10.1.2.3", parts["lease"] or "")
        places = {
            "cache_dir": str(ram / "results"),
            "data_dir": [str(ram / "leases")],
            "bin_dir": [str(ram / "bin")],
            "conf_dir": str(ram / "conf"),
        }
        options = SimpleNamespace(json=bool(parts["json"]), **places)
        healthy = cnisnoop.doctor(options) == 0
        assert cnisnoop.cache(options) == 0
        assert is_shown(feed.out.getvalue())
        return healthy

    feed(NEVER_FINE, make, check)
    assert started


QUOTED = re.compile(r"""\$'(?:[^'\\]|\\.)*'|'[^']*'|"'\"""", re.DOTALL)


def test_recordings_that_cnisnoop_views(feed, ram):
    """Calls with anything in them are shown as text, with a shell line that says nothing but what was called; or the line is refused."""
    call = sample(
        exit=1,
        stdout='{"code": 11, "msg": "later"}',
        stderr="oh",
        commands=[{"time": 1.0, "argv": ["ip", "link"], "exit": 1, "signal": "", "duration_ms": 1.5, "stdin": "", "stderr": "no"}],
    )
    good = [
        json.dumps(sample()),
        json.dumps(call),
        json.dumps(sample(delegates=[call], stdin_base64="eyI=", changes="host: x")),
    ]

    def make(fuzz):
        return {"line": fuzz.mutated_json(fuzz.choice(good)), "json": fuzz.choice((None, None, "yes")), "full": fuzz.choice((None, "yes"))}

    def check(parts):
        options = SimpleNamespace(
            file=str(write(ram / "calls", (parts["line"] or "").replace("\n", " "))),
            json=bool(parts["json"]),
            out=None,
            full=bool(parts["full"]),
            replay="always",
            show_secrets=False,
            plugin=None,
            command=None,
            container=None,
            failed=False,
        )
        try:
            cnisnoop.view(options)
        except cnisnoop.SnoopError as error:
            assert is_shown(cnisnoop.printable(str(error)))
            return False
        text, value = feed.out.getvalue(), cnisnoop.parse_object(parts["line"] or "")
        if parts["json"] or not value:
            assert not value or json.loads(text)
            return True
        assert all(char.isprintable() or char in "\n\t" for char in text)
        plain = QUOTED.sub("", cnisnoop.replay_line(value))
        plain = re.sub(r"(?m)^#.*", "", plain).replace("</dev/null", "").partition("  # ***")[0]
        assert re.fullmatch(r"[\w\s|%.,/=:@+-]*", plain), f"the line for a shell says more: {plain[:300]!r}"
        return True

    feed("cnisnoop view", make, check)


# ---- the agent: records, the API, WireGuard, answers of commands, its files ----


HONEST = {f"honest{number}": text_of(number, created="0001-01-01T00:00:00Z") for number in (1, 2, 3)}
RECORDS = [
    text_of(7),
    text_of(7, endpoints=["192.0.2.7", "2001:db8::7"], podCIDRs=["10.244.7.0/24", "fd00:244:7::/64"]),
    text_of(1),
    text_of(2),
]
RECORDS += [text for text, _ in BAD_RECORDS.values() if len(text) < 2000]


def test_records_of_hostile_nodes(feed, ram):
    """Whatever one node says of itself, and whatever the cluster says of it: the peers of honest nodes stay what they are."""
    settings, own_key, own = make_settings(), key_of(999), (V4, V6)
    facts = {
        name: agent.Facts(f"uid-{number}", "0001-01-01T00:00:00Z", (f"10.244.{number}.0/24",)) for number, name in enumerate(HONEST, 1)
    }
    expected = agent.desired_peers(agent.Roster(settings).judge(HONEST, own_key, own)[0], own)
    assert len(expected) == 3

    def make(fuzz):
        parts = {"record": fuzz.mutated_json(fuzz.choice(fuzz.choice((RECORDS, RECORDS[:4])))), "name": "hostile"}
        if fuzz.random() < 0.1:
            parts["name"] = fuzz.choice((fuzz.hostile_text()[:100], "-x", "honest1 ", "Honest1"))
        if fuzz.random() < 0.4:
            known = {"uid": "uid-7", "created": "2024-01-01T00:00:00Z", "podCIDRs": fuzz.choice((None, ["10.244.7.0/24"]))}
            parts["facts"] = fuzz.mutated_json(json.dumps(known)) if fuzz.random() < 0.5 else json.dumps(known)
        return {**parts, "seed": str(fuzz.random())}

    def check(parts):
        roster, name = agent.Roster(settings), parts["name"] or ""
        if name in HONEST or name == settings.node_name:
            return False
        if parts.get("facts"):
            try:
                known = json.loads(parts["facts"])
                cidrs = known["podCIDRs"]
                told = agent.Facts(known["uid"], known["created"], None if cidrs is None else tuple(map(str, kube.parse_cidrs(cidrs))))
            except (ValueError, LookupError, TypeError, RecursionError):
                return False  # nothing that the client would have taken for a Node
            roster.facts = {**facts, name: told}
        records = {**HONEST, name: parts["record"] or ""}
        nodes, quarantine = roster.judge(records, own_key, own)
        peers = agent.desired_peers(nodes, own)
        assert {key: peer for key, peer in peers.items() if peer["name"] in HONEST} == expected
        assert set(nodes) | set(quarantine) == set(records) and not set(quarantine) & set(HONEST)
        assert all(reason.isprintable() and reason.isascii() and len(reason) < 400 for reason in quarantine.values()), quarantine
        for words in agent.plan_peers(peers, {}, {}):
            inspect(mncni.Command(["wg", "set", "mncni-wg0", *words]))
        return name in nodes

    feed("records", make, check)


class Socket:
    """An API server's end of a connection: it answers the first request with the first text, and so on; then it is gone."""

    def __init__(self, said):
        self.said = list(said)

    def settimeout(self, seconds):
        pass

    def sendall(self, data):
        if not self.said:
            raise ConnectionResetError(104, "Connection reset by peer")

    def makefile(self, mode):
        return io.BufferedReader(io.BytesIO(self.said.pop(0)))

    def close(self):
        pass


def api_that_says(*texts):
    """An Api whose server says that, see Socket."""
    import http.client

    end = Socket(texts)

    def connect(server):
        connection = http.client.HTTPConnection("server", 443)
        connection.sock, connection.prefix, connection.auto_open = end, "", 0
        return connection

    api = kube.Api({"server": "https://server", "token": "secret-token"})
    api._connect = connect
    return api


def framed(body, fuzz=None):
    """An HTTP answer with a body, as bytes; with a Fuzz, one that is framed in some wrong way."""
    data = body.encode("utf-8", "surrogatepass")
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    if fuzz is None:
        return head.encode() + data
    kind = fuzz.randrange(8)
    if kind == 0:
        return fuzz.mutated_text(head).encode("utf-8", "surrogatepass") + data
    if kind == 1:
        return (head.encode() + data)[: fuzz.randrange(len(head) + len(data))]
    if kind == 2:
        size = fuzz.choice(("-1", "1e9", "0", "", "0x10", "9" * 30, str(len(data) + 5), "５"))
        return f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode() + data
    if kind == 3:
        sizes = [fuzz.choice(("5", "-1", "fffffffffff", "zz", "", "0")) for _ in range(3)]
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
            f"{size}\r\n".encode() + data[:5] + b"\r\n" for size in sizes
        )
    if kind == 4:
        after = fuzz.choice(("1", "-1", "9" * 20, "9" * 400, "²", "nan", "1e400", "Wed, 21 Oct 2015 07:28:00 GMT", "\x00"))
        code = fuzz.choice(("401", "403", "404", "409", "410", "422", "429", "500", "503", "999", "300", "100", "1000", "-1", "²00", "abc"))
        return f"HTTP/1.1 {code} No\r\nRetry-After: {after}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    if kind == 5:
        return b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * fuzz.choice((1, 101, 1000)) + b"\r\n" + data
    if kind == 6:
        return fuzz.hostile_text().encode("utf-8", "surrogatepass")
    return b"HTTP/1.1 200 OK\r\n" + b"X" * 70_000 + b"\r\n\r\n" + data


def node_object(number, name=None, **spec):
    """A Node as the API has it."""
    metadata = {
        "name": name or f"n{number}",
        "uid": f"uid-{number}",
        "resourceVersion": str(100 + number),
        "creationTimestamp": "2024-01-01T00:00:00Z",
        "annotations": {agent.RECORD: text_of(number)},
        "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:spec": {}}}],
    }
    status = {
        "addresses": [{"type": "InternalIP", "address": f"192.0.2.{number}"}],
        "conditions": [{"type": "NetworkUnavailable", "status": "False", "reason": "X", "lastTransitionTime": "2024-01-01T00:00:00Z"}],
    }
    return {"kind": "Node", "metadata": metadata, "spec": {"podCIDRs": [f"10.244.{number}.0/24"], **spec}, "status": status}


LIST = {"kind": "NodeList", "metadata": {"resourceVersion": "500"}, "items": [node_object(1), node_object(2), node_object(255, "self")]}
EVENTS = [
    {"type": "ADDED", "object": node_object(3)},
    {"type": "MODIFIED", "object": node_object(1)},
    {"type": "DELETED", "object": node_object(2)},
    {"type": "BOOKMARK", "object": {"kind": "Node", "metadata": {"resourceVersion": "900"}}},
    {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}},
]
STATUS = {"kind": "Status", "status": "Failure", "reason": "Forbidden", "message": "nodes is forbidden", "code": 403}


class Enough(BaseException):
    """Ends a thread's loop that never ends."""


class Stopping:
    """In the place of a threading.Event, or of time.sleep: it notes how long a pause would be, and ends the loop."""

    def __init__(self, pauses):
        self.pauses = pauses

    def is_set(self):
        return False

    def wait(self, seconds):
        self.pauses.append(seconds)
        raise Enough


class Work:
    """In the place of a threading.Event: there is work once."""

    left = 1

    def wait(self, timeout=None):
        self.left -= 1
        if self.left < 0:
            raise Enough

    def set(self):
        pass

    clear = set


def make_api_answers(fuzz):
    """A list, a watch, the answer to a patch; one of them hostile, in its text or in its framing."""
    bodies = {
        "list": json.dumps(LIST),
        "watch": "".join(json.dumps({**event, "object": {**event["object"]}}) + "\n" for event in EVENTS),
        "patch": json.dumps(node_object(255, "self")),
        "status": json.dumps(STATUS),
    }
    name = fuzz.choice(("list", "list", "watch", "watch", "patch", "status"))
    bodies[name] = fuzz.mutated_reply(bodies[name]) if name == "watch" else fuzz.mutated_json(bodies[name])
    parts = {key: framed(body).decode("latin-1") for key, body in bodies.items()}
    if name == "status":
        parts["list"] = framed(bodies["status"]).decode("latin-1").replace("200 OK", fuzz.choice(("403 F", "429 T", "500 I", "410 G")))
    if fuzz.random() < 0.3:
        parts[name] = framed(bodies[name], fuzz).decode("latin-1")
    return {**parts, "what": fuzz.choice(("nodes", "own")), "guard": fuzz.choice(("yes", "no"))}


def pass_with(store, settings):
    """What the agent makes of what the store has learned: its own identity, other nodes' records."""
    running = agent.Agent(settings, store, lambda command: inspect(command))
    running.context.endpoints, running.context.public_key = (V4,), key_of(999)
    try:
        adopted, trouble = running.adopt()
    except (mncni.CNIError, OSError):
        adopted = False
    if adopted:
        inspect(mncni.Command(["nft", "-f", "-"], agent.host_firewall(running.settings)))
        inspect(mncni.ip_batch(agent.missing_routes(agent.host_routes(running.settings), [])))
    running.read_store()
    running.judge()


def test_answers_of_the_api_server_to_the_agent(feed, caplog, monkeypatch):
    """Lists, watches, objects, refusals, framing: an ApiError or something understood; what follows from it is a pass without a defect."""
    pauses = []

    monkeypatch.setattr(agent.time, "sleep", Stopping(pauses).wait)
    settings = make_settings(endpoints=())

    def check(parts):
        caplog.clear(), pauses.clear()
        said = [(parts[key] or "").encode("latin-1") for key in ("list", "watch", "patch")]
        api, what = api_that_says(*said[:2]), parts["what"] or "nodes"
        store = agent.KubernetesStore(api, "self")
        store.guard, store.own, store.test_at = parts["guard"] != "no", {}, float("inf")  # no request but the two
        if what == "own":
            store.nodes = {}
        parse, take = (store._parse_node, store._take_nodes) if what == "nodes" else (store._parse_own, store._take_own)
        with contextlib.suppress(Enough):
            kube.follow_nodes(api, parse, take, lambda trouble: store._tell(what, trouble), Stopping(pauses), is_whole=store._is_whole)
        with contextlib.suppress(Enough):
            store.api = api_that_says(said[2])
            store.record, store.condition = text_of(255, uid=(store.own or {}).get("uid")), ("True", "Down", "x")
            store.work = Work()
            store._write()
        assert "a defect" not in caplog.text, caplog.text[-1500:]
        assert "secret-token" not in caplog.text + store.trouble
        assert all(0 <= seconds < 1000 for seconds in pauses), pauses
        with contextlib.suppress(agent.StoreError):
            pass_with(store, settings)
        return bool(store.nodes)

    feed("answers of the API server", make_api_answers, check)


LEASE = {
    "kind": "Lease",
    "metadata": {"name": "l", "namespace": "kube-system", "resourceVersion": "7", "annotations": {nodeipam.USED: "10.244.1.255"}},
    "spec": {"holderIdentity": "other", "leaseDurationSeconds": 1, "leaseTransitions": 3, "renewTime": "2024-01-01T00:00:00Z"},
}


def test_answers_of_the_api_server_to_nodeipam(feed, caplog):
    """Leases, lists and answers to writes: nobody gets what is not free, and no error ends it."""
    pools = {4: (24, (ipaddress.ip_network("10.244.0.0/16"),))}
    new = {**node_object(3), "spec": {}}

    def make(fuzz):
        bodies = {
            "lease": LEASE,
            "taken": LEASE,
            "published": LEASE,
            "list": {**LIST, "items": [node_object(1), new]},
            "patch": node_object(3),
        }
        parts = {name: json.dumps(body) for name, body in bodies.items()}
        name = fuzz.choice(list(parts))
        parts[name] = fuzz.mutated_json(parts[name])
        framed_parts = {name: framed(text, None).decode("latin-1") for name, text in parts.items()}
        if fuzz.random() < 0.2:
            framed_parts[name] = framed(parts[name], fuzz).decode("latin-1")
        return framed_parts

    def check(parts):
        caplog.clear()
        said = {name: (text or "").encode("latin-1") for name, text in parts.items()}
        now = [1000.0]
        api = api_that_says(said["lease"], said["lease"], said["taken"], said["published"], said["patch"])
        election = nodeipam.Election(api, "kube-system/l", "me", lambda: now[0])

        def follow(put, stopping):
            with contextlib.suppress(kube.ApiError):
                put("LIST", api_that_says(said["list"]).list(kube.NODES, take=nodeipam.parse_claim)[0])

        ipam = nodeipam.NodeIpam(api, pools, election, lambda: now[0], follow)
        for _ in range(5):
            now[0] += 3
            ipam.tick(0)
        assert "a defect" not in caplog.text, caplog.text[-1500:]
        given = ipam.counts.figures["mncni_nodeipam_ranges_given_total", ()]
        assert given < 2
        return bool(given)

    feed("answers of the API server to nodeipam", make, check)


LINKS = {
    "mncni0": {
        "ifindex": 5,
        "mtu": 1400,
        "address": "0a:58:0a:f4:ff:01",
        "linkinfo": {"info_kind": "bridge"},
        "ifalias": "mncni",
        "addr_info": [
            {"local": "10.244.255.1", "prefixlen": 24, "scope": "global"},
            {"local": "10.9.9.9", "prefixlen": 24, "scope": "global"},
        ],
    },
    "mncni-host": {
        "ifindex": 6,
        "mtu": 1400,
        "address": "0a:59:00:00:00:01",
        "linkinfo": {"info_kind": "veth"},
        "ifalias": "mncni",
        "addr_info": [],
    },
    "mncni-ns": {
        "ifindex": 7,
        "mtu": 1300,
        "address": "0a:59:00:00:00:02",
        "addr_info": [{"local": "fe80::1", "prefixlen": 64, "scope": "link"}],
    },
    "mncni-wg0": {"ifindex": 8, "mtu": 1420, "link_type": "none", "linkinfo": {"info_kind": "wireguard"}, "addr_info": []},
    "lo": {"ifindex": 1, "mtu": 65536, "address": "00:00:00:00:00:00", "addr_info": []},
    "eth0": {
        "ifindex": 2,
        "mtu": 1500,
        "address": "02:00:00:00:00:02",
        "addr_info": [{"local": "192.0.2.1", "prefixlen": 24, "scope": "global"}],
    },
    "mn0123456789a": {"ifindex": 9, "mtu": 1400, "linkinfo": {"info_kind": "veth"}, "ifalias": "mncni:mncni:c1:eth0", "master": "br0"},
}
for _name, _link in LINKS.items():
    _link.update(ifname=_name, flags=["BROADCAST"] if _name in ("mncni-ns", "mncni-wg0") else ["UP"])
NETCONF = [
    {"family": family, "interface": name, "forwarding": False, "rp_filter": "strict"}
    for family in ("inet", "inet6")
    for name in ("all", "lo")
]
ROUTES = [
    {"dst": "10.244.0.0/16", "gateway": "169.254.28.84", "dev": "mncni-host", "prefsrc": "10.244.255.1"},
    {"dst": "default", "metric": 5},
    {"type": "unreachable", "dst": "10.99.0.0/16", "dev": "lo", "metric": 4278198272},
    {"dst": "10.98.0.0/16", "dev": "eth0"},
]
RULES = [
    {"priority": 0, "src": "all", "table": "local", "protocol": "kernel"},
    {"priority": 284, "src": "all", "dst": "10.99.0.0", "dstlen": 16, "table": "main", "suppress_prefixlen": 15, "protocol": "201"},
    {"priority": 285, "src": "all", "dst": "10.244.0.0", "dstlen": 16, "action": "unreachable", "protocol": "201"},
]
NFT = {
    "nftables": [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "inet", "name": "mncni", "handle": 3}},
        {"counter": {"name": "leaked", "packets": 7, "bytes": 700}},
        {"rule": {"chain": "inbound", "expr": [{"drop": None}]}},
    ]
}
DUMP = "".join(
    "\t".join(line) + "\n"
    for line in (
        (key_of(5), key_of(6), "28384", "off"),
        (key_of(1), "(none)", "192.0.2.1:28384", "10.244.1.0/24", "1700000000", "10", "20", "off"),
        (key_of(9), "(none)", "[2001:db8::9]:28384", "10.244.9.0/24,fd00:244:9::/64", "0", "0", "0", "25"),
    )
)
PRINTED = {  # what a node's tools say; which, see Node
    "links": json.dumps(list(LINKS.values())),
    "netconf": json.dumps(NETCONF),
    "routes": json.dumps(ROUTES),
    "rules": json.dumps(RULES),
    "nft": json.dumps(NFT),
    "dump": DUMP,
    "default": json.dumps([{"dst": "default", "gateway": "fe80::1", "dev": "eth0", "protocol": "ra"}]),
    "get": json.dumps([{"dst": "192.0.2.1", "dev": "eth0", "prefsrc": "192.0.2.1"}]),
}


class Node:
    """A `run` that plays the tools of a node, with what `parts` has them print."""

    def __init__(self, parts):
        self.parts = parts

    def __call__(self, command):
        inspect(command)
        argv = command.argv[2:] if command.argv[0] == "nsenter" else command.argv
        if "list" in argv:
            return mncni.Reply(0, self.printed("nft"), "")
        if argv[:2] == ["wg", "show"]:
            return mncni.Reply(0, self.printed("dump"), "")
        if "-json" in argv:
            return mncni.Reply(0, "".join(self.rows(line.split()) + "\n" for line in command.stdin.splitlines()), "")
        return mncni.Reply(0, "", "")

    def printed(self, name):
        return (self.parts[name] or "").encode("utf-8", "replace").decode()

    def rows(self, words):
        text = self.printed(
            {"netconf": "netconf", "rule": "rules", "route": "routes"}.get(words[0], "links").replace(
                "routes", "get" if words[1] == "get" else "default" if words[-1] == "default" else "routes"
            )
        )
        if words[:2] == ["address", "show"] and len(words) == 4 and text == PRINTED["links"]:  # of one link; a mutated text as it is
            return json.dumps([link for link in LINKS.values() if words[3] in (link["ifname"], "192.0.2.1")])
        return text


def test_answers_of_commands_to_the_agent(feed, ram, caplog):
    """ip, nft and wg that say anything at all: the stage's own error, and no command made of it. The private key is in none of them."""
    settings = make_settings(state_dir=str(ram / "state"), run_dir=str(ram / "run"), mtu=0)
    stages = [
        *agent.FLOOR,
        *(stage for stage in agent.STAGES if stage is not agent.ensure_host_ports),
        functools.partial(agent.ensure_peers, now=0),
        agent.look_device,
    ]
    nodes = agent.Roster(settings).judge(HONEST, key_of(999), (V4,))[0]

    def make(fuzz):
        parts = dict(PRINTED)
        for name in fuzz.sample(list(parts), fuzz.choice((1, 1, 2))):
            parts[name] = fuzz.mutated_text(parts[name]) if name == "dump" else fuzz.mutated_json(parts[name])
        return {**parts, "stage": str(fuzz.randrange(len(stages)))}

    def check(parts):
        stage = stages[int(parts["stage"] or 0)]
        context = agent.Context(settings, Node(parts), "boot", endpoints=(V4,), mtu=1400, sent={})
        context.peers = agent.desired_peers(nodes, (V4,))
        if stage is agent.ensure_identity:
            emptied(settings.state_dir)
        try:
            agent.ensure_host(context)
            context.clash = "" if int(parts["stage"] or 0) % 2 else context.clash
            stage(context)
        except (mncni.CNIError, OSError) as error:
            said = f"{error} {getattr(error, 'details', '')}"
            assert key_of(5) not in said and getattr(error, "code", 5) in CODES, said
            return False
        assert context.mtu > 0 and type(context.mtu) is int
        return True

    feed("answers of commands to the agent", make, check)
    assert key_of(5) not in caplog.text


STATE = {
    "own": {
        "uid": "u",
        "created": "2024-01-01T00:00:00Z",
        "gen": 3,
        "seen": True,
        "text": "{}",
        "podCIDRs": ["10.244.255.0/24"],
        "addresses": ["192.0.2.1"],
    },
    "records": HONEST,
}


def make_agent_files(fuzz, files):
    """The agent's files, one or two of them hostile, and a hostile record under a hostile name."""
    parts = dict(files)
    for name in fuzz.sample(list(files), fuzz.choice((1, 1, 2))):
        parts[name] = fuzz.mutated_text(parts[name]) if name.endswith("key") else fuzz.mutated_json(parts[name])
    parts["name"] = fuzz.choice(("hostile", fuzz.hostile_text()[:100])).replace("/", "_").replace("\0", "_")
    return {
        **parts,
        "record": fuzz.mutated_json(fuzz.choice(RECORDS)),
        "dump": fuzz.mutated_text(DUMP) if fuzz.random() < 0.1 else None,
    }


def test_files_of_the_agent(feed, ram, monkeypatch, caplog):
    """nodes.json, status.json, firewall.json, the ready file, the key, and records in a shared directory under any name: passes go on, the
    status is shown, and a damaged key is the one thing that stops."""
    monkeypatch.setattr(agent, "FLOOR", (agent.ensure_endpoints,))
    monkeypatch.setattr(agent, "STAGES", (agent.ensure_mtu, agent.ensure_identity))
    monkeypatch.setattr(mncni, "install", lambda bin_dir: None)
    monkeypatch.setattr(mncni, "DEFAULT_DATA_DIR", str(ram / "data"))
    bench = Bench(Path(emptied(ram / "good")))
    for name, text in HONEST.items():
        write(ram / "good" / "nodes_dir" / f"{name}.json", text)
    bench.settle()
    files = {name: bench.text(name) for name in ("run_dir/status.json", "run_dir/ready", "state_dir/key")}
    files.update({"state_dir/nodes.json": json.dumps(STATE), "run_dir/firewall.json": json.dumps({"ns": ["table", [{"table": {}}]]})})

    def check(parts):
        caplog.clear()
        os.makedirs(emptied(ram / "x") / "nodes_dir")
        for name in files:
            if parts[name] is not None:
                write(ram / "x" / name, parts[name])
        for name, text in [*HONEST.items(), (parts["name"] or "", parts["record"] or ""), ("self", bench.own.read_text())]:
            with contextlib.suppress(OSError, UnicodeEncodeError):
                write(ram / "x" / "nodes_dir" / f"{name}.json", text)
        device = FakeWireGuard()

        def run(command):
            inspect(command)
            return mncni.Reply(1, "", "Error: No such file or directory\n") if command.argv[0] == "nft" else device(command)

        settings = dataclasses.replace(
            bench.settings, **{key: str(ram / "x" / key) for key in ("nodes_dir", "conf_dir", "bin_dir", "state_dir", "run_dir")}
        )
        shown = agent.look_status(settings, run)
        assert agent.format_status(shown, 0)
        running = agent.Agent(settings, agent.DirectoryStore(settings.nodes_dir), run, clock=lambda: 1000.0)
        stands = running.tick()
        assert "a defect" not in caplog.text, caplog.text[-1500:]
        assert stands or "key" in running.reason, running.reason
        if stands and parts["name"] not in (*HONEST, "self"):
            assert {peer["name"] for peer in running.context.peers.values()} >= set(HONEST)
        if parts["dump"]:
            device.broken = (0, parts["dump"].encode("utf-8", "replace").decode(), "")
        for page in kube.pages(running, agent.look_figures, agent.METRICS).values():
            code, text = page()
            assert code in (200, 503) and text.encode().endswith(b"\n")
        assert not stands or (ram / "x" / "state_dir" / "key").stat().st_mode & 0o777 == 0o600
        return stands

    feed("files of the agent", lambda fuzz: make_agent_files(fuzz, files), check)


# ---- what the fuzzers found, as cases ----

PREV = {"interfaces": [{"name": "v*"}, {"name": "eth0", "sandbox": "/x"}], "ips": [{"address": "10.88.0.2/24", "interface": 1}]}
FOUND = {  # name: (a configuration, the code of the answer, 0 for a result)
    "a number that is infinite to Python": ('{"cniVersion":"1.1.0","name":"n","plugin":"loopback","prevResult":{"ips":[],"x":1e400}}', 6),
    "a star in the name of a host's interface": (
        with_shared_keys(
            {"plugin": "portmap", "prevResult": PREV, "runtimeConfig": {"portMappings": [{"hostPort": 80, "containerPort": 80}]}}
        ),
        0,
    ),
    "a directory of a thousand levels": (
        with_shared_keys({"plugin": "naivewg", "ipam": {"dataDir": "/dev/null" + "/a" * 1500, "subnet": "10.88.0.0/24"}}),
        7,
    ),
    "a rate beyond 32 bits of bytes in 25 ms": (with_shared_keys({"plugin": ["naivewg", "bandwidth"], "egressRate": 6_093_022_208_000}), 0),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_once(plugin, feed, ram, name):
    conf, code = FOUND[name]
    (ram / "w").mkdir()
    (ram / "w" / "netns").symlink_to("/proc/self/ns/net")
    environ = {key: plugin.names.show(value) for key, value in golden.DEFAULTS.items()}
    exit_code, stdout = mncni.answer({**environ, "CNI_COMMAND": "ADD"}, conf, Kernel([]))
    assert (json.loads(stdout)["code"] if exit_code else 0) == code, stdout


def test_a_namespace_whose_path_is_two_words_is_refused_before_anything_is_changed(plugin, ram):
    asked = []
    (ram / "w x").touch()
    environ = {**golden.DEFAULTS, "CNI_COMMAND": "ADD", "CNI_NETNS": str(ram / "w x"), "MNCNI_RUN_DIR": str(ram / "run")}
    exit_code, stdout = mncni.answer(environ, with_shared_keys({"plugin": "naivewg"}), asked.append)
    assert (exit_code, json.loads(stdout)["code"], asked) == (1, 4, [])


@pytest.mark.parametrize(
    "text", ["}", "[1]", '[{"ifname": "lo"}]', '[{"mtu": "1; x"}]', '[{"local": "x"}]', '[{"dst": "10.0.0.0/8 dev x"}]', "[" * 9999]
)
def test_words_of_ip_that_nobody_understands_are_an_error_100(text):
    with pytest.raises(mncni.CNIError, match="cannot understand what ip says") as caught:
        mncni.look_ip(["link show"], lambda command: mncni.Reply(0, text, ""))
    assert caught.value.code == 100


def test_a_wish_of_the_api_server_is_granted_for_five_minutes_at_most():
    refused = b"HTTP/1.1 429 Slow\r\nRetry-After: " + b"9" * 400 + b"\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(kube.ApiError) as caught:
        api_that_says(refused).request("GET", kube.NODES)
    assert caught.value.retry_after_s == kube.LONGEST_WISH_S


@pytest.mark.parametrize("lease", ["{}", '{"metadata":{"resourceVersion":1}}', '{"metadata":{"resourceVersion":"1"},"spec":"x"}', "[]"])
def test_a_lease_that_is_none_is_trouble_and_no_end_of_nodeipam(lease):
    election = nodeipam.Election(api_that_says(framed(lease)), "kube-system/l", "me", lambda: 1000.0)
    election.tick()
    assert "cannot understand the answer" in election.trouble and not election.leads(election.term)


def test_doctor_starts_nothing_outside_the_plugin_directories(tmp_path):
    ((what, _),) = cnisnoop.look_plugin("../../bin/true", {"cniVersion": "1.0.0"}, [str(tmp_path)])
    assert "is not the name of a plugin" in what


def test_metrics_are_served_although_there_is_no_status_file(tmp_path):
    status = agent.look_status(dataclasses.replace(make_settings(), run_dir=str(tmp_path)), None)
    assert agent.plan_metrics({**status, "up": False, "leases": 0})["mncni_quarantined_nodes", ()] == 0
