"""cnisnoop: from what the backends wrote to calls, and how they are printed. Recordings come from `python3 -m tests.snoop record`."""

import base64
import json
import os
import subprocess
import time

import pytest

import cnisnoop
from tests import snoop

DIRECTORY = "/tmp/cni-plugins"


def sample(**changes):
    """A call as Calls makes it."""
    content = {"stdin": '{"cniVersion": "1.0.0", "name": "net"}', "stdout": '{"cniVersion": "1.0.0"}', "stderr": ""}
    call = {
        "time": 1_700_000_000.25,
        "command": "ADD",
        "plugin": "bridge",
        "path": "/opt/cni/bin/bridge",
        "argv": ["/opt/cni/bin/bridge"],
        "env": {"CNI_COMMAND": "ADD", "CNI_ARGS": "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0"},
        "container_id": "c1",
        "netns": "",
        "ifname": "eth0",
        "network": "net",
        "pid": 5,
        "parent": {"pid": 1, "comm": "containerd"},
        "exit": 0,
        "signal": "",
        "duration_ms": 12.3,
        "error": "",
        "running": False,
        "incomplete": False,
        "delegates": [],
        "commands": [],
        **content,
        **changes,
    }
    return {**{f"{name}_size": len(call[name].encode()) for name in content}, **call}


def executed(pid, path, ts=0, owner=0, parent=1, streams=None, **env):
    """The events of a program's start."""
    env = {"CNI_COMMAND": "ADD", "CNI_PATH": "/opt/cni/bin", **env}
    words = [("word", ts, pid, cnisnoop.ENV + 8 * number, f"{name}={value}") for number, (name, value) in enumerate(env.items())]
    return [
        ("begin", ts, pid, owner, parent, "containerd"),
        ("word", ts, pid, 0, path),
        ("word", ts, pid, 1, path),
        *words,
        ("exec", ts, pid, 0, *(streams or (pid * 8 + 1, pid * 8 + 2, pid * 8 + 3))),
    ]


def moved(pid, stream, data, ts=1):
    return [("data", ts, pid, stream, len(data), data)]


def only_call(events):
    (call,) = snoop.calls_of(events)
    return call


# ---- recordings ----


@pytest.mark.parametrize("backend", ["bpftrace", "strace"])
def test_a_recording_gives_every_call_complete_and_nested(backend):
    snoop.check_calls([call for call in snoop.calls_of(snoop.recorded(backend)) if call["path"].startswith(DIRECTORY)], DIRECTORY)


def test_both_backends_give_the_same_calls():
    def lasting(call):
        kept = {
            key: call[key]
            for key in ("plugin", "command", "env", "argv", "stdin", "stdout", "stderr", "exit", "signal", "error")
        }
        return {
            **kept,
            "delegates": [lasting(entry) for entry in call["delegates"]],
            "commands": [entry["argv"] for entry in call["commands"]],
        }

    ours = [
        [lasting(call) for call in snoop.calls_of(snoop.recorded(backend)) if call["path"].startswith(DIRECTORY)]
        for backend in ("bpftrace", "strace")
    ]
    assert ours[0] == ours[1]


def test_the_order_in_which_processors_are_read_does_not_matter():
    events = snoop.recorded("bpftrace")
    turned = events[1::2] + events[::2]  # two processors, one after the other
    kept = [call for call in snoop.calls_of(turned) if call["path"].startswith(DIRECTORY)]
    snoop.check_calls(kept, DIRECTORY)


# ---- lines into events ----


@pytest.mark.parametrize(
    "line, event",
    [
        (b'{"type": "printf", "data": "begin|7|5|0|1|cri o|x"}', ("begin", 7, 5, 0, 1, "cri o|x")),
        (b'{"type": "printf", "data": "word|7|5|1|caf\\uffffffc3\\uffffffa9 \\\\uffff"}', ("word", 7, 5, 1, "caf\xc3\xa9 \\uffff")),
        ('{"type": "printf", "data": "word|7|5|1|café"}'.encode(), ("word", 7, 5, 1, "caf\xc3\xa9")),
        (b'{"type": "printf", "data": "data|7|5|41|0|\\\\x7b\\\\xff\\\\x00"}', ("data", 7, 5, 41, 0, b"{\xff\x00")),
        (b'{"type": "printf", "data": "exit|7|5|257"}', ("exit", 7, 5, 257)),
        (b'{"type": "lost_events", "data": {"events": 12}}', ("lost", 0, 0, 12)),
        (b'{"type": "attached_probes", "data": {"probes": 13}}', None),
        (b"", None),
        (b"[1]", None),
        (b"Lost 5 events", None),
        (b'{"type": "map", "data": {"@in": {"5": 5}}}', None),
        (b"\xff\x00{", None),
    ],
)
def test_a_line_of_bpftrace_is_an_event_or_nothing(line, event):
    assert cnisnoop.parse_bpftrace(line) == event


def hexed(text):
    return '"' + "".join(f"\\x{byte:02x}" for byte in text.encode()) + '"'


def test_strace_lines_of_a_child_wait_for_the_clone_that_made_it():
    strace = cnisnoop.Strace({10: 10})
    env = f"[{hexed('HOME=/')}, {hexed('CNI_COMMAND=DEL')}]"
    assert strace.feed(f"11 5.000002 execve({hexed('/opt/cni/bin/x')}, [{hexed('x')}], {env}) = 0") == []
    assert strace.feed("10 5.000001 vfork( <unfinished ...>") == []
    events = strace.feed("10 5.000003 <... vfork resumed>) = 11")
    assert [event[0] for event in events] == ["begin", "word", "word", "word", "exec"] and events[0][3:5] == (0, 10)
    assert strace.feed("11 5.000009 +++ killed by SIGSEGV (core dumped) +++") == [("exit", 5_000_009_000, 11, 11)]


def test_strace_threads_belong_to_their_process_and_strangers_are_left_out():
    strace = cnisnoop.Strace({10: 10})
    assert strace.feed("10 5.000001 clone(child_stack=NULL, flags=CLONE_VM|CLONE_THREAD) = 12") == []
    assert strace.process_of[12] == 10
    assert strace.feed(f"12 5.000002 execve({hexed('/bin/ls')}, [{hexed('ls')}], []) = 0") == []
    assert (
        strace.feed('12 5.000003 read(0, "", 10) = 0') == [] and strace.feed("nonsense") == [] and strace.feed("12 5.000004 ???") == []
    )


# ---- events into calls ----


def test_a_call_without_an_end_is_still_running():
    calls = cnisnoop.Calls()
    for event in executed(5, "/opt/cni/bin/bridge", ts=10**9) + executed(6, "/opt/cni/bin/host-local", ts=2 * 10**9, owner=5):
        assert calls.feed(event) is None
    (call,) = calls.unfinished(4 * 10**9)
    assert (call["running"], call["exit"], call["duration_ms"]) == (True, None, 3000)
    assert [entry["plugin"] for entry in call["delegates"]] == ["host-local"] and "still running" in "\n".join(
        cnisnoop.format_call(call)
    )


def test_what_the_kernel_lost_is_counted_and_said():
    events = [*executed(5, "/opt/cni/bin/bridge"), ("lost", 0, 0, 7), ("exit", 9, 5, 256)]
    calls = cnisnoop.Calls()
    (call,) = filter(None, map(calls.feed, events))
    assert calls.lost == 7 and call["incomplete"] and "events were lost" in "\n".join(cnisnoop.format_call(call))
    (call,) = filter(None, map(calls.feed, [*executed(6, "/opt/cni/bin/bridge"), ("exit", 9, 6, 256)]))
    assert not call["incomplete"]


@pytest.mark.parametrize(
    "event",
    [
        ("exit", 9, 5, 256),
        ("exec", 9, 5, 0, 1, 2, 3),
        ("exec", 9, 5, -2, 0, 0, 0),
        ("data", 9, 5, 41, 1, b"x"),
        ("word", 9, 5, cnisnoop.ENV, "A=b"),
    ],
)
def test_an_event_whose_beginning_was_lost_is_nothing(event):
    assert cnisnoop.Calls().feed(event) is None


def test_a_stream_keeps_64_kilobytes_and_knows_its_size():
    data = b"x" * 50_000
    events = executed(5, "/opt/cni/bin/bridge") + moved(5, 41, data) + moved(5, 41, data, 2) + [("exit", 9, 5, 256)]
    call = only_call(events)
    assert (len(call["stdin"]), call["stdin_size"]) == (65536, 100_000)
    text = "\n".join(cnisnoop.format_call(call))
    assert "100000 bytes in all, the first 65536 are kept" in text and len(text) < 1000
    assert cnisnoop.replay_line(call).startswith("# incomplete, stdin had 100000 bytes")


def test_text_that_is_cut_within_a_character_is_still_text():
    data = ("x" * 65535 + "éé").encode()
    call = only_call(executed(5, "/opt/cni/bin/bridge") + moved(5, 41, data) + [("exit", 9, 5, 256)])
    assert "stdin_base64" not in call and call["stdin"].startswith("xxx")


@pytest.mark.parametrize(
    "code, shown",
    [
        (256, "ok"),
        (259, "exit 3"),
        (9, "killed by SIGKILL"),
        (11, "killed by SIGSEGV"),
        (40, "killed by signal 40"),
        (0, "ended, exit status unknown"),
    ],
)
def test_the_end_of_a_call_is_decoded(code, shown):
    call = only_call([*executed(5, "/opt/cni/bin/bridge"), ("exit", 9, 5, code)])
    assert cnisnoop.verdict(call) == shown


def test_an_error_of_a_plugin_is_in_the_first_line():
    call = sample(exit=1, stdout='{"code": 11, "msg": "try again"}')
    assert cnisnoop.format_call(call)[0].endswith("exit 1: error 11, try again")


def test_a_command_of_a_plugin_is_no_call_and_one_from_cni_path_is_a_delegate():
    events = [
        *executed(5, "/opt/cni/bin/bridge"),
        *executed(6, "/usr/sbin/ip", 1, owner=5),
        *moved(6, 6 * 8 + 1, b"link show\n"),
        ("exit", 2, 6, 257),
        *executed(7, "/opt/cni/bin/host-local", 3, owner=5),
        *executed(8, "/usr/bin/jq", 4, owner=7),
        ("exit", 5, 8, 256),
        ("exit", 6, 7, 256),
        ("exit", 9, 5, 256),
    ]
    call = only_call(events)
    assert [(entry["argv"], entry["exit"], entry["stdin"]) for entry in call["commands"]] == [(["/usr/sbin/ip"], 1, "link show\n")]
    assert [entry["plugin"] for entry in call["delegates"]] == ["host-local"]
    assert [entry["argv"] for entry in call["delegates"][0]["commands"]] == [["/usr/bin/jq"]]


def test_a_plugin_outside_cni_path_counts_if_it_speaks_the_protocol():
    start = executed(5, "/home/me/plugin", CNI_PATH="")
    assert only_call([*start, *moved(5, 42, b'{"code": 7}'), ("exit", 9, 5, 257)])["plugin"] == "plugin"
    assert snoop.calls_of([*start, *moved(5, 42, b"file1 file2"), ("exit", 9, 5, 256)]) == []


def test_a_wrapper_is_not_the_plugin():
    events = [
        *executed(5, "/usr/bin/nsenter"),
        *executed(5, "/opt/cni/bin/bridge", 3, owner=5, streams=(41, 42, 43)),
        ("exit", 9, 5, 256),
    ]
    assert only_call(events)["plugin"] == "bridge"


def test_a_shebang_interpreter_stays_the_plugin():
    events = [
        *executed(5, "/opt/cni/bin/mine"),
        *executed(5, "/usr/bin/python3", 3, owner=5, streams=(41, 42, 43)),
        ("exit", 9_000_000, 5, 256),
    ]
    call = only_call(events)
    assert (call["plugin"], call["duration_ms"]) == ("mine", 9)


def test_a_process_number_that_is_used_again_is_another_call():
    calls = cnisnoop.Calls()
    events = [*executed(5, "/opt/cni/bin/bridge"), *executed(5, "/opt/cni/bin/portmap", 5), ("exit", 9, 5, 256)]
    (call,) = filter(None, map(calls.feed, events))
    assert call["plugin"] == "portmap"


# ---- printing ----


def test_secrets_are_hidden_at_every_depth_and_the_rest_is_untouched():
    conf = {
        "name": "net",
        "kubernetes": {"k8sAuthToken": "abc", "list": [{"clientSecret": {"deep": ["x", 5]}}]},
        "psk": 12,
        "keepAlive": True,
    }
    plain = '{"name":   "net"}'
    call = sample(
        stdin=json.dumps(conf),
        stdout=plain,
        stderr="password=swordfish user=me",
        delegates=[sample(stdin='{"apiKey": "zzz"}')],
        commands=[
            {
                "argv": ["x", "--token=abc"],
                "stdin": "PrivateKey = qqq\nPort = 1",
                "stderr": "",
                "exit": 1,
                "signal": "",
                "duration_ms": 1.0,
                "time": 0,
            }
        ],
    )
    masked = cnisnoop.mask_call(call)
    text = json.dumps(masked)
    for secret in ("abc", 'deep": ["x', "swordfish", "zzz", "qqq"):
        assert secret not in text
    assert (
        json.loads(masked["stdin"])["keepAlive"] is True
        and masked["stdout"] == plain
        and "user=me" in masked["stderr"]
        and "Port = 1" in text
    )
    assert cnisnoop.mask_call(sample()) == sample()
    assert "--show-secrets" in cnisnoop.replay_line(masked) and "--show-secrets" not in cnisnoop.replay_line(call)


@pytest.mark.parametrize("text", ['{"token": "a', '{"token" : "abc"', "token: abc", '{"a": {"password":"abc"}} trailing'])
def test_secrets_in_broken_json_are_hidden(text):
    assert "abc" not in cnisnoop.mask_text(text) and '"a' not in cnisnoop.mask_text(text)[9:]


@pytest.mark.parametrize(
    "text",
    ["y" * 65536, "token" * 13_000, "token=" * 10_000, '"token": "' * 6000, "\\\\" * 30_000, '{"token": "' + "\\\\" * 30_000],
    ids=["word", "names", "pairs", "quotes", "backslashes", "open string"],
)
def test_looking_for_secrets_is_quick_whatever_the_text(text):
    begin = time.monotonic()
    cnisnoop.format_call(cnisnoop.mask_call(sample(stdin=text, stderr=text)))
    assert time.monotonic() - begin < 5


def test_json_beyond_reason_is_no_traceback():
    deep = "[" * 5000 + "]" * 5000
    call = sample(stdin=deep, stdout='{"a":' * 900 + "1" + "}" * 900)
    assert cnisnoop.format_call(cnisnoop.mask_call(call))


STDINS = [b'{"name": "it\'s"}', b"two\nlines\n\n", b"", b"\xff\x00\x01", "tab\té \x1b[31m \\033 '".encode(), b"%s %d $HOME `id` \\n"]


@pytest.mark.parametrize("stdin", STDINS)
def test_the_replay_line_repeats_the_call_to_the_byte(tmp_path, stdin):
    plugin = tmp_path / "a plugin"
    plugin.write_text('#!/bin/sh\ncat > "$0.stdin"; echo "$# $1 $CNI_COMMAND $CNI_ARGS" > "$0.words"\n')
    plugin.chmod(0o755)
    events = executed(5, str(plugin), CNI_PATH=str(tmp_path), CNI_ARGS="A=$HOME;B='\x1b\"")
    events.insert(3, ("word", 0, 5, 2, "two words"))
    call = only_call([*events, *(moved(5, 41, stdin) if stdin else []), ("exit", 9, 5, 257)])
    line = cnisnoop.replay_line(call)
    assert "\x1b" not in line
    subprocess.run(["bash", "-c", line], check=True, timeout=20)
    assert (tmp_path / "a plugin.stdin").read_bytes() == stdin
    assert (tmp_path / "a plugin.words").read_text() == "1 two words ADD A=$HOME;B='\x1b\"\n"


@pytest.mark.parametrize(
    "replay, failed, is_there", [("error", True, True), ("error", False, False), ("always", False, True), ("never", True, False)]
)
def test_the_replay_line_comes_when_asked_for(replay, failed, is_there):
    text = "\n".join(cnisnoop.format_call(sample(exit=int(failed)), replay=replay))
    assert ("printf %s" in text) == is_there


def test_a_call_that_was_made_elsewhere_is_repeated_there():
    call = sample(parent={"pid": 77, "comm": "init", "elsewhere": True})
    assert "nsenter --target=77 --mount --net env CNI_COMMAND=ADD" in cnisnoop.replay_line(call)


def test_json_is_cut_sensibly_and_whole_with_full():
    conf = {
        "name": "net",
        "text": "y" * 900,
        "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.244.1.5/24"}], "more": "z" * 200},
        "routes": [{"dst": f"10.{n}.0.0/16", "gw": "10.0.0.1"} for n in range(60)],
    }
    call = sample(stdin=json.dumps(conf), stdout=json.dumps(conf))
    short, full = ("\n".join(cnisnoop.format_call(call, is_full)) for is_full in (False, True))
    assert "more lines" in short and "(913 characters)" in short and "... 10.244.1.5/24" in short
    assert " characters, whole with --full)" in short
    assert max(map(len, short.splitlines())) < 170
    assert "10.29.0.0/16" in full and "y" * 900 in full and "z" * 200 in full


def test_a_terminal_is_not_given_what_a_plugin_wrote_as_it_is():
    call = sample(
        stdout="\x1b]0;title\x07",
        stderr="a\rb\x9b",
        network="n\x1b[31m",
        netns="/run/\x1b",
        env={"CNI_ARGS": "K8S_POD_NAME=\x1b[1m"},
        plugin="\x1bx",
        exit=1,
    )
    assert not [char for line in cnisnoop.format_call(call) for char in line if not char.isprintable()]
    assert any("\033[" in line for line in cnisnoop.format_call(call, is_coloured=True))


def options(*words):
    return cnisnoop.parse_options(["view", "FILE", *words])


@pytest.mark.parametrize(
    "words, is_wanted",
    [
        ([], True),
        (["--plugin", "bridge"], True),
        (["--plugin", "host-local"], True),
        (["--plugin", "portmap"], False),
        (["--command", "add"], True),
        (["--command", "DEL"], False),
        (["--container", "c1"], True),
        (["--container", "web-0"], True),
        (["--container", "x"], False),
        (["--failed"], False),
        (["--plugin", "bridge", "--failed"], False),
    ],
)
def test_filters(words, is_wanted):
    call = sample(delegates=[sample(plugin="host-local")])
    assert cnisnoop.is_wanted(call, options(*words)) == is_wanted


def test_view_shows_a_recording_again(tmp_path, capsys):
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps(cnisnoop.mask_call(sample(exit=1, stdin='{"name": "net", "token": "abc"}'))) + "\n")
    assert cnisnoop.main(["view", str(path)]) == 0
    assert "ADD bridge  default/web-0 c1 eth0  network net  by containerd[1]  12.3 ms  exit 1" in capsys.readouterr().out
    assert cnisnoop.main(["view", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == "ADD"


@pytest.mark.parametrize("content", [b"{}\n", b"nonsense", b"\xff\xfe\x00", b'{"command": "ADD"}', b"[1]\n"])
def test_a_file_that_is_no_recording_is_refused(tmp_path, capsys, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    assert cnisnoop.main(["view", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


# ---- changes ----

IP_LINK = "2: mncni0: <BROADCAST> mtu 1500 qdisc noop state DOWN \\    link/ether 86:75 promiscuity 0  minmtu 68 maxmtu 65535 \\  "


@pytest.mark.parametrize(
    "tool, line, item",
    [
        ("ip", IP_LINK + "  bridge forward_delay 1500", (1, "bridge", "mncni0")),
        ("ip", "Deleted 4: mn12@NONE: <BROADCAST> mtu 1500 qdisc noop state DOWN \\    link/ether 06:75", (-1, "link", "mn12")),
        (
            "ip",
            "Deleted 4: mn12@NONE: <BROADCAST> mtu 1500 master mncni0 state DOWN \\    link/ether 06:75",
            None,
        ),  # it leaves the bridge
        ("ip", "2: mncni0    inet 10.88.0.1/24 scope global br0\\       valid_lft forever", (1, "address", "10.88.0.1/24")),
        ("ip", "2: mncni0    inet6 fe80::1/64 scope link \\       valid_lft forever", None),
        ("ip", "Deleted unicast 10.1.0.0/24 dev br0 table main proto kernel scope link", (-1, "route", "10.1.0.0/24")),
        ("ip", "unicast default via 10.1.0.1 dev br0 ", (1, "route", "default")),
        ("ip", "local 10.1.0.1 dev br0 table local proto kernel", None),
        ("ip", "multicast ff00::/8 dev br0 table local", None),
        ("tc", "qdisc tbf 8485: dev mn12 root refcnt 2 rate 1Mbit", (1, "qdisc", "tbf")),
        ("tc", "deleted qdisc noqueue 0: dev br0 root ", None),
        ("nft", "add element inet t s { 1.2.3.4 }", (1, "nft", "inet t")),
        ("nft", "delete rule inet t c handle 3", (-1, "nft", "inet t")),
        ("nft", "# new generation 8 by process 935 (nft)", None),
    ],
)
def test_lines_of_the_monitors(tool, line, item):
    assert cnisnoop.parse_monitor(tool, line) == item


def test_changes_in_words():
    balance = {
        ("veth", "mn12"): 1,
        ("address", "10.244.1.5/24"): 1,
        ("route", "a"): 1,
        ("route", "b"): 1,
        ("nft", "inet t"): 5,
        ("nft", "inet u"): -2,
        ("host port", "8080/tcp -> 10.244.1.5:80"): 1,
        ("qdisc", "netem"): 1,
        ("link", "old"): -1,
    }
    assert (
        cnisnoop.describe_changes(balance)
        == "veth mn12, 10.244.1.5/24, rules in inet t, host port 8080/tcp -> 10.244.1.5:80, qdisc netem, 2 routes; "
        "gone: rules in inet u, link old"
    )


def test_settings_of_a_link():
    line = "2: eth0@if3: <BROADCAST,UP> mtu 1400 qdisc noqueue state UP group default qlen 500 \\    link/ether 0a:58:00:00:00:01 brd ff:ff"
    assert cnisnoop.parse_settings(line) == {"mtu": "1400", "txqlen": "500", "mac": "0a:58:00:00:00:01"}


def test_calls_are_held_back_for_a_while_and_none_is_lost():
    assert list(cnisnoop.held([1, None, 2], 60)) == [1, 2]
    assert list(cnisnoop.held([1, None, 2], 0)) == [1, 2]


def test_what_is_in_a_pod():
    addresses = [{"local": "10.0.0.5", "prefixlen": 24}, {"local": "fe80::1", "prefixlen": 64}]
    documents = [
        [{"ifname": "lo", "addr_info": []}, {"ifname": "eth0", "addr_info": addresses}],
        [{"dst": "default", "gateway": "10.0.0.1", "dev": "eth0"}],
        [],
        [{"kind": "netem", "dev": "eth0"}, {"kind": "noqueue", "dev": "lo"}],
    ]
    assert cnisnoop.parse_state("".join(f"{json.dumps(rows)}\n" for rows in documents)) == {
        ("link", "eth0", "eth0"),
        ("address", "10.0.0.5/24", "eth0"),
        ("route", "default", "eth0"),
        ("qdisc", "netem", "eth0"),
    }


# ---- the command line ----


def test_without_a_backend_it_says_what_to_install(mocker):
    mocker.patch("shutil.which", return_value=None)
    mocker.patch("os.geteuid", return_value=0)
    with pytest.raises(cnisnoop.SnoopError, match="apt-get install bpftrace.*apt-get install strace"):
        cnisnoop.choose_backend(cnisnoop.parse_options(["trace"]))


def test_without_tracepoints_or_with_an_old_bpftrace_strace_is_used(mocker):
    mocker.patch("shutil.which", side_effect=lambda name: f"/usr/bin/{name}")
    mocker.patch("os.geteuid", return_value=0)
    own = cnisnoop.parse_options(["trace", "--pid", str(os.getpid())])
    for answers in ((0, "bpftrace v0.14.0", ""), (0, "bpftrace v0.17.0", "")):
        mocker.patch("cnisnoop.run", side_effect=[answers, (0, "", "tracefs is not there")])
        assert cnisnoop.choose_backend(own)[0] == "strace"
    mocker.patch("cnisnoop.run", side_effect=[(0, "bpftrace v0.17.0", ""), (1, "", "tracefs is not there")])
    with pytest.raises(cnisnoop.SnoopError, match="no tracepoints .*tracefs is not there"):
        cnisnoop.choose_backend(cnisnoop.parse_options(["trace", "--backend", "bpftrace"]))


def test_without_root_it_says_so(mocker, capsys):
    mocker.patch("os.geteuid", return_value=1000)
    assert cnisnoop.main(["trace"]) == 1
    assert "needs root: sudo" in capsys.readouterr().err


def test_strace_without_a_runtime_asks_for_a_process(mocker):
    mocker.patch("shutil.which", side_effect=lambda name: f"/usr/bin/{name}")
    mocker.patch("cnisnoop.RUNTIMES", ())
    with pytest.raises(cnisnoop.SnoopError, match="--pid PID"):
        cnisnoop.strace_backend(cnisnoop.parse_options(["trace"]))
    with pytest.raises(cnisnoop.SnoopError, match="there is no such process"):
        cnisnoop.strace_backend(cnisnoop.parse_options(["trace", "--pid", "99999999"]))


@pytest.mark.parametrize("words", [[], ["nonsense"], ["trace", "--backend", "perf"], ["trace", "--replay", "sometimes"], ["view"]])
def test_usage_errors_are_exit_status_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cnisnoop.main(words)
    assert ended.value.code == 2 and "usage" in capsys.readouterr().err


def test_the_program_leaves_out_calls_that_the_kernel_does_not_know():
    every = cnisnoop.bpftrace_program(["execve", "execveat", "open", "openat", "read", "write", "dup2"])
    assert "sys_enter_open " in every and "sys_enter_dup2 " in every
    few = cnisnoop.bpftrace_program(["execve", "openat", "read", "write"])
    assert "sys_enter_open " not in few and "sys_enter_dup2" not in few and "sys_exit_openat" in few
    assert "%(" not in every and "kprobe" not in every


def test_base64_is_only_there_for_what_is_no_text():
    call = only_call(executed(5, "/opt/cni/bin/x") + moved(5, 41, b"\xff{") + moved(5, 42, "é".encode()) + [("exit", 9, 5, 256)])
    assert base64.b64decode(call["stdin_base64"]) == b"\xff{" and "stdout_base64" not in call and call["stdout"] == "é"


def test_strace_finds_the_child_of_a_process_in_another_pid_namespace_and_a_call_that_it_left_unfinished_is_nothing():
    strace = cnisnoop.Strace({10: 10})
    assert strace.feed("10 5.000001 clone(child_stack=NULL, flags=SIGCHLD) = 2 /* 12 in strace's PID NS */") == []
    assert strace.process_of[12] == 12 and 2 not in strace.process_of
    assert strace.feed("12 5.000002 read(0,  <detached ...>") == []


def test_a_call_whose_end_was_lost_is_not_said_to_run():
    calls = cnisnoop.Calls(look_parent=lambda pid: {"comm": "x"} if pid == 6 else {})
    for event in [("lost", 0, 0, 9), *executed(5, "/opt/cni/bin/bridge"), *executed(6, "/opt/cni/bin/portmap")]:
        calls.feed(event)
    assert {call["pid"]: (call["running"], call["incomplete"]) for call in calls.unfinished(9)} == {5: (False, True), 6: (True, False)}


def test_the_network_namespace_of_a_caller_is_read_only_where_the_kernel_describes_its_structs():
    assert "curtask" in cnisnoop.bpftrace_program({"execve"}, has_btf=True)
    assert "curtask" not in cnisnoop.bpftrace_program({"execve"}) and "NETNS" not in cnisnoop.bpftrace_program({"execve"})


def test_a_call_is_elsewhere_by_the_number_of_its_namespace_or_by_proc():
    own = os.stat("/proc/self/ns/net").st_ino
    assert cnisnoop.is_elsewhere(0, str(own + 1)) and not cnisnoop.is_elsewhere(0, str(own))
    assert not cnisnoop.is_elsewhere(os.getpid()) and cnisnoop.is_elsewhere(0, unless_known=True)


def link(name, **keys):
    return {"name": name, **keys}


def test_what_a_result_is_the_first_to_name_belongs_to_that_add(mocker):
    mocker.patch("cnisnoop.need_tools")
    mocker.patch("cnisnoop.Monitor")
    changes = cnisnoop.Changes(0)
    first = {"interfaces": [link("br0"), link("veth1"), link("eth0", sandbox="/x")], "ips": [{"address": "10.0.0.5/24"}]}
    second = {**first, "interfaces": [*first["interfaces"], link("ifb1")]}
    for pid, given, returned in ((10, {}, first), (11, {"prevResult": first}, second), (12, {"prevResult": 5}, {"interfaces": 5})):
        changes.spans[pid] = {"inode": 7}
        changes.note(sample(pid=pid, command="ADD", container_id="c1", exit=0, stdin=json.dumps(given), stdout=json.dumps(returned)))
    other = {"interfaces": [link("br0"), link("veth2")]}
    changes.note(sample(pid=20, command="ADD", container_id="c2", exit=0, stdin="{}", stdout=json.dumps(other)))
    assert changes.makers == {
        (0, "br0"): {"c1": 10, "c2": 20},
        (0, "veth1"): {"c1": 10},
        (7, "eth0"): {"c1": 10},
        (7, "10.0.0.5/24"): {"c1": 10},
        (0, "ifb1"): {"c1": 11},
        (0, "veth2"): {"c2": 20},
    }
