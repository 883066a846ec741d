"""What agent.py keeps and believes: settings, the directory store, the key, the lock, the last good list of nodes, secrets.

Passes run here with a WireGuard device in memory and without the stages that need a kernel, on a clock of their own.
"""

import base64
import dataclasses
import ipaddress
import json
import logging
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import agent
import kube
import mncni
from tests.unit.agent_data import V4, FakeWireGuard, key_of, make_settings, parse, public_of, record, text_of

# ---- settings ----

GOOD = ("--cluster-cidr", "10.244.0.0/16", "--pod-cidr", "10.244.1.0/24")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--cluster-cidr", "10.244.0.1/16"], "--cluster-cidr.*10.244.0.1/16"),
        (["--cluster-cidr", "cluster"], "--cluster-cidr.*cluster"),
        ([*GOOD, "--pod-cidr", "10.245.0.0/24"], "--pod-cidr 10.245.0.0/24 is no part of --cluster-cidr 10.244.0.0/16"),
        ([*GOOD, "--pod-cidr", "10.244.0.0/16"], "--pod-cidr 10.244.0.0/16 is no part of"),
        ([*GOOD, "--pod-cidr", "fd00::/64"], "--pod-cidr fd00::/64 is no part of"),
        (["--pod-cidr", "10.244.1.0/24"], r"--pod-cidr 10.244.1.0/24 is no part of --cluster-cidr \(none given\)"),
        ([*GOOD, "--pod-cidr", "10.244.1.0/24"], "--pod-cidr 10.244.1.0/24 overlaps --pod-cidr 10.244.1.0/24"),
        ([*GOOD, "--pod-cidr", "10.244.1.128/25"], "overlaps --pod-cidr 10.244.1.128/25"),
        ([*GOOD, "--pod-cidr", "10.244.2.0/31"], "--pod-cidr 10.244.2.0/31 is too small"),
        ([*GOOD, "--endpoint", "10.244.9.9"], "--endpoint 10.244.9.9 is inside --cluster-cidr"),
        (["--endpoint", "node1"], "--endpoint.*node1"),
        (["--port", "0"], "--port.*'0'"),
        (["--port", "1,2"], "--port.*'1,2'"),
        (["--port", "65536"], "--port.*'65536'"),
        (["--port", "a"], "--port.*'a'"),
        (["--key-max-age", "30"], "--key-max-age.*'30'"),
        (["--key-max-age", "-1d"], "--key-max-age.*"),
        (["--key-max-age", "1w"], "--key-max-age.*'1w'"),
        (["--key-max-age", "d"], "--key-max-age.*'d'"),
        (["--key-max-age", ""], "--key-max-age.*''"),
        (["--bridge", "0123456789abcdef"], "--bridge.*0123456789abcdef"),
        (["--bridge", "a b"], "--bridge.*'a b'"),
        (["--namespace", "../x"], r"--namespace.*'\.\./x'"),
        (["--mtu", "big"], "--mtu.*big"),
        (["--mtu", "500"], "--mtu 500 is out of range: 576 to 65000"),
        (["--mtu", "65001"], "--mtu 65001 is out of range"),
        (["--cluster-cidr", "fd00::/48", "--pod-cidr", "fd00::/64", "--mtu", "1279"], "--mtu 1279 is out of range: 1280 to"),
        (["--masquerade", "maybe"], "--masquerade.*'maybe'"),
        (["--node-name", "a/b"], "--node-name 'a/b'"),
        (["--node-name", ".."], "--node-name '..'"),
        (["--nodes-dir", "/n", "--node-name", "n" * 246], "too long for a file of --nodes-dir"),
        (["--nonsense"], "--nonsense"),
        ([*GOOD, "--nodes-dir", "/n", "--kubeconfig", "/k"], "--nodes-dir and --kubeconfig are two node stores"),
        ([*GOOD, "--kubeconfig", "/k"], "--pod-cidr is for --nodes-dir: a cluster tells its nodes"),
    ],
)
def test_a_wrong_flag_exits_2_naming_flag_and_value(argv, said, capsys):
    with pytest.raises(SystemExit) as left:
        agent.main(["run", *argv], {})
    assert left.value.code == 2
    (last,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(said, last), last


@pytest.mark.parametrize(
    "environ, said",
    [
        ({"MNCNI_CLUSTER_CIDR": "10.0.0.0/8,x"}, "MNCNI_CLUSTER_CIDR: 'x'"),
        ({"MNCNI_POD_CIDR": "10.0.0.1/8"}, "MNCNI_POD_CIDR: 10.0.0.1/8 has host bits set"),
        ({"MNCNI_ENDPOINT": "node1"}, "MNCNI_ENDPOINT: 'node1'"),
        ({"MNCNI_PORT": "1,2"}, "--port.*'1,2'"),
        ({"MNCNI_MASQUERADE": "1"}, "--masquerade.*'1'"),
        ({"MNCNI_CLUSTER_CIDR": "10.0.0.0/8", "KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "_SERVICE_HOST 10.96.0.1 is inside --cluster"),
    ],
)
def test_a_wrong_variable_exits_2_too(environ, said, capsys):
    with pytest.raises(SystemExit) as left:
        agent.main(["run"], environ)
    assert left.value.code == 2 and re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    "argv, lacking",
    [(GOOD, "--nodes-dir"), (["--nodes-dir", "/nodes"], "--cluster-cidr"), (["--nodes-dir", "/nodes", *GOOD[:2]], "--pod-cidr")],
)
def test_what_run_cannot_do_without_is_asked_for(argv, lacking, capsys):
    with pytest.raises(SystemExit) as left:
        agent.main(["run", *argv], {})
    assert left.value.code == 2 and f"{lacking} is needed" in capsys.readouterr().err


def test_every_flag_of_run_has_its_variable_and_the_flag_wins():
    environ = {
        "MNCNI_NODE_NAME": "n7",
        "MNCNI_NODES_DIR": "/n",
        "MNCNI_KUBECONFIG": "/k",
        "MNCNI_CLUSTER_CIDR": "10.0.0.0/8,fd00::/32",
        "MNCNI_POD_CIDR": "10.7.0.0/24,fd00:0:7::/64",
        "MNCNI_SERVICE_CIDR": "11.0.0.0/16",
        "MNCNI_ENDPOINT": "192.0.2.7,2001:db8::7",
        "MNCNI_PORT": "1",
        "MNCNI_KEY_MAX_AGE": "2h",
        "MNCNI_BRIDGE": "br7",
        "MNCNI_NAMESPACE": "ns7",
        "MNCNI_MTU": "1400",
        "MNCNI_MASQUERADE": "FALSE",
        "MNCNI_CONF_DIR": "/c",
        "MNCNI_BIN_DIR": "/b",
        "MNCNI_STATE_DIR": "/s",
        "MNCNI_RUN_DIR": "/r",
        "MNCNI_LISTEN": "[::1]:7",
    }
    assert {"MNCNI_" + flag[2:].upper().replace("-", "_") for flag, *_ in agent.FLAGS} == set(environ)
    settings = parse(environ=environ)
    shown = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    assert {key: [str(item) for item in value] if isinstance(value, tuple) else value for key, value in shown.items()} == {
        "node_name": "n7",
        "nodes_dir": "/n",
        "kubeconfig": "/k",
        "cluster_cidrs": ["10.0.0.0/8", "fd00::/32"],
        "pod_cidrs": ["10.7.0.0/24", "fd00:0:7::/64"],
        "service_cidrs": ["11.0.0.0/16"],
        "endpoints": ["192.0.2.7", "2001:db8::7"],
        "port": 1,
        "key_max_age": 7200,
        "bridge": "br7",
        "namespace": "ns7",
        "mtu": 1400,
        "masquerade": False,
        "conf_dir": "/c",
        "bin_dir": "/b",
        "state_dir": "/s",
        "run_dir": "/r",
        "listen": ["::1", "7"],
    }
    assert (settings.netns, settings.families) == ("/run/netns/ns7", [4, 6])
    other = parse("--cluster-cidr", "10.9.0.0/16", "--pod-cidr", "10.9.1.0/24", "--mtu", "1300", environ=environ)
    assert ([str(cidr) for cidr in other.cluster_cidrs], other.mtu) == (["10.9.0.0/16"], 1300)


def test_empty_variables_count_as_absent():
    names = ["MNCNI_" + flag[2:].upper().replace("-", "_") for flag, *_ in agent.FLAGS]
    assert parse(environ=dict.fromkeys(names, "")) == parse()


def test_the_agent_says_that_it_needs_root(mocker, caplog):
    mocker.patch("os.geteuid", return_value=1000)
    assert agent.main(["run", "--nodes-dir", "/nodes", *GOOD], {}) == 1
    assert agent.main(["status"], {}) == 1
    assert "agent.py run needs root" in caplog.text and "agent.py status needs root" in caplog.text


# ---- the directory store ----


@pytest.fixture
def store(tmp_path):
    (tmp_path / "nodes").mkdir()
    return agent.DirectoryStore(str(tmp_path / "nodes"))


def write(store, name, text, mode="w"):
    with open(os.path.join(store.path, name), mode) as file:
        file.write(text)


def test_records_are_the_json_files_by_node_name(store):
    write(store, "a.json", "1")
    write(store, "b.json", "2")
    write(store, "b.json~", "3")
    write(store, "README", "4")
    write(store, ".c.json", "5")
    write(store, ".json", "6")
    assert store.records() == {"a": "1", "b": "2"}


def test_changed_says_whether_the_records_say_something_else(store):
    assert store.changed() and not store.changed(), "the first look is news"
    write(store, "a.json", "1")
    assert store.changed() and not store.changed()
    write(store, "a.json", "22")
    assert store.changed() and not store.changed()
    write(store, ".b.json", "unfinished")
    assert not store.changed()
    os.rename(os.path.join(store.path, ".b.json"), os.path.join(store.path, "b.json"))
    assert store.changed() and not store.changed()
    os.unlink(os.path.join(store.path, "a.json"))
    assert store.changed() and not store.changed()


def test_a_record_written_again_as_it_was_is_no_news(store):
    store.publish("a", "1")
    assert store.changed()
    store.publish("a", "1")
    os.utime(os.path.join(store.path, "a.json"))
    assert not store.changed()


def test_a_file_that_was_not_written_is_not_read_again(store, mocker):
    for number in range(50):
        store.publish(f"n{number}", "1")
    store.records()
    opened = mocker.spy(os, "open")
    store.publish("n7", "22")
    opened.reset_mock()
    assert store.records()["n7"] == "22"
    assert [call.args[0] for call in opened.call_args_list] == [os.path.join(store.path, "n7.json")]


def test_a_half_written_record_is_read_as_it_is_and_again_when_it_is_whole(store):
    text = text_of(1)
    write(store, "a.json", text[:40])
    assert store.records() == {"a": text[:40]}
    write(store, "a.json", text[40:], "a")
    assert store.changed() and store.records() == {"a": text}


def test_publish_is_whole_or_absent_and_leaves_nothing_else(store):
    store.publish("a", "1")
    store.publish("a", "2")
    assert (os.listdir(store.path), store.records()) == (["a.json"], {"a": "2"})


@pytest.mark.parametrize("make", ["absent", "a file"])
def test_a_store_that_is_not_there_is_an_error_and_its_coming_and_going_is_news(store, make):
    store.publish("a", "1")
    assert store.changed()
    os.rename(store.path, store.path + ".away")
    if make == "a file":
        Path(store.path).write_text("")
    assert store.changed() and not store.changed()
    for act in (store.records, lambda: store.publish("a", "1")):
        with pytest.raises(agent.StoreError, match=f"--nodes-dir {store.path}: (No such|Not a)"):
            act()
    if make == "a file":
        os.unlink(store.path)
    os.rename(store.path + ".away", store.path)
    assert store.changed() and store.records() == {"a": "1"}


def test_an_unreadable_store_is_an_error(store, mocker):
    mocker.patch("os.listdir", side_effect=PermissionError(13, "Permission denied"))
    with pytest.raises(agent.StoreError, match="Permission denied"):
        store.records()


@pytest.mark.parametrize("kind", ["directory", "fifo", "loop", "dangling", "device"])
def test_what_is_no_file_neither_stops_the_agent_nor_hides_the_others(store, kind):
    path = os.path.join(store.path, "bad.json")
    make = {
        "directory": lambda: os.mkdir(path),
        "fifo": lambda: os.mkfifo(path),
        "loop": lambda: os.symlink(path, path),
        "dangling": lambda: os.symlink("/nowhere", path),
        "device": lambda: os.symlink("/dev/zero", path),
    }
    make[kind]()
    store.publish("a", "1")
    found = store.records()
    assert found.pop("a") == "1" and list(found) == ["bad"]
    assert isinstance(agent.Roster(make_settings()).verdict("bad", found["bad"]), str)
    assert store.changed() and not store.changed()


def test_a_fifo_that_somebody_holds_open_does_not_stop_the_agent(store):
    path = os.path.join(store.path, "bad.json")
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)
    try:
        assert store.records() == {"bad": ""}
    finally:
        os.close(descriptor)


def test_a_file_that_cannot_be_read_for_now_keeps_its_text(store, mocker):
    store.publish("a", "1")
    store.records()
    store.publish("a", "2")
    mocker.patch("os.stat", side_effect=OSError(5, "Input/output error"))
    assert store.records() == {"a": "1"}
    mocker.stopall()
    assert store.records() == {"a": "2"}


def test_no_more_than_the_limit_is_read(store):
    write(store, "a.json", "x" * 1_000_000)
    assert len(store.records()["a"]) == store.RECORD_LIMIT + 1


def test_a_name_that_no_node_has_is_shown_so_that_a_terminal_survives_it(store):
    for name in (b"a\nb.json", b"\x1b[2J.json", b"\xff.json"):
        with open(os.path.join(store.path.encode(), name), "w") as file:
            file.write(text_of(1))
    found = store.records()
    assert len(found) == 3 and all(name.isascii() and name.isprintable() for name in found)
    assert not agent.Roster(make_settings()).judge(found, "", (V4,))[0]


# ---- the key ----


def is_clamped(key):
    raw = base64.b64decode(key)
    return len(raw) == 32 and raw[0] & 7 == 0 and raw[31] & 192 == 64


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def key_path(tmp_path):
    return str(tmp_path / "state" / "key")


@pytest.fixture(params=[0o022, 0o000, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_a_key_is_made_once_0600_in_a_0700_directory(key_path, umask):
    key = agent.ensure_key(key_path, "")
    assert is_clamped(key) and agent.ensure_key(key_path, "other") == key
    assert (mode_of(key_path), mode_of(os.path.dirname(key_path))) == (0o600, 0o700)
    assert os.listdir(os.path.dirname(key_path)) == ["key"]


def test_keys_differ():
    assert len({agent.make_key() for _ in range(100)}) == 100 and all(is_clamped(agent.make_key()) for _ in range(100))


def test_a_running_device_gives_its_key_to_a_node_that_lost_the_file(key_path):
    device_key = agent.make_key()
    assert agent.ensure_key(key_path, device_key) == device_key == mncni.read_file(key_path).strip()


def test_wrong_modes_are_put_right_and_right_ones_not_written(key_path, mocker):
    key = agent.ensure_key(key_path, "")
    os.chmod(key_path, 0o644)
    os.chmod(os.path.dirname(key_path), 0o755)
    assert agent.ensure_key(key_path, "") == key
    assert (mode_of(key_path), mode_of(os.path.dirname(key_path))) == (0o600, 0o700)
    changed = mocker.spy(os, "chmod")
    agent.ensure_key(key_path, "")
    assert changed.call_count == 0


NO_KEYS = ["", "\n", "AAAA", "no key at all", key_of(0), key_of(1)[:-4], key_of(1) * 2, key_of(1) + "\n" + key_of(2), "\0" * 45, "é"]


@pytest.mark.parametrize("damage", NO_KEYS)
def test_a_damaged_key_file_is_refused_and_kept(key_path, damage):
    agent.ensure_key(key_path, "")
    with open(key_path, "w") as file:
        file.write(damage)
    with pytest.raises(mncni.CNIError, match=f"the key file {key_path} is damaged") as caught:
        agent.ensure_key(key_path, "")
    assert caught.value.code == 5 and mncni.read_file(key_path) == damage
    assert not damage.strip("\0\n") or damage not in str(caught.value)


@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
def test_a_key_that_cannot_be_kept_is_no_key(key_path, call, mocker):
    os.makedirs(os.path.dirname(key_path))
    mocker.patch(f"os.{call}", side_effect=OSError(28, "No space left on device"))
    with pytest.raises((mncni.CNIError, OSError), match="No space left"):
        agent.ensure_key(key_path, "")
    mocker.stopall()
    assert not os.path.exists(key_path)
    assert is_clamped(agent.ensure_key(key_path, ""))


# ---- the lock ----


def run_with(run_dir):
    """The exit code of `agent.py run` with this --run-dir."""
    return agent.main(["run", "--nodes-dir", "/nodes", *GOOD, "--run-dir", str(run_dir)], {})


@pytest.mark.root
def test_a_second_agent_leaves_with_3(tmp_path, caplog):
    with agent.agent_lock(make_settings(run_dir=str(tmp_path))):
        assert run_with(tmp_path) == 3
    assert "another agent runs here" in caplog.text and f"{tmp_path}/agent.lock" in caplog.text


def test_a_look_at_the_status_does_not_keep_an_agent_from_starting(tmp_path):
    settings = make_settings(run_dir=str(tmp_path))
    look = agent.agent_lock(settings)
    look.__enter__()
    threading.Timer(0.05, look.__exit__).start()
    with agent.agent_lock(settings, timeout_s=30):
        pass


def test_no_other_user_can_take_the_lock(tmp_path, umask):
    with agent.agent_lock(make_settings(run_dir=str(tmp_path))):
        assert mode_of(tmp_path / "agent.lock") == 0o600


@pytest.mark.root
def test_a_run_dir_that_cannot_be_used_is_named(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert run_with(tmp_path / "file" / "run") == 1
    assert f"{tmp_path}/file/run" in caplog.text


# ---- passes ----


class Bench:
    """An agent on its bench: files below tmp_path, a WireGuard device in memory, time at will."""

    def __init__(self, tmp_path):
        self.dir, self.now, self.run = tmp_path, 1000.0, FakeWireGuard()
        dirs = {name: str(tmp_path / name) for name in ("nodes_dir", "conf_dir", "bin_dir", "state_dir", "run_dir")}
        self.settings = make_settings([4], mtu=1400, **dirs)
        os.mkdir(self.settings.nodes_dir)
        self.start()

    def start(self):
        """A new agent, as after a restart: it knows what is in files and in the device."""
        store = agent.DirectoryStore(self.settings.nodes_dir)
        self.agent = agent.Agent(self.settings, store, self.run, clock=lambda: self.now)

    def write(self, *numbers, text=None):
        for number in numbers:
            (self.dir / "nodes_dir" / f"n{number}.json").write_text(text_of(number) if text is None else text)

    def remove(self, *numbers):
        for number in numbers:
            (self.dir / "nodes_dir" / f"n{number}.json").unlink()

    def tick(self, later_s=0.5):
        """Whether the network stands after the next tick."""
        self.now += later_s
        return self.agent.tick()

    def settle(self):
        """Ticks until the store says nothing new."""
        for _ in range(4):
            assert self.tick(), self.agent.reason
        self.run.writes()

    def text(self, name):
        return mncni.read_file(str(self.dir / name))

    def status(self):
        return json.loads(self.text("run_dir/status.json"))

    @property
    def own(self):
        return self.dir / "nodes_dir" / "self.json"


@pytest.fixture
def bench(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(agent, "FLOOR", (agent.ensure_endpoints,))
    monkeypatch.setattr(agent, "STAGES", (agent.ensure_mtu, agent.ensure_identity))
    return Bench(tmp_path)


def test_a_peer_whose_clock_was_set_back_is_made_anew_once(bench):
    bench.write(1, 2)
    bench.settle()
    bench.write(1, text=text_of(1, setBack=1700000000))
    assert bench.tick()
    (written,) = bench.run.writes()
    assert written.startswith(f"set mncni-wg0 peer {key_of(1)} remove peer {key_of(1)} endpoint") and key_of(2) not in written
    assert bench.run.names() == [1, 2]
    bench.start()
    bench.settle()
    assert bench.run.writes() == []


def test_a_record_that_changes_again_and_again_is_greeted_once_a_minute(bench):
    """Whatever endpoint it names. The peer's other changes are followed meanwhile, and the last of its wishes is granted in the end."""
    bench.write(1, 2)
    bench.settle()
    remade = []
    for second in range(150):
        if second < 130:
            bench.write(1, text=text_of(1, setBack=1700000000 + second, endpoints=[f"198.51.100.{second + 1}"]))
        assert bench.tick(1)
        written = " ".join(bench.run.writes())
        remade += [second] * written.count(f"peer {key_of(1)} remove")
        assert (f"{key_of(1)} persistent-keepalive 1" in written) == (remade[-1:] == [second]) and key_of(2) not in written
        assert second >= 130 or bench.run.peers[key_of(1)]["endpoint"] == f"198.51.100.{second + 1}:28384"
    assert remade == [0, 60, 120]
    for _ in range(40):
        bench.tick(1)
    assert len([line for line in bench.run.writes() if "remove" in line]) == 1


def test_a_record_that_changes_ten_times_a_second_costs_a_tenth_of_the_time(bench, monkeypatch):
    """Each pass costs 45 ms, as among 5,000 nodes. A change after a quiet time is taken over at once."""
    passes, reconcile = [], bench.agent.reconcile
    bench.write(1, 2)
    bench.settle()

    def slow(look):
        reconcile(look)
        bench.now += 0.045
        passes.append(look)

    monkeypatch.setattr(bench.agent, "reconcile", slow)
    for number in range(600):
        bench.write(1, text=text_of(1, gen=number + 2))
        bench.tick(0.1)
    assert 0.04 < passes.count(False) * 0.045 / 60 < 0.13
    for _ in range(100):
        bench.tick(0.1)
    passes.clear()
    for number in range(5):
        bench.write(2, text=text_of(2, gen=number + 2))
        bench.tick(0.1)
    assert passes.count(False) == 5


class Services:
    """An API server that has ServiceCIDR objects, or answers with an error."""

    def __init__(self, *cidrs, error=None):
        self.items, self.error = [{"spec": {"cidrs": [cidr]}} for cidr in cidrs], error

    def request(self, verb, path):
        assert (verb, path) == ("GET", "/apis/networking.k8s.io/v1/servicecidrs")
        if self.error:
            raise self.error
        return {"items": self.items}


def test_networks_of_services_are_the_clusters_and_stay_while_it_does_not_tell():
    store = agent.KubernetesStore(Services("fd00:96::/112", "10.96.0.0/12"), "n1")
    for api in (store.api, Services(error=kube.ApiError(404, "NotFound", "")), Services(None), Services("x")):
        store.api = api
        store._look_services()
        assert store.service_cidrs == ["10.96.0.0/12", "fd00:96::/112"]
    store.api = Services("10.97.0.0/16")
    store._look_services()
    assert store.service_cidrs == ["10.97.0.0/16"] and store.changed()


def test_networks_of_services_are_taken_over_and_remembered_unless_flags_name_them(bench, caplog):
    bench.settle()
    bench.agent.store.service_cidrs = ["10.96.0.0/12", "192.0.2.0/24"]  # the one has this node's address
    assert bench.agent.adopt_services() and not bench.agent.adopt_services()
    assert [str(cidr) for cidr in bench.agent.settings.service_cidrs] == ["10.96.0.0/12"]
    bench.write(1)
    bench.settle()
    bench.start()
    assert bench.agent.adopt_services() and [str(cidr) for cidr in bench.agent.settings.service_cidrs] == ["10.96.0.0/12"]
    bench.settings = dataclasses.replace(bench.settings, service_cidrs=(ipaddress.ip_network("10.7.0.0/16"),))
    bench.start()
    assert not bench.agent.adopt_services() and bench.agent.settings.service_cidrs == bench.settings.service_cidrs
    bench.settings = dataclasses.replace(bench.settings, service_cidrs=tuple(map(ipaddress.ip_network, ("10.7.0.0/16", "192.0.0.0/8"))))
    bench.start()
    assert bench.agent.adopt_services() and [str(cidr) for cidr in bench.agent.settings.service_cidrs] == ["10.7.0.0/16"]
    assert "among those of Services, 192.0.0.0/8" in caplog.text and not bench.agent.adopt_services()


def test_a_node_that_lies_gains_nothing_by_a_restart_of_the_agent(bench):
    bench.write(1, text=text_of(1, created="2024-01-01T00:00:00Z"))
    bench.settle()
    bench.write(2, text=text_of(2, created="2000-01-01T00:00:00Z", podCIDRs=["10.244.1.0/24"]))
    for _ in range(2):
        bench.settle()
        assert bench.run.names() == [1] and "is that of node n1" in bench.agent.quarantine["n2"]
        bench.start()
    bench.remove(1)
    bench.settle()
    assert bench.run.names() == [2]


def test_peers_follow_the_store(bench):
    bench.write(1, 2)
    bench.settle()
    assert bench.run.names() == [1, 2]
    bench.write(3)
    assert bench.tick() and bench.run.writes() == [f"set mncni-wg0 peer {key_of(3)} endpoint 192.0.2.3:28384 allowed-ips 10.244.3.0/24"]
    bench.remove(1)
    assert bench.tick() and bench.run.writes() == [f"set mncni-wg0 peer {key_of(1)} remove"]
    bench.write(2, text="{}")
    assert bench.tick() and bench.run.writes() == [f"set mncni-wg0 peer {key_of(2)} remove"]
    assert (bench.status()["quarantine"], bench.run.names()) == ({"n2": '"v" is null, not a number with content'}, [3])
    bench.write(2)
    assert bench.tick() and bench.run.names() == [2, 3] and bench.status()["quarantine"] == {}


def test_a_new_device_makes_itself_known_to_peers_that_know_its_key(bench):
    bench.write(1)
    assert bench.tick() and "keepalive" not in str(bench.run.writes()), "nobody has its record yet"
    bench.settle()
    bench.run.peers.clear()  # as after a reboot
    assert bench.tick(2)
    greeting = f"peer {key_of(1)} persistent-keepalive 1 peer {key_of(1)} persistent-keepalive 0"
    assert bench.run.writes() == [f"set mncni-wg0 peer {key_of(1)} endpoint 192.0.2.1:28384 allowed-ips 10.244.1.0/24 {greeting}"]


def test_a_thousand_new_peers_go_in_batches_that_fit_a_command_line(bench):
    text = '{{"v":2,"podCIDRs":["10.244.{}.{}/30"],"uid":"u","endpoints":["192.0.2.1"],"key":"{}","port":1}}'
    for number in range(1, 1001):
        bench.write(number, text=text.format(number // 64, number % 64 * 4, key_of(number)))
    assert bench.tick() and len(bench.run.names()) == 1000
    assert len([line for line in bench.run.writes() if " peer " in line]) == 10


def test_a_quiet_hour_writes_nothing(bench):
    bench.write(1, 2)
    bench.settle()
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in bench.dir.rglob("*") if path.is_file()}
    bench.run.log.clear()
    for _ in range(360):
        assert bench.tick(10)
    assert len(bench.run.log) == 720 and bench.run.writes() == []
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in bench.dir.rglob("*") if path.is_file()}


def test_between_audits_a_store_without_news_costs_no_pass(bench):
    bench.settle()
    bench.tick(10)
    bench.run.log.clear()
    os.utime(bench.own)
    for _ in range(9):
        bench.tick(1)
    glances = len(bench.run.log)
    assert 0 < glances <= 9 / agent.GLANCE_S and bench.run.writes() == []
    bench.tick(1)
    assert len(bench.run.log) == 2


def test_a_restart_writes_nothing_to_the_device_and_does_not_fight_a_peer_that_roams(bench):
    bench.write(1, 2)
    bench.settle()
    bench.run.peers[key_of(1)]["endpoint"] = "198.51.100.9:4711"
    bench.start()
    bench.settle()
    assert bench.run.peers[key_of(1)]["endpoint"] == "198.51.100.9:4711"
    assert bench.run.writes() == []


def test_a_restart_follows_a_record_that_changed_meanwhile(bench):
    bench.write(1)
    bench.settle()
    bench.write(1, text=text_of(1, endpoints=["192.0.2.77"]))
    bench.start()
    assert bench.tick() and bench.run.writes() == [f"set mncni-wg0 peer {key_of(1)} endpoint 192.0.2.77:28384"]


def test_a_restart_without_the_store_goes_on_with_the_last_good_list(bench):
    bench.write(1, 2)
    bench.write(3, text="bad")
    bench.settle()
    os.rename(bench.settings.nodes_dir, bench.settings.nodes_dir + ".away")
    bench.run.peers.clear()  # as after a reboot
    bench.start()
    for _ in range(100):
        assert bench.tick(10)
    assert bench.run.names() == [1, 2]
    assert "the last good list of nodes stays in use" in bench.status()["store"]


def test_a_store_that_is_missing_keeps_the_peers_and_one_that_returns_is_believed(bench, caplog):
    bench.write(1, 2)
    bench.settle()
    away = bench.settings.nodes_dir + ".away"
    os.rename(bench.settings.nodes_dir, away)
    for _ in range(100):
        assert bench.tick(10)
    assert bench.run.names() == [1, 2] and "No such file" in bench.status()["store"]
    assert caplog.text.count("No such file") == 2, "said once: cannot read, cannot write"
    os.rename(away, bench.settings.nodes_dir)
    bench.write(3)
    assert "well again" not in caplog.text
    assert bench.tick() and bench.run.names() == [1, 2, 3] and bench.status()["store"] == ""
    assert bench.tick() and caplog.text.count("the node store is well again") == 1


def test_a_store_without_our_record_is_not_believed_and_gets_it_back(bench):
    bench.write(1, 2)
    bench.settle()
    text = bench.own.read_text()
    bench.own.unlink()
    bench.remove(1)
    assert bench.tick() and bench.run.names() == [1, 2] and bench.own.read_text() == text
    assert "lost this node's record" in bench.status()["store"]
    bench.tick()
    assert bench.run.names() == [1, 2] and "1 nodes have vanished" in bench.status()["store"]
    bench.tick(59)
    assert bench.run.names() == [1, 2]
    bench.tick(1)
    assert bench.run.names() == [2] and bench.status()["store"] == ""


def test_an_emptied_store_is_held_for_60_s_and_filled_again_by_its_nodes(bench):
    bench.write(1, 2)
    bench.settle()
    bench.own.unlink()
    bench.remove(1, 2)
    bench.tick()
    bench.tick()
    bench.write(1, 2)
    assert bench.tick() and bench.status()["store"] == "" and bench.run.writes() == []
    bench.remove(1)
    assert bench.tick() and bench.run.names() == [2], "a later loss is no part of that"


@pytest.mark.parametrize("how", ["removed", "emptied", "broken"])
def test_many_nodes_lost_at_once_are_kept_for_60_s_then_gone(bench, how):
    bench.write(*range(1, 11))
    bench.settle()
    lose = {"removed": bench.remove, "emptied": lambda *n: bench.write(*n, text=""), "broken": lambda *n: bench.write(*n, text="{")}
    lose[how](1, 2, 3, 4)
    for _ in range(11):
        assert bench.tick(5) and len(bench.run.names()) == 10
        assert "good records of 4 nodes have vanished" in bench.status()["store"]
    assert bench.run.writes() == []
    bench.write(11)
    assert bench.tick(4) and 11 in bench.run.names(), "what a doubted store adds is believed"
    assert bench.tick(5) and len(bench.run.names()) == 11
    bench.tick(1)
    assert bench.run.names() == [5, 6, 7, 8, 9, 10, 11] and bench.status()["store"] == ""


def test_a_few_nodes_lost_at_once_are_gone_at_once(bench):
    bench.write(*range(1, 11))
    bench.settle()
    bench.remove(1, 2, 3)
    assert bench.tick() and bench.run.names() == [4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("known, lost, too_many", [(0, 0, False), (3, 3, False), (4, 4, True), (20, 4, False), (20, 5, True)])
def test_too_many_is_more_than_three_and_more_than_a_fifth(known, lost, too_many):
    assert agent.lost_too_many(set(range(lost)), set(range(known))) is too_many


def test_lost_nodes_that_return_end_the_doubt(bench):
    bench.write(*range(1, 11))
    bench.settle()
    bench.remove(*range(1, 11))
    bench.tick()
    bench.write(*range(1, 11))
    assert bench.tick() and bench.status()["store"] == "" and bench.run.writes() == []
    bench.remove(1)
    assert bench.tick() and len(bench.run.names()) == 9


def test_a_doubt_survives_a_restart(bench):
    bench.write(*range(1, 11))
    bench.settle()
    bench.remove(*range(1, 11))
    bench.tick(30)
    bench.start()
    assert bench.tick(0) and len(bench.run.names()) == 10
    bench.tick(59)
    assert len(bench.run.names()) == 10
    bench.tick(1)
    assert bench.run.names() == []


def test_a_doubted_store_is_not_written_to_at_every_look(bench):
    """Else each agent would wake each other one, twice a second."""
    bench.write(*range(1, 11))
    bench.settle()
    bench.remove(*range(1, 11))
    bench.tick()
    before = bench.own.stat().st_ino
    for _ in range(50):
        bench.tick(1)
    assert bench.own.stat().st_ino == before


# ---- our own record ----


def test_our_record_is_written_once_and_its_generation_grows_with_its_changes(bench):
    bench.settle()
    first = json.loads(bench.own.read_text())
    assert list(first) == ["v", "podCIDRs", "uid", "endpoints", "key", "port", "gen", "created"] and first["gen"] == 1
    bench.settings = dataclasses.replace(bench.settings, port=4711)
    bench.start()
    bench.settle()
    second = json.loads(bench.own.read_text())
    assert second == {**first, "port": 4711, "gen": 2}
    bench.start()
    bench.settle()
    assert json.loads(bench.own.read_text()) == second


class TestClock:
    """WireGuard takes the handshakes of a node whose clock was set back for replays: the others have to hear of it."""

    @pytest.fixture
    def wall(self, monkeypatch):
        """wall.now(): the time of day; wall.ahead: how far it is ahead of the kernel's."""
        wall, real = SimpleNamespace(ahead=0), time.time
        monkeypatch.setattr(agent.time, "time", lambda: real() + wall.ahead)
        return wall

    def record(self, bench):
        bench.tick()
        record = json.loads(bench.own.read_text())
        return record["gen"], record.get("setBack")

    def test_a_clock_that_is_set_back_is_in_our_record(self, bench, wall):
        bench.settle()
        wall.ahead = 3600
        assert self.record(bench) == (1, None)
        wall.ahead -= agent.SET_BACK_S - 10
        assert self.record(bench) == (1, None)
        wall.ahead = -3600
        generation, first = self.record(bench)
        assert generation == 2 and abs(first - agent.time.time()) < 60
        wall.ahead = -7200
        assert self.record(bench) == (3, pytest.approx(first - 3600, abs=60))
        assert self.record(bench)[0] == 3

    @pytest.mark.parametrize("ahead, told", [(3600, False), (-60, False), (-3600, True)])
    def test_one_set_back_while_there_was_no_agent_is_noticed_too(self, bench, wall, ahead, told):
        bench.settle()
        wall.ahead = ahead
        bench.start()
        generation, set_back = self.record(bench)
        assert (generation, bool(set_back)) == (1 + told, told)
        os.utime(bench.agent.state_path, (agent.time.time(),) * 2)  # as the kernel's clock would have it
        bench.start()
        assert self.record(bench) == (generation, set_back)


@pytest.mark.parametrize("damage", ["", "{", "[]", "\0" * 200])
def test_our_damaged_record_is_written_again(bench, damage):
    bench.settle()
    text = bench.own.read_text()
    bench.own.write_text(damage)
    assert bench.tick() and bench.own.read_text() == text


def test_two_nodes_of_one_name_do_not_overwrite_each_other_for_ever(bench):
    bench.settle()
    theirs = json.dumps({**record(7), "uid": "another"})
    bench.own.write_text(theirs)
    for _ in range(5):
        bench.tick(10)
    assert bench.own.read_text() == theirs
    assert "another node has written the record of self" in bench.status()["store"]
    bench.own.unlink()
    bench.tick()
    assert json.loads(bench.own.read_text())["uid"] != "another"


def test_a_node_that_lost_its_state_takes_its_record_over(bench):
    bench.own.write_text(json.dumps({**record(7), "uid": "before"}))
    bench.settle()
    assert json.loads(bench.own.read_text())["uid"] != "before"


def test_a_store_that_cannot_be_written_is_not_told_at_every_pass_and_does_not_bring_the_network_down(bench, mocker, caplog):
    mocker.patch.object(agent.DirectoryStore, "publish", side_effect=agent.StoreError("cannot write to --nodes-dir"))
    assert bench.tick(10) and bench.status()["store"] == "cannot write to --nodes-dir"
    assert bench.tick(10) and bench.status()["store"].endswith("cannot write to --nodes-dir")
    caplog.clear()
    assert bench.tick(10) and caplog.text == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"own":[],"records":[]}', '{"own":null}', '{"records":{"a":1}}', "\0\0"])
def test_a_damaged_list_of_nodes_counts_as_none(tmp_path, text):
    (tmp_path / "nodes.json").write_text(text)
    assert agent.load_state(str(tmp_path / "nodes.json")) == {"own": {}, "records": {}}
    assert agent.load_state(str(tmp_path)) == {"own": {}, "records": {}}


# ---- when a pass fails ----


def break_stage(monkeypatch, error):
    def stage(context):
        if error is not None:
            raise error

    monkeypatch.setattr(agent, "STAGES", (stage, agent.ensure_mtu, agent.ensure_identity))


@pytest.mark.parametrize(
    "error, said",
    [
        (mncni.CNIError(100, "ip failed: no", "ip -batch -: link x\nno\nCommand failed -:1"), "ip failed: no (ip -batch -: link x)"),
        (mncni.CNIError(7, "link is somebody else's"), "link is somebody else's"),
        (OSError(30, "Read-only file system", "/var/lib/x"), "[Errno 30] Read-only file system: '/var/lib/x'"),
        (TypeError("'NoneType' object is not subscriptable"), "'NoneType' object is not subscriptable"),
        (RecursionError(), "RecursionError"),
    ],
)
def test_no_error_ends_the_agent_and_each_is_told(bench, monkeypatch, caplog, error, said):
    bench.write(1)
    bench.settle()
    break_stage(monkeypatch, error)
    assert not bench.tick(10) and not bench.tick(1) and not bench.tick(1)
    ready = json.loads(bench.text("run_dir/ready"))
    assert (bench.status()["reason"], bench.status()["ok"], ready["reason"], ready["ok"]) == (said, False, said, False)
    assert bench.status()["peers"] and bench.run.names() == [1], "the peers stay"
    assert caplog.text.count(f"the network is not up: {said}") == 1
    assert caplog.text.count("Traceback") == isinstance(error, (TypeError, RecursionError))
    break_stage(monkeypatch, None)
    assert bench.tick(1) and bench.status()["ok"] and json.loads(bench.text("run_dir/ready"))["ok"]


def test_before_the_first_success_there_is_neither_ready_file_nor_conflist(bench, monkeypatch):
    break_stage(monkeypatch, mncni.CNIError(7, "no"))
    assert not bench.tick()
    assert bench.text("run_dir/ready") is None and not os.path.exists(bench.settings.conf_dir)
    break_stage(monkeypatch, None)
    assert bench.tick(1)
    ready = {"bootID": mncni.boot_id(), "device": "mncni-host", "port": 28384, "ok": True, "reason": ""}
    assert json.loads(bench.text("run_dir/ready")) == ready
    assert bench.text("conf_dir/10-mncni.conflist") == agent.conflist(bench.settings, 1400)


def test_a_plugin_that_cannot_be_installed_lets_no_pod_in(bench):
    os.mkdir(bench.settings.bin_dir)
    (bench.dir / "bin_dir" / "mncni").write_text("#!/bin/sh\n")
    assert not bench.tick()
    assert "is not MNCNI's own" in bench.status()["reason"] and bench.text("run_dir/ready") is None


def trial_that_says(bench, monkeypatch, **answers):
    """Have the commands that try the plugin answer: "python", "plugin": (code, stdout, stderr) or an exception. Returns what it ran."""
    device, ran = bench.run, []

    def run(command):
        what = "python" if agent.PYTHON in command.argv else "plugin" if command.environ else ""
        if what:
            ran.append(command)
        if isinstance(answers.get(what), Exception):
            raise answers[what]
        return mncni.Reply(*answers[what]) if what in answers else device(command)

    bench.agent.context.run = run
    return ran


REFUSAL = '{"cniVersion": "1.1.0", "code": 50, "msg": "cannot find the program \\"ip\\": install the package iproute2"}'
TRIALS = {  # how trying the plugin fails: (which command, its answer, words of the reason)
    "no python3": ("python", FileNotFoundError(2, "No such file or directory", agent.PYTHON), "No such file or directory"),
    "old python3": ("python", (1, "", "/usr/bin/python3 is Python 3.7.3, older than 3.9\n"), "is Python 3.7.3"),
    "launcher not executable": ("plugin", mncni.missing_tool("/opt/cni/bin/mncni"), 'cannot find the program "/opt/cni/bin/mncni"'),
    "not permitted": ("plugin", PermissionError(13, "Permission denied"), "Permission denied"),
    "another program": ("plugin", (1, "hello", "I am not it\n"), "I am not it"),
    "silent": ("plugin", (126, "", ""), "exit status 126"),
    "a traceback": ("plugin", (1, "", "Traceback\n  File\nImportError: no json\n"), "ImportError: no json"),
    "what STATUS says": ("plugin", (1, REFUSAL, ""), "install the package iproute2"),
    "JSON of another kind": ("plugin", (1, "[]", "odd"), "odd"),
    "no answer": ("plugin", mncni.CNIError(100, "no answer within 30 s from mncni"), "no answer within 30 s"),
}


@pytest.mark.parametrize("how", TRIALS)
def test_no_pod_is_let_in_while_a_runtime_could_not_start_the_plugin(bench, monkeypatch, how):
    what, answer, words = TRIALS[how]
    bench.write(1)
    trial_that_says(bench, monkeypatch, **{what: answer})
    assert not bench.tick()
    assert words in bench.agent.reason and f"{bench.settings.bin_dir}/mncni" in bench.agent.reason
    assert bench.run.names() == [1], "pods that run keep their network"
    assert bench.text("run_dir/ready") is None and not os.path.exists(bench.settings.conf_dir)
    bench.agent.context.run = bench.run
    assert bench.tick(agent.RETRY_S)
    assert json.loads(bench.text("run_dir/ready"))["ok"]


def test_the_plugin_is_tried_at_the_start_each_minute_and_when_files_change(bench, monkeypatch):
    ran = trial_that_says(bench, monkeypatch)
    bench.settle()
    bench.tick(agent.GLANCE_S)  # the conflist is new
    ran.clear()
    for _ in range(12):
        assert bench.tick(10)
    assert len(ran) == 4  # two commands, twice
    stdin = json.loads(ran[1].stdin)
    assert ran[1].argv == [f"{bench.settings.bin_dir}/mncni"] and ran[1].environ["CNI_COMMAND"] == "STATUS"
    assert not {"ready", "ipam"} & set(stdin) and (stdin["name"], stdin["cniVersion"]) == ("mncni", "1.1.0")
    ran.clear()
    (bench.dir / "bin_dir" / "mncni").chmod(0o644)
    assert bench.tick(agent.GLANCE_S)
    assert len(ran) == 2 and os.access(bench.dir / "bin_dir" / "mncni", os.X_OK)


def test_an_old_python_is_told_with_its_version():
    before = "import sys; sys.version_info, sys.version = (3, 8, 2), '3.8.2 (default)'; "
    done = subprocess.run([sys.executable, "-c", before + agent.OLD_PYTHON], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "/usr/bin/python3 is Python 3.8.2, older than 3.9\n")
    assert subprocess.run([sys.executable, "-c", agent.OLD_PYTHON]).returncode == 0


RIVALS = {  # a configuration beside the agent's: (name, text, whether a runtime would use it instead)
    "another network": ("05-other.conflist", '{"name": "other"}', True),
    "a single configuration": ("05-other.conf", "{}", True),
    "broken JSON, at which containerd stops": ("05-other.json", "{", True),
    "a later name": ("20-other.conflist", '{"name": "other"}', False),
    "another kind of file": ("05-other.bak", '{"name": "other"}', False),
    "a hidden file": (".05-other.conflist", '{"name": "other"}', True),
    "our chained plugin on another network": ("05-other.conflist", '{"name": "other", "plugins": [{"type": "mncni"}]}', True),
    "Multus that copied ours": ("00-multus.conf", '{"type": "multus", "delegates": [{"name": "mncni"}]}', False),
    "Multus that names ours": ("00-multus.conf", '{"type": "multus", "clusterNetwork": "/etc/cni/net.d/10-mncni.conflist"}', False),
    "Multus that names our network": ("00-multus.conf", '{"type": "multus", "clusterNetwork": "mncni"}', False),
}


@pytest.mark.parametrize("what", RIVALS)
def test_a_configuration_that_a_runtime_would_use_instead_is_named(bench, what):
    name, text, is_rival = RIVALS[what]
    os.mkdir(bench.settings.conf_dir)
    path = bench.dir / "conf_dir" / name
    path.write_text(text)
    assert bench.tick() is not is_rival
    assert (str(path) in bench.agent.reason) is is_rival
    path.unlink()
    assert bench.tick()


def test_in_a_container_the_plugin_is_tried_below_the_nodes_root_or_not_at_all(bench, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "192.0.2.250")
    ran = trial_that_says(bench, monkeypatch)
    assert bench.tick() and ran == []
    monkeypatch.setattr(agent, "HOST_ROOT", str(bench.dir / "host"))
    os.makedirs(f"{bench.dir}/host{bench.dir}")
    os.symlink(bench.settings.bin_dir, f"{bench.dir}/host{bench.settings.bin_dir}")
    assert bench.tick(agent.TRY_S)
    programs = (agent.PYTHON, f"{bench.settings.bin_dir}/mncni")
    assert [command.argv[:3] for command in ran] == [["chroot", f"{bench.dir}/host", program] for program in programs]


# ---- pods that run although their addresses are no longer this node's ----


def test_running_pods_outside_the_pod_cidrs_are_told_in_log_status_metrics_and_an_event(bench, monkeypatch, caplog):
    notes, here = [], ["old1", "new"]
    monkeypatch.setattr(mncni, "DEFAULT_DATA_DIR", str(bench.dir / "leases"))
    monkeypatch.setattr(mncni, "host_ifname", lambda prefix, network, container, ifname: "lo" if container in here else "mn-none")
    monkeypatch.setattr(agent.DirectoryStore, "note", lambda self, *words: notes.append(words))
    leases = mncni.Leases(mncni.DEFAULT_DATA_DIR, "mncni", bench.settings.run_dir)
    for container, addresses in {"old1": ["10.244.7.2", "fd00::2"], "ended": ["10.244.7.3"], "new": ["10.244.255.2"]}.items():
        leases.take(addresses, container, "eth0")
    bench.settle()
    assert bench.status()["stranded"] == {"old1": ["10.244.7.2", "fd00::2"]}
    assert bench.status()["ok"] and bench.agent.reason == "", "new pods do work"
    (note,) = notes
    assert note[:2] == ("self", "PodsWithoutNetwork")
    assert "10.244.7.2, fd00::2 (container old1)" in note[2] and "delete these pods" in note[2]
    assert note[2] in caplog.text
    shown = agent.look_status(bench.settings, bench.run)
    assert not shown["ok"] and note[2] in agent.format_status(shown, 0)
    assert agent.plan_metrics({**shown, "up": True, "leases": 3})["mncni_stranded_pods", ()] == 1
    here.remove("old1")
    assert bench.tick(10) and bench.status()["stranded"] == {} and len(notes) == 1


@pytest.mark.parametrize("name", ["key", "nodes.json"])
def test_a_full_disk_is_named_with_the_file_and_costs_the_network_only_at_the_key(bench, monkeypatch, name):
    real = agent.write_file

    def write_file(path, text, mode=0o644):
        if path.startswith(os.path.join(bench.settings.state_dir, name)):
            raise OSError(28, "No space left on device")  # as write() says it: without the file
        real(path, text, mode)

    monkeypatch.setattr(agent, "write_file", write_file)
    assert bench.tick() is (name != "key")
    said = bench.status()["reason" if name == "key" else "store"]
    assert said.startswith(f"cannot write {bench.settings.state_dir}/{name}") and "No space left on device" in said
    monkeypatch.undo()


# ---- secrets ----


def everything_said(bench, caplog):
    """All that the agent says or keeps for others: commands, logs, every file but the key."""
    paths = [path for path in bench.dir.rglob("*") if path.is_file() and path.name not in ("key", "key.new") and path.suffix != ".py"]
    files = [path.read_text() for path in paths]
    return "\n".join([*bench.run.log, caplog.text, *(str(entry.__dict__) for entry in caplog.records), *files])


@pytest.mark.parametrize("broken", ["nothing", "moved fields", "cut short", "garbage", "wg fails"])
def test_the_private_key_is_in_no_command_log_file_or_error(bench, caplog, broken):
    bench.write(1, 2)
    bench.settle()
    key = mncni.read_file(f"{bench.settings.state_dir}/key").strip()
    assert bench.run.private == key
    broken_dumps = {
        "nothing": None,
        "moved fields": (0, f"new\t{bench.run.public()}\t{key}\toff\n", ""),
        "cut short": (0, key, ""),
        "garbage": (0, f"{key}\t{key}\t1\toff\n{key}\t{key}\n{key}", ""),
        "wg fails": (1, key, "Unable to access interface: No such device"),
    }
    bench.run.broken = broken_dumps[broken]
    assert bench.tick(10) is (broken == "nothing")
    bench.start()
    bench.tick(10)
    assert key not in everything_said(bench, caplog)
    with_wg = agent.look_status(bench.settings, bench.run)
    assert key not in json.dumps(with_wg) + agent.format_status(with_wg, 0)


def test_files_are_readable_by_those_who_need_them_and_no_others(bench, umask):
    bench.write(1)
    bench.settle()
    modes = {str(path.relative_to(bench.dir)): oct(mode_of(path)) for path in bench.dir.rglob("*")}
    for name in ("state_dir/key", "state_dir/nodes.json"):
        assert modes[name] == "0o600"
    assert modes["state_dir"] == "0o700"
    assert all(int(mode, 8) & 0o022 == 0 for name, mode in modes.items() if "/" in name and "self" in name)


# ---- a new key ----


class Key:
    """The bench's key file and the one beside it."""

    def __init__(self, bench):
        self.bench = bench
        self.path, self.next = (bench.dir / "state_dir" / name for name in ("key", "key.new"))

    def leave_next(self):
        """As `agent.py rotate` does it. Returns its public key."""
        agent.write_next_key(str(self.path), agent.make_key())
        return self.public(self.next)

    def public(self, path=None):
        return public_of((path or self.path).read_text().strip())

    def told(self):
        return json.loads(self.bench.own.read_text())["key"]

    def make_old(self, seconds):
        os.utime(self.path, (time.time() - seconds,) * 2)


@pytest.fixture
def key(bench):
    bench.write(1, 2)
    bench.settle()
    return Key(bench)


def test_a_next_key_is_told_used_and_all_that_is_left(bench, key):
    before, new = key.path.read_text().strip(), key.leave_next()
    assert bench.tick()
    assert key.told() == key.public() == bench.run.public() == bench.status()["publicKey"] == new
    assert not key.next.exists() and mode_of(key.path) == 0o600
    assert before not in "\n".join(path.read_text() for path in bench.dir.rglob("*") if path.is_file())
    assert bench.run.writes() == [f"set mncni-wg0 private-key {key.next}"]
    bench.settle()
    assert bench.run.writes() == [] and json.loads(bench.own.read_text())["gen"] == 2
    bench.start()
    bench.settle()
    assert bench.run.public() == new


def test_keys_are_in_no_command_log_or_status_while_one_changes(bench, key, caplog):
    texts = [key.path.read_text().strip()]
    for _ in range(2):
        key.leave_next()
        texts.append(key.next.read_text().strip())
        assert bench.tick() and bench.tick()
    said = everything_said(bench, caplog)
    assert "wg pubkey" in said and not any(text in said for text in texts)


def test_a_next_key_waits_for_a_store_that_is_away_and_a_new_agent_keeps_the_key_that_the_others_know(bench, key):
    former, new, away = key.public(), key.leave_next(), bench.settings.nodes_dir + ".away"
    os.rename(bench.settings.nodes_dir, away)
    for _ in range(3):
        assert bench.tick(10) and bench.run.public() == key.public() == former
        bench.start()
    assert bench.tick() and bench.status()["nextKey"] == new and "No such file" in bench.status()["store"]
    assert f"a new key waits until the node store has it: {new}\n" in agent.format_status(status_of(bench), time.time())
    os.rename(away, bench.settings.nodes_dir)
    assert bench.tick() and bench.run.public() == key.public() == key.told() == new and bench.status()["nextKey"] == ""


def test_a_store_that_is_well_again_hears_of_a_next_key_after_some_seconds(bench, key, monkeypatch):
    former, new = key.public(), key.leave_next()
    monkeypatch.setattr(agent.DirectoryStore, "trouble", "the API server does not answer")
    assert bench.tick() and key.told() == former and bench.status()["nextKey"] == new
    monkeypatch.setattr(agent.DirectoryStore, "trouble", "")
    assert bench.tick(9) and key.told() == former
    bench.tick(10)
    assert key.told() == key.public() == new


@pytest.mark.parametrize("where", ["told", "device"])
def test_an_agent_that_was_killed_on_the_way_is_followed_by_one_that_goes_on(bench, key, where):
    new = key.leave_next()
    bench.own.write_text(bench.own.read_text().replace(key.public(), new))
    if where == "device":
        bench.run.private = key.next.read_text().strip()
    bench.start()
    assert bench.tick() and bench.run.public() == key.public() == key.told() == new and not key.next.exists()


@pytest.mark.parametrize("damage", ["", "AAAA", "\0" * 45, key_of(1)[:-4]])
def test_a_damaged_next_key_is_written_again(bench, key, damage):
    former = key.public()
    key.next.write_text(damage)
    assert bench.tick() and bench.run.public() == key.public() == key.told() != former and not key.next.exists()


def test_a_next_key_that_cannot_be_written_costs_nothing_else(bench, key, mocker):
    former = key.public()
    bench.agent.context.settings = dataclasses.replace(bench.settings, key_max_age=60)
    key.make_old(100)
    mocker.patch.object(agent, "write_next_key", side_effect=OSError(28, "No space left on device", str(key.next)))
    assert bench.tick(10) and "No space left on device" in bench.status()["store"] and bench.run.public() == former
    mocker.stopall()
    assert bench.tick(10) and bench.status()["store"] == "" and bench.run.public() == key.public() != former


@pytest.mark.parametrize("limit, age, changes", [(0, 10**9, False), (86400, 86460, True), (86400, 77000, False), (86400, -(10**6), False)])
def test_a_key_changes_when_it_is_too_old(bench, key, limit, age, changes):
    former = key.public()
    bench.agent.context.settings = dataclasses.replace(bench.settings, key_max_age=limit)
    key.make_old(age)
    for _ in range(3):
        assert bench.tick(10)
    assert (bench.run.public() != former) is changes
    now = bench.run.public()
    bench.tick(10)
    assert bench.run.public() == now, "once"


def test_keys_of_one_age_do_not_all_change_at_once(bench, key):
    bench.agent.context.settings = dataclasses.replace(bench.settings, key_max_age=1000)
    key.make_old(950)
    early = 0
    for number in range(256):
        bench.agent.context.public_key = base64.b64encode(bytes([number]) + bytes(31)).decode()
        early += bench.agent.is_key_too_old()
    assert 100 < early < 156


def test_two_nodes_never_hold_one_key_not_even_while_one_changes(bench, key):
    """Who claims this node's next key, of which the record tells, gets no peer when it is in use."""
    new = key.leave_next()
    bench.write(3, text=text_of(3, key=new))
    for _ in range(4):
        bench.tick()
    assert bench.run.public() == new and new not in bench.run.peers and "this node's key" in bench.status()["quarantine"]["n3"]


def test_a_node_whose_key_changes_all_the_time_has_this_node_send_little(bench):
    bench.write(1)
    bench.settle()
    for number in range(100, 130):
        bench.write(1, text=text_of(1, key=key_of(number), more="x" * number))
        assert bench.tick(1) and bench.run.names() == [number]
    assert sum(line.count("persistent-keepalive 1") for line in bench.run.writes()) <= 10


def test_an_agent_that_waits_for_an_answer_looks_again_soon_unless_the_network_is_down(bench):
    bench.write(1)
    bench.settle()
    bench.write(1, text=text_of(1, key=key_of(5), gen=22))  # of another size: a clock may stand still
    assert bench.agent.wait_s() == agent.POLL_S
    assert bench.tick() and 0 < bench.agent.wait_s() < 3 * agent.GREET_S
    bench.run.writes()
    assert bench.tick(0.25) and "remove" in bench.run.writes()[0]
    bench.run.broken = (1, "", "No such device")
    assert not bench.tick(10) and bench.agent.wait_s() == agent.POLL_S


def test_a_command_that_changes_the_key_needs_an_agent(bench, key):
    with pytest.raises(mncni.CNIError, match="no agent runs on this node.*start it"):
        agent.rotate(bench.settings, bench.run)
    assert not key.next.exists()


def test_a_command_that_changes_the_key_waits_until_it_is_in_use_and_takes_one_that_waits_already(bench, key):
    former, new = key.public(), key.leave_next()
    with agent.agent_lock(bench.settings):
        threading.Timer(0.1, bench.tick).start()
        assert agent.rotate(bench.settings, bench.run) == f"this node's key is {new}; nothing is left of {former}"


def test_a_command_that_changes_the_key_says_why_it_did_not_get_there(bench, key, monkeypatch):
    monkeypatch.setattr(agent, "ROTATE_S", 0.1)
    os.rename(bench.settings.nodes_dir, bench.settings.nodes_dir + ".away")
    bench.tick()
    with agent.agent_lock(bench.settings), pytest.raises(mncni.CNIError, match="not in use after 0.1 s .*No such file.* as soon as"):
        agent.rotate(bench.settings, bench.run)
    assert key.next.exists() and mode_of(key.next) == 0o600


@pytest.mark.parametrize("seconds, text", [(-5, "0 s"), (59, "59 s"), (61, "1 m"), (7300, "2 h"), (86400 * 31.5, "31 d")])
def test_an_age_is_told_in_its_largest_unit(seconds, text):
    assert agent.age_text(seconds) == text


# ---- status ----


def status_of(bench):
    return agent.look_status(bench.settings, bench.run)


@pytest.fixture
def running(bench):
    """The bench, its agent holding the lock as a running one does."""
    bench.write(1, 2)
    bench.settle()
    with agent.agent_lock(bench.settings):
        yield bench


def test_status_before_any_agent_ran(bench):
    status = status_of(bench)
    assert not status["ok"] and "no agent has run here" in agent.format_status(status, 0)


def test_status_of_many_peers_fits_on_a_screen_and_begins_with_those_in_trouble():
    common = {"endpoint": "192.0.2.1:28384", "podCIDRs": ["10.244.1.0/24"], "rx": 123456789, "tx": 0, "present": True, "handshake": 1000}
    peers = [{**common, "name": f"node{number}"} for number in range(500)]
    peers[300].update(present=False)
    peers[200].update(handshake=0, tx=1480)
    peers[100].update(handshake=0)
    lines = agent.format_peers(peers, now=1090)
    assert len(lines) < 24 and lines[0] == "498 of 500 peers have shaken hands"
    assert [line.split()[0] for line in lines[2:6]] == ["node300", "node200", "node100", "node0"]
    assert "not a peer yet" in lines[2] and "1.48 kB" in lines[3] and "1 m ago" in lines[5] and "123.5 MB" in lines[5]
    assert lines[-1] == "... and 485 more: --json shows them"


def test_status_of_a_healthy_node(running):
    status = status_of(running)
    assert (status["ok"], status["running"], [peer["name"] for peer in status["peers"]]) == (True, True, ["n1", "n2"])
    running.run.peers[key_of(1)]["endpoint"] = "198.51.100.9:4711"
    assert agent.format_status(status_of(running), 0) == (
        "node self: ok\n"
        f"pods 10.244.255.0/24, MTU 1400, endpoint 192.0.2.1\n"
        "0 of 253 addresses for pods are in use\n"
        f"key {running.run.public()}, 0 s old\n"
        "4 x packets from or to the cluster that came in by neither the bridge nor the tunnel, and were dropped.\n"
        "0 of 2 peers have shaken hands\n"
        "PEER  ENDPOINT           PODS           HANDSHAKE  RECEIVED  SENT\n"
        "n1    198.51.100.9:4711  10.244.1.0/24  never      0 B       0 B\n"
        "n2    192.0.2.2:28384    10.244.2.0/24  never      0 B       0 B\n"
    )


def test_status_says_why_not(running):
    running.write(2, text="{}")
    running.tick()
    status = status_of(running)
    assert not status["ok"] and 'n2: quarantined: "v" is null' in agent.format_status(status, 0)
    del running.run.peers[key_of(1)]
    assert "not a peer yet" in agent.format_status(status_of(running), 0) and not status_of(running)["ok"]
    running.run.broken = (1, "", "Unable to access interface: No such device")
    assert "the WireGuard device is not there" in agent.format_status(status_of(running), 0)


def test_status_is_not_ok_when_no_pod_can_have_an_address(running, mocker):
    mocker.patch.object(mncni.Leases, "attachments", return_value=[None] * 253)
    status = status_of(running)
    assert not status["ok"] and status["reason"] == "no address of 10.244.255.0/24 is free for another pod"


@pytest.mark.parametrize(
    "changes, ok, said",
    [
        ({"admission_guard": False}, True, "ok, but admission policies are missing, see below"),
        ({"store": "403 Forbidden"}, False, "not ok: the node store is in trouble, see below"),
    ],
)
def test_the_first_line_of_the_status_says_whatever_is_wrong(running, mocker, changes, ok, said):
    mocker.patch("agent.look_written", return_value={**agent.look_written(running.settings), **changes})
    status = status_of(running)
    assert status["ok"] == ok and agent.format_status(status, 0).startswith(f"node self: {said}\n")


def test_status_of_an_agent_that_hangs_says_so(running, mocker, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:  # it listens, and nobody answers
        listen = f"127.0.0.1:{server.getsockname()[1]}"
        mocker.patch("agent.look_status", return_value={**status_of(running)})
        words = ["status", "--listen", listen, "--nodes-dir", running.settings.nodes_dir, "--cluster-cidr", "10.244.0.0/16"]
        mocker.patch("os.geteuid", return_value=0)
        assert agent.main([*words, "--pod-cidr", "10.244.255.0/24"], {}) == agent.FAILED
    assert "node self: not ok: the agent: it does not answer within 2 s: it hangs" in capsys.readouterr().out


def test_status_when_the_agent_is_gone(bench):
    bench.settle()
    status = status_of(bench)
    assert (status["ok"], status["running"]) == (False, False)
    assert agent.format_status(status, 0).startswith("node self: not ok: no agent is running; the network is as the last one left it\n")
