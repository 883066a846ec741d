"""A set of CNI calls that the tests of cnisnoop make, and what has to be seen of each. Used live and for recordings.

    python3 -m tests.snoop call DIR          wait for a line on standard input, make the calls with plugins written into DIR, wait again
    sudo python3 -m tests.snoop record       make them under each backend; writes tests/unit/snoop/calls.{bpftrace,strace}

The environment of the calls is empty but for what they need, so that a recording holds nothing of the machine it was made on.
"""

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cnisnoop

RECORDINGS = Path(__file__).parent / "unit" / "snoop"
CONF = {"cniVersion": "1.0.0", "name": "net"}
RESULT = {"cniVersion": "1.0.0", "ips": [{"address": "10.88.0.5/24"}]}
JUNK = b'{"cniVersion": "1.0.0", \xff\xfe\x00\x1b[31m "name": "\xc3\xa9"}'

PLUGINS = {
    "reader": """#!/bin/bash
conf=$(</dev/stdin)
[[ $conf == *cniVersion* ]] || exit 9
printf '{"cniVersion"'
sleep 0.05
printf ': "1.0.0",'
echo ' "ips": [{"address": "10.88.0.5/24"}]}'
""",
    "meta": """#!/bin/bash
conf=$(cat)
result=$("${CNI_PATH%%:*}/ipam" <<<"$conf") || { echo "$result"; exit 1; }
grep -q nothing /dev/null
echo "$result"
""",
    "ipam": """#!/bin/sh
cat >/dev/null
echo a word of the delegate >&2
echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.88.0.5/24"}]}'
""",
    "snake": """#!/usr/bin/env python3
import os, sys
text = os.read(0, 5)
while True:
    more = os.read(0, 5)
    if not more:
        break
    text += more
os.write(1, b'{"code": 11, ')
os.write(1, b'"msg": "later"}')
sys.exit(1)
""",
    "saver": """#!/bin/bash
exec 3<&0 4>&1 </dev/null >/dev/null
echo not to be seen
read -r conf <&3
cat <<<'{"cniVersion": "1.0.0"}' >&4
""",
    "killed": """#!/bin/sh
kill -9 $$
""",
    "silent": """#!/bin/true
""",
    "lost": """#!/nonexistent/interpreter
""",
    "last": """#!/bin/bash
read -r conf
exec "${CNI_PATH%%:*}/ipam" <<<"$conf"
""",
}

# (plugin, command, stdin)
STEPS = (
    ("reader", "ADD", json.dumps(CONF).encode()),
    ("meta", "ADD", json.dumps({**CONF, "prevResult": RESULT, "password": "swordfish"}).encode()),
    ("snake", "CHECK", json.dumps(CONF, indent=1).encode()),
    ("saver", "ADD", json.dumps(CONF).encode() + b"\n"),
    ("killed", "DEL", json.dumps(CONF).encode()),
    ("silent", "DEL", b""),
    ("silent", "DEL", JUNK),
    ("snake", "DEL", JUNK),
    ("lost", "ADD", json.dumps(CONF).encode()),
    ("last", "ADD", json.dumps(CONF).encode() + b"\n"),
)
ARGS = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;LONG=" + "x" * 400


def write_plugins(directory):
    for name, text in PLUGINS.items():
        path = Path(directory) / name
        path.write_text(text)
        path.chmod(0o755)


def environment(directory, command, container_id="c1"):
    return {
        "PATH": "/usr/bin:/bin",
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container_id,
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": ARGS,
        "CNI_NETNS": "/run/netns/nowhere",
        "CNI_PATH": f"{directory}:/usr/lib/cni",
    }


def make_calls(directory, steps=STEPS, container_id="c1"):
    for plugin, command, stdin in steps:
        with contextlib.suppress(OSError, BrokenPipeError):  # "lost" cannot be executed
            subprocess.run(
                [f"{directory}/{plugin}"],
                input=stdin,
                env=environment(directory, command, container_id),
                capture_output=True,
                check=False,
                timeout=30,
            )


def caller(directory):
    """A process that makes the calls when it is given a line: something that strace can attach to."""
    argv = ["/usr/bin/python3", "-m", "tests.snoop", "call", str(directory)]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=env)
    assert process.stdout.readline() == "ready\n"
    return process


def check_calls(calls, directory):
    """Whether what was seen of STEPS is what happened. The recordings and the live tests have to pass the same."""
    assert [(call["plugin"], call["command"]) for call in calls] == [(plugin, command) for plugin, command, _ in STEPS]
    reader, meta, snake, saver, killed, silent, junk, junk_snake, lost, last = calls
    for call in calls:
        assert call["env"] == {key: value for key, value in environment(directory, call["command"]).items() if key != "PATH"}
        assert (call["path"], call["argv"][-1]) == (f"{directory}/{call['plugin']}", f"{directory}/{call['plugin']}")
        assert call["parent"]["pid"] > 0 and not call["incomplete"] and not call["running"]
    assert {call["plugin"]: call["exit"] for call in (reader, meta, saver, silent, last)} == dict.fromkeys(
        ("reader", "meta", "saver", "silent", "last"), 0
    )
    assert reader["stdin"] == json.dumps(CONF) and json.loads(reader["stdout"]) == RESULT and reader["duration_ms"] >= 50
    assert json.loads(meta["stdin"])["prevResult"] == RESULT and json.loads(meta["stdout"]) == RESULT
    assert meta["stderr"] == "a word of the delegate\n"
    (delegate,) = meta["delegates"]
    assert (delegate["plugin"], delegate["command"], delegate["exit"]) == ("ipam", "ADD", 0)
    assert delegate["stdin"].strip() == meta["stdin"] and json.loads(delegate["stdout"]) == RESULT
    assert [(entry["argv"][0], entry["exit"]) for entry in meta["commands"]] == [("cat", 0), ("grep", 1)]
    assert [entry["argv"] for entry in delegate["commands"]] == [["cat"]]
    assert (snake["exit"], snake["stdin"], json.loads(snake["stdout"])["code"]) == (1, json.dumps(CONF, indent=1), 11)
    assert json.loads(saver["stdout"]) == {"cniVersion": "1.0.0"} and saver["stdin"].strip() == json.dumps(CONF)
    assert (killed["exit"], killed["signal"]) == (None, "SIGKILL")
    assert silent["stdin_size"] == junk["stdin_size"] == 0 and silent["stdout"] == ""  # what nobody read nobody has seen
    assert cnisnoop.base64.b64decode(junk_snake["stdin_base64"]) == JUNK and junk_snake["stdin_size"] == len(JUNK)
    assert lost["error"] == "No such file or directory" and lost["exit"] is None
    assert json.loads(last["stdout"]) == RESULT and last["stdin"].strip() == json.dumps(CONF)


def calls_of(events):
    """All calls of events, in the order in which they ended."""
    calls = cnisnoop.Calls()
    return [call for call in map(calls.feed, cnisnoop.take(list(events))) if call]


def recorded(backend):
    """The events of a recording."""
    with gzip.open(RECORDINGS / f"calls.{backend}.gz") as file:
        first, *lines = file.read().splitlines()
    if backend == "bpftrace":
        return list(filter(None, map(cnisnoop.parse_bpftrace, lines)))
    parser = cnisnoop.Strace({int(first): int(first)})
    return [event for line in lines for event in parser.feed(line.decode("latin-1"))]


def own_lines(backend, caller_pid, lines):
    """Without what bpftrace told of other processes of the machine."""
    if backend == "strace":
        return lines
    events = [(line, cnisnoop.parse_bpftrace(line)) for line in lines]
    own = {event[2] for _, event in events if event and event[0] == "begin" and event[4] == caller_pid}
    for _, event in events:
        if event and event[0] == "begin" and event[3] in own:
            own.add(event[2])
    return [line for line, event in events if event and event[2] in own]


def record(backend):
    """Make the calls under a backend and keep what it wrote, behind a line with the process ID of the caller."""
    directory = Path("/tmp/cni-plugins")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    process = caller(directory)
    options = cnisnoop.parse_options(["trace", "--backend", backend, "--pid", str(process.pid)])
    _, argv, environ, _ = cnisnoop.choose_backend(options)
    status = Path(f"/proc/{process.pid}/status")
    with tempfile.TemporaryFile() as out:
        tracer = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL, env={**os.environ, **environ})
        while b"cnisnoop" not in os.pread(out.fileno(), 1 << 20, 0) and f"TracerPid:\t{tracer.pid}\n" not in status.read_text():
            cnisnoop.run(["true"], environ={"CNI_COMMAND": cnisnoop.CANARY})
        process.communicate("go\n", timeout=60)
        time.sleep(1)
        tracer.send_signal(signal.SIGINT)
        tracer.wait(timeout=20)
        out.seek(0)
        lines = [str(process.pid).encode(), *own_lines(backend, process.pid, out.read().splitlines())]
        RECORDINGS.mkdir(exist_ok=True)
        (RECORDINGS / f"calls.{backend}.gz").write_bytes(gzip.compress(b"\n".join(lines), mtime=0))
    shutil.rmtree(directory)


def main(words):
    if words[:1] == ["call"]:
        write_plugins(words[1])
        print("ready", flush=True)
        sys.stdin.readline()
        make_calls(words[1])
        print("done", flush=True)
        sys.stdin.readline()
    elif words == ["record"]:
        for backend in ("bpftrace", "strace"):
            record(backend)
            check_calls(
                [call for call in calls_of(recorded(backend)) if call["path"].startswith("/tmp/cni-plugins/")], "/tmp/cni-plugins"
            )
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
