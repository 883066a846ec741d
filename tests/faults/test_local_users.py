"""What an ordinary user of the node, or the author of a conflist, can do to root's programs: calls of every shape that cnisnoop sees, files
that it is led to, conflists that `explain` reads, directories that everybody may write.
"""

import argparse
import json
import os
import random
import shutil
import stat
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

import cnisnoop
import mncni

OPTIONS = {"plugin": None, "command": None, "container": None, "failed": False, "show_secrets": False, "json": False, "full": True}
TEXTS = ("", "ADD", "ADD+VERSION", "\0", "\x1b[2J", "\xff\xfe", "|", "CNI_COMMAND=ADD", "CNI_COMMAND=ADD+VERSION", "CNI_PATH=/x",
         "CNI_ARGS=;=;",
         "CNI_NETNS=/proc/self/ns/net", "/x/plugin", "uid=x", '{"plugin": [[]], "name": {}}', '{"code": []}', "[" * 5000, "9" * 5000)
IN_PYTHON = ["/usr/bin/python3", "-IS"]


def forged_events(random_number, count):
    """Events of calls as a backend reports them, some of them of no sense."""
    pick, below = random_number.choice, random_number.randrange
    for ts in range(count):
        pid = below(1, 5)
        yield ("begin", ts, pid, below(5), pick((0, pid, 2**31)), pick(TEXTS))
        words = (0, "/x/plugin"), (1024, f"CNI_COMMAND={pick(TEXTS)}"), (1032, "CNI_PATH=/x")
        yield from (("word", ts, pid, number, text) for number, text in words)
        yield from (("word", ts, pid, pick((0, 1, 2, 1023, 1024, 1040, 1152, 9999)), pick(TEXTS)) for _ in range(below(3)))
        yield ("exec", ts, pid, pick((0, 0, 0, -2, -9999)), *(pid * 8 + number for number in (1, 2, 3)))
        yield from (("data", ts, pid, pid * 8 + below(1, 4), pick((0, 5, 2**40)), pick(TEXTS).encode()) for _ in range(below(4)))
        yield from [("lost", 0, 0, 1)] * (below(10) == 0)
        yield ("exit", ts, below(1, 5), pick((0, 9, 200, 256, 511, 2**40)))


@pytest.mark.parametrize("seed", range(8))
def test_no_call_ends_a_trace(seed, capsys):
    calls, options = cnisnoop.Calls(lambda pid: {}), argparse.Namespace(**OPTIONS, replay="always")
    shown = 0
    for event in forged_events(random.Random(seed), 150):
        call = cnisnoop.survive(calls.feed, event)
        shown += bool(call)
        cnisnoop.survive(cnisnoop.show, call, options, Counter()) if call else None
    assert shown, "some make a call"


def test_calls_that_call_each_other_a_thousand_times_end_no_trace(capsys):
    calls, depth = cnisnoop.Calls(lambda pid: {}), 3000
    options = argparse.Namespace(**OPTIONS, replay="error")
    for pid in range(1, depth):
        words = (0, "/x/p"), (1024, "CNI_COMMAND=ADD+VERSION"), (1032, "CNI_PATH=/x")
        calls.feed(("begin", pid, pid, pid - 1, 0, "x"))
        for number, text in words:
            calls.feed(("word", pid, pid, number, text))
        calls.feed(("exec", pid, pid, 0, 0, 0, 0))
    ended = [cnisnoop.survive(calls.feed, ("exit", depth, pid, 256)) for pid in range(depth - 1, 0, -1)]
    for call in filter(None, ended):
        cnisnoop.survive(cnisnoop.show, call, options, Counter())
    assert "left out what cannot be read: RecursionError" in capsys.readouterr().err


def test_whose_call_it_is_shows_unless_it_is_roots():
    for uid, words in ((1000, "by sh[7], uid 1000"), (0, "by sh[7]")):
        calls = cnisnoop.Calls(lambda pid: {})
        for event in (("begin", 1, 9, 0, 7, "sh"), ("word", 1, 9, 0, "/x/p"), ("word", 1, 9, 1024, "CNI_COMMAND=ADD"),
                      ("word", 1, 9, 1032, "CNI_PATH=/x"), ("word", 1, 9, 1152, f"uid={uid}"), ("exec", 1, 9, 0, 0, 0, 0)):
            calls.feed(event)
        call = calls.feed(("exit", 2, 9, 256))
        assert call["env"] == {"CNI_COMMAND": "ADD", "CNI_PATH": "/x"} and call["parent"].get("uid", 0) == uid
        assert words in [part for part in cnisnoop.format_call(call)[0].split("  ") if part]


def test_a_path_that_a_call_names_is_opened_only_if_it_is_a_network_namespace(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    with open(tmp_path / "huge", "w") as file:
        file.truncate(1 << 40)
    begin = time.monotonic()
    made = [str(tmp_path / name) for name in ("fifo", "loop", "file", "huge", "none")]
    for path in (*made, "/dev/zero", "/dev/tty", "/", "/proc/self/ns/mnt", "\0"):
        assert cnisnoop.open_netns(path) is None, path
    assert time.monotonic() - begin < 5
    os.close(cnisnoop.open_netns("/proc/self/ns/net"))


MADE = {"dataDir": "{TMP}/made"}
IPAMS = ({"type": "../../../../made"}, {"type": "..", **MADE}, MADE, {}, {"DATADIR": "{TMP}/made"}, {"type": "host-local", **MADE})


@pytest.mark.parametrize("ipam", IPAMS, ids=str)
@pytest.mark.parametrize("command", ["ADD", "DEL", "GC", "CHECK"])
def test_explain_writes_nothing_of_what_a_conflist_names(tmp_path, ipam, command):
    """Neither by the name of a delegate nor by a directory for leases, in which GC would release them all."""
    leases = mncni.Leases(str(tmp_path / "made"), "net", str(tmp_path))
    leases.take(["10.88.0.9"], "c1", "eth0")
    ipam = json.loads(json.dumps(ipam).replace("{TMP}", str(tmp_path)))
    ipam = {**ipam, "ranges": [[{"subnet": "10.88.0.0/24"}]]} if ipam and "type" not in ipam else ipam
    conf = {"cniVersion": "1.1.0", "name": "net", "plugins": [{"type": "../../x", "plugin": ["naivewg", "portmap"], "ipam": ipam}]}
    (tmp_path / "conflist").write_text(json.dumps(conf))
    before = sorted(map(str, tmp_path.rglob("*")))
    argv = [*IN_PYTHON, mncni.__file__, "explain", str(tmp_path / "conflist"), "--command", command]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=60)
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    is_bad = "." in ipam.get("type", "")
    assert (done.returncode, 'must be the name of a program' in done.stderr) == (int(is_bad), is_bad)


@pytest.mark.parametrize("how", ["launcher", "install", "copy"])
def test_with_umask_0_nobody_else_may_change_what_a_call_leaves(tmp_path, how):
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir(mode=0o755)
    if how == "copy":
        shutil.copy(mncni.__file__, bin_dir / "naivewg")
    else:
        umask = "0" if how == "install" else "022"
        install = f"{' '.join(IN_PYTHON)} {mncni.__file__} install --bin-dir {bin_dir} --names naivewg"
        subprocess.run(["sh", "-c", f"umask {umask}; exec {install}"], check=True)
    program = bin_dir / "naivewg"
    said = subprocess.check_output(["sh", "-c", f"umask 0; exec {program}"], env={"CNI_COMMAND": "VERSION"}, text=True)
    assert "supportedVersions" in said
    paths = [bin_dir, *Path(bin_dir).rglob("*")]
    assert how == "copy" or any(path.name == "__pycache__" for path in paths), "something is written"
    assert not [path for path in paths if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)]
