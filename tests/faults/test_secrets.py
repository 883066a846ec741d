"""Secrets stay where they belong: the private key and API tokens are in no log, argument, environment, page, error or readable file; every
file has its mode; and what others may have put in the place of a state file is neither used nor overwritten."""

import contextlib
import json
import logging
import os
import stat
import threading
import time
from pathlib import Path

import pytest

import agent
import kube
import mncni
from deploy import lab as labs
from tests.e2e.conftest import lab_up, node_sh, rotate
from tests.unit.agent_data import FakeWireGuard
from tests.unit.test_agent_state import Bench

KEY = agent.make_key()


@pytest.fixture
def bench(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(agent, "FLOOR", (agent.ensure_endpoints,))
    monkeypatch.setattr(agent, "STAGES", (agent.ensure_mtu, agent.ensure_identity))
    return Bench(tmp_path)


# ---- the key ----


@pytest.mark.parametrize("act", ["dump", "set listen-port", "set private-key"])
@pytest.mark.parametrize(
    "how", ["fails and shows it", "hangs", "is missing", "shows other words", "shows too little", "shows a key that is none"]
)
def test_a_command_that_handles_the_key_and_fails_does_not_tell_it(bench, caplog, capsys, act, how):
    """Each command that gets or gives the key, each way to go wrong: log, status, pages and errors without a word of it."""
    os.makedirs(bench.settings.state_dir, mode=0o700)
    Path(bench.settings.state_dir, "key").write_text(KEY + "\n")
    device = FakeWireGuard()

    def run(command):
        words = " ".join(command.argv)
        if command.argv[0] == "nft":
            return mncni.Reply(1, "", "Error: No such file or directory\n")
        if not (words.endswith("dump") if act == "dump" else act.split()[1] in words):
            return device(command)
        if how == "hangs":
            raise mncni.CNIError(mncni.COMMAND_FAILED, "no answer within 30 s from wg", str(command))
        if how == "is missing":
            raise mncni.missing_tool("wg")
        said = {"shows other words": f"{KEY}\tx\ty\tz\n", "shows too little": KEY, "shows a key that is none": f"{KEY}=\t{KEY}\t1\toff\n"}
        return mncni.Reply(
            int(how == "fails and shows it"), said.get(how, KEY), f"Unable to parse {os.getpid()}" if act == "dump" else "no"
        )

    bench.agent.context.run = run
    bench.write(1)
    for _ in range(3):
        bench.tick(10)
    status = agent.look_status(bench.settings, run)
    texts = [caplog.text, *capsys.readouterr(), json.dumps(status), agent.format_status(status, 0), bench.agent.reason]
    texts += [str(record.__dict__) for record in caplog.records]
    for page in ("/healthz", "/readyz", "/metrics"):
        with contextlib.suppress(mncni.CNIError):
            texts.append(kube.pages(bench.agent, agent.look_figures, agent.METRICS)[page]()[1])
    texts += [
        path.read_text(errors="replace") for path in bench.dir.rglob("*") if path.is_file() and path.name != "key" and path.suffix != ".py"
    ]
    assert KEY not in "\n".join(texts)


class Sampler(threading.Thread):
    """Arguments and environments of all processes of the machine, looked at all the time."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.stopping, self.rounds = set(), threading.Event(), 0

    def run(self):
        while not self.stopping.is_set():
            for pid in filter(str.isdigit, os.listdir("/proc")):
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        self.seen.add(Path("/proc", pid, name).read_bytes())
            self.rounds += 1
            time.sleep(0.001)


def texts_of(lab, node):
    """Everything a node's agent says: log, status in both forms, pages, files but the key."""
    root = lab.inside(node, "/")
    found = [(root / labs.AGENT_LOG.lstrip("/")).read_text()]
    for argv in ("status", "status --json"):
        found.append(labs.run([*labs.node_argv(lab, node), labs.PYTHON, "/opt/mncni/agent.py", *argv.split()])[1])
    for page in ("healthz", "readyz", "metrics"):
        script = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:28386/{page}').read().decode())"
        found.append(node_sh(lab, node, f'{labs.PYTHON} -c "{script}"'))
    for name in ("run/mncni", "var/lib/mncni", "etc/cni/net.d", "var/lib/cni"):
        paths = [path for path in (root / name).rglob("*") if path.is_file() and path.name not in ("key", "key.new")]
        found += [path.read_text(errors="replace") for path in paths]
    return found


@pytest.mark.root
def test_no_process_shows_a_key_while_agents_start_restart_lose_their_device_and_change_keys(figure):
    sampler, keys = Sampler(), set()
    sampler.start()
    try:
        with lab_up(f"mncni-secrets-{os.getpid()}", families=("ipv4",)) as lab:

            def note_keys():
                keys.update(lab.inside(node, "/var/lib/mncni/key").read_text().strip() for node in lab.nodes())

            def restart(node, before):
                labs.stop_agent(lab, node)
                node_sh(lab, node, before)
                labs.start_agent(lab, node)
                status = [*labs.node_argv(lab, node), labs.PYTHON, "/opt/mncni/agent.py", "status"]
                is_up = lambda: lab.inside(node, "/var/lib/mncni/key").exists() and labs.run(status)[0] == 0  # noqa: E731
                labs.wait_until(is_up, 60, f"agent of {node}")

            note_keys()
            first, second = lab.nodes()
            restart(first, "true")
            restart(first, "ip -n mncni-wg link delete mncni-wg0")
            restart(second, "ip -n mncni-wg link delete mncni-wg0; rm /var/lib/mncni/key")
            note_keys()
            assert rotate(lab, first)[0] == 0
            note_keys()
            said = "\n".join(text for node in lab.nodes() for text in texts_of(lab, node))
    finally:
        sampler.stopping.set()
        sampler.join()
    assert len(keys) == 4 and sampler.rounds > 10
    for key in keys:
        assert key not in said
        assert not any(key.encode() in text for text in sampler.seen)
    figure(
        f"secrets: {len(keys)} keys in none of {len(sampler.seen):,} arguments and environments seen in {sampler.rounds:,} looks at /proc"
    )


# ---- modes ----


MODES = {  # of all that agent and plugin make, whatever the umask
    "state_dir": 0o700,
    "state_dir/key": 0o600,
    "state_dir/nodes.json": 0o600,
    "run_dir": 0o755,
    "run_dir/ready": 0o644,
    "run_dir/status.json": 0o644,
    "run_dir/agent.lock": 0o600,
    "conf_dir": 0o755,
    "conf_dir/10-mncni.conflist": 0o644,
    "nodes_dir/self.json": 0o644,
    "bin_dir": 0o755,
    "bin_dir/mncni": 0o755,
    "bin_dir/mncni.py": 0o755,
    "bin_dir/loopback": 0o755,
    "data/net": 0o755,
    "data/net/lock": 0o600,
    "data/net/10.88.0.2": 0o644,
    "data/net/last.0": 0o644,
    "data/net/attachments": 0o755,
    "data/net/attachments/KEY": 0o644,
    "run/attachments": 0o755,
    "run/attachments/LOCK": 0o600,
    "run/portmap": 0o755,
    "run/portmap/lock": 0o600,
    "run/portmap/KEY": 0o644,
    "run/bridge.lock": 0o600,
    "log": 0o600,
    "backup": 0o700,
    "backup/10-x.conflist.1": 0o600,
}


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_every_file_has_its_mode_and_owner(bench, tmp_path, monkeypatch, umask):
    """One table of all that agent and plugin make. The programs themselves begin with a umask of at least 022."""
    before = os.umask(umask)
    try:
        os.umask(os.umask(0o077) | 0o022)  # as main() of both does; the next test shows that it does
        bench.settle()
        with agent.agent_lock(bench.settings):
            pass
        (tmp_path / "netns").symlink_to("/proc/self/ns/net")
        conf = {
            "cniVersion": "1.1.0",
            "name": "net",
            "plugin": ["naivewg", "portmap"],
            "logFile": f"{tmp_path}/log",
            "ipam": {"dataDir": f"{tmp_path}/data", "ranges": [[{"subnet": "10.88.0.0/24"}]]},
            "runtimeConfig": {"portMappings": [{"hostPort": 80, "containerPort": 80}]},
        }
        environ = {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": "c1",
            "CNI_NETNS": f"{tmp_path}/netns",
            "CNI_NETNS_OVERRIDE": "1",
            "CNI_IFNAME": "eth0",
            "MNCNI_RUN_DIR": f"{tmp_path}/run",
        }
        exit_code, stdout = mncni.answer(environ, json.dumps(conf), lambda command: mncni.Reply(0, "", ""))
        assert exit_code == 0, stdout
        mncni.keep_backup(str(tmp_path / "10-x.conflist"), "{}", str(tmp_path / "backup"))
    finally:
        os.umask(before)
    key = mncni.short_hash("net", "c1", "eth0")
    found = {str(path.relative_to(tmp_path)).replace(key, "KEY"): path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    found = {"run/attachments/LOCK" if name.startswith("run/attachments/") else name: path for name, path in found.items()}
    foreign = {"netns", "nodes_dir", "data", "run"}
    assert {name: oct(mode_of(path)) for name, path in found.items() if name not in foreign} == {
        name: oct(mode) for name, mode in MODES.items()
    }
    assert {path.stat().st_uid for path in found.values()} == {os.geteuid()}


@pytest.mark.parametrize("umask", [0o000, 0o027, 0o077])
def test_both_programs_begin_with_a_umask_that_keeps_others_from_writing(umask, monkeypatch):
    before = os.umask(umask)
    try:
        monkeypatch.setattr("sys.argv", ["mncni.py"])
        monkeypatch.delenv("CNI_COMMAND", raising=False)
        for main in (lambda: agent.main([], {}), mncni.main):
            os.umask(umask)
            with pytest.raises(SystemExit):
                main()
            assert os.umask(umask) == umask | 0o022
    finally:
        os.umask(before)


# ---- tricks ----


def planted(path, how, target):
    """A symbolic or hard link at path to a file outside."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    (os.symlink if how == "symbolic" else os.link)(target, path)


@pytest.fixture
def outside(tmp_path):
    """A file of somebody else's, which nothing is to happen to: its text, mode, and number of names."""
    path = tmp_path / "outside"
    path.mkdir()
    file = path / "shadow"
    file.write_text("root:secret\n")
    file.chmod(0o640)
    yield file
    assert (file.read_text(), mode_of(file)) == ("root:secret\n", 0o640)
    assert os.listdir(path) == ["shadow"]


@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_a_key_file_that_is_a_link_is_refused_with_its_path_and_the_way_out(bench, outside, how):
    path = os.path.join(bench.settings.state_dir, "key")
    planted(path, how, outside)
    assert not bench.tick()
    assert bench.agent.reason.startswith(f"{path} is a link") and "put the file itself there, or remove it" in bench.agent.reason
    assert bench.text("run_dir/ready") is None and "secret" not in bench.agent.reason
    os.unlink(path)
    assert bench.tick(2)


def test_a_key_that_a_link_leads_to_is_not_taken_for_ours(bench, tmp_path):
    (tmp_path / "theirs").write_text(KEY + "\n")
    (tmp_path / "theirs").chmod(0o644)
    planted(os.path.join(bench.settings.state_dir, "key"), "symbolic", tmp_path / "theirs")
    assert not bench.tick() and bench.run.private == ""
    assert mode_of(tmp_path / "theirs") == 0o644


@pytest.mark.parametrize("how", ["symbolic", "hard"])
@pytest.mark.parametrize(
    "name", ["state_dir/nodes.json", "run_dir/ready", "run_dir/status.json", "conf_dir/10-mncni.conflist", "nodes_dir/self.json"]
)
def test_a_link_in_the_place_of_a_file_of_ours_is_replaced_and_what_it_leads_to_stays(bench, outside, name, how):
    os.makedirs(bench.settings.state_dir, mode=0o700)
    planted(str(bench.dir / name), how, outside)
    bench.tick()
    assert bench.tick(2), bench.agent.reason
    assert not (bench.dir / name).is_symlink() and bench.text(name) != outside.read_text()


def test_a_list_of_nodes_behind_a_link_is_not_believed(bench, tmp_path):
    (tmp_path / "theirs").write_text(json.dumps({"own": {"uid": "theirs"}, "records": {}}))
    planted(os.path.join(bench.settings.state_dir, "nodes.json"), "symbolic", tmp_path / "theirs")
    assert agent.load_state(os.path.join(bench.settings.state_dir, "nodes.json"))["own"] == {}


def lease_store(tmp_path):
    return mncni.Leases(str(tmp_path / "data"), "net", str(tmp_path / "run"))


def test_leases_that_are_links_count_as_free_and_what_they_lead_to_stays(tmp_path, outside):
    leases = lease_store(tmp_path)
    planted(f"{leases.dir}/10.88.0.2", "symbolic", outside)
    planted(leases.index_path("c1", "eth0"), "symbolic", outside)
    with leases.lock:
        leases.take(["10.88.0.2"], "c1", "eth0")
    assert leases.holder("10.88.0.2") == ("c1", "eth0")
    with leases.lock:
        leases.release("c1", "eth0")


def test_an_index_that_names_files_elsewhere_removes_none(tmp_path):
    leases = lease_store(tmp_path)
    with leases.lock:
        leases.take(["10.88.0.2"], "c1", "eth0")
    (tmp_path / "elsewhere").write_text(f"c1\neth0\n{leases.boot_id}\n")
    with open(leases.index_path("c1", "eth0"), "a") as file:
        file.write("../../elsewhere\n")
    with leases.lock:
        leases.release("c1", "eth0")
    assert (tmp_path / "elsewhere").exists()


def test_states_of_portmap_behind_links_are_left_out(tmp_path):
    (tmp_path / "theirs").write_text(json.dumps({"owner": ["net", "c1", "eth0"], "since": 5, "device": "", "mappings": [], "ips": []}))
    planted(str(tmp_path / "run" / "portmap" / "0123456789abcdef"), "symbolic", tmp_path / "theirs")
    assert mncni.look_ports(str(tmp_path / "run")) == {}


@pytest.mark.parametrize("name", ["lock", "log"])
def test_locks_and_the_log_follow_no_link(tmp_path, outside, name):
    planted(str(tmp_path / "x" / name), "symbolic", outside)
    with pytest.raises(OSError, match=name):
        if name == "log":
            mncni.append_log(str(tmp_path / "x" / name), "text")
        with mncni.Locked(str(tmp_path / "x" / name)):
            pass


@pytest.mark.root
@pytest.mark.parametrize("how", ["writable by the group", "writable by all", "another user's", "a link of another user's"])
def test_a_state_directory_that_others_can_change_is_refused_with_its_path_and_the_way_out(bench, tmp_path, how):
    place = tmp_path / "place"
    place.mkdir(mode=0o755)
    if how == "a link of another user's":
        (tmp_path / "link").symlink_to(place)
        os.chown(tmp_path / "link", 65534, 65534, follow_symlinks=False)
    elif how == "another user's":
        os.chown(place, 65534, 65534)
    else:
        place.chmod(0o775 if "group" in how else 0o777)
    path = str(tmp_path / "link") if "link" in how else str(place)
    with pytest.raises(mncni.CNIError, match=f"others than root can change {path}, .*chown root and chmod go-w") as caught:
        mncni.own_directory(path)
    assert caught.value.code == 5
    with pytest.raises(mncni.CNIError), mncni.Locked(f"{path}/lock"):
        pass
    with pytest.raises(mncni.CNIError):
        agent.ensure_key(f"{path}/key", "")
    assert os.listdir(place) == []


def test_a_state_directory_that_roots_own_link_leads_to_is_fine(tmp_path):
    (tmp_path / "disk").mkdir(mode=0o755)
    (tmp_path / "state").symlink_to(tmp_path / "disk")
    mncni.own_directory(str(tmp_path / "state"))
    assert mncni.read_state(str(tmp_path / "state" / "none")) is None
