"""mncni.py by hand: explain and logFile; what install does is in test_state.py."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import mncni
from mncni import Command, Reply

CONF = Path(mncni.__file__).parent / "conf"


def explain(*arguments):
    done = subprocess.run([mncni.__file__, "explain", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", mncni.VERBS)
@pytest.mark.parametrize("path", sorted(CONF.glob("*.conflist")), ids=lambda path: path.name)
def test_explain_prints_a_script_that_a_shell_can_read_for_every_example(path, command):
    exit_code, script, stderr = explain(path, "--command", command)
    assert (exit_code, stderr) == (0, "")
    assert command in script.splitlines()[0]
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0
    assert command != "CHECK" or "# It starts no command." not in script  # every plugin looks


def test_explain_shows_the_commands_of_an_add_in_order():
    _, script, _ = explain(CONF / "naivewg.conflist")
    wanted = ["link add name mncni0", "address replace 10.88.0.1/24", "nft -f -", "type veth peer name eth0", "address add 10.88.0.2/24"]
    places = [script.index(text) for text in wanted]
    assert places == sorted(places)


def test_explain_takes_a_delegate_and_foreign_plugins(tmp_path):
    path = tmp_path / "x.conflist"
    plugin = {"type": "mncni", "plugin": "naivewg", "ipam": {"type": "host-local"}}
    (tmp_path / "host-local").touch()
    path.write_text(json.dumps({"cniVersion": "1.0.0", "name": "x", "plugins": [plugin, {"type": "tuning"}]}))
    exit_code, script, stderr = explain(path)
    assert exit_code == 0, stderr
    assert "host-local" in script and "address add 192.0.2.2/24" in script
    assert "# another program's plugin" in script and "CNI_COMMAND=ADD /opt/cni/bin/tuning" in script
    assert '"sandbox": "/run/netns/c1"' in script and str(tmp_path.parent.parent) not in script.partition("\n")[2]


@pytest.mark.parametrize("kind", ["mncni", "bridge"])
def test_explain_goes_on_with_the_address_that_the_range_of_a_delegate_gives(tmp_path, kind):
    path = tmp_path / "x.conflist"
    ipam = {"type": "host-local", "dataDir": "/run/x", "ranges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd00::/64"}]]}
    first = {"type": kind, **({"plugin": "naivewg"} if kind == "mncni" else {}), "ipam": ipam}
    path.write_text(json.dumps({"cniVersion": "1.0.0", "name": "x", "plugins": [first, {"type": "mncni", "plugin": "quickack"}]}))
    script = explain(path)[1]
    assert json.dumps(ipam) in script and "192.0.2." not in script
    assert "route replace default via 10.77.0.1 dev eth0 quickack 1" in script and "via fd00::1 dev eth0 quickack 1" in script
    assert kind == "bridge" or ("address add 10.77.0.2/24" in script and "address add fd00::2/64" in script)


def test_explain_shows_what_chained_plugins_run_on_top_of_another_network(tmp_path):
    path = tmp_path / "x.conflist"
    path.write_text(json.dumps({"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "flannel"}, *mncni.CHAINED.values()]}))
    exit_code, script, stderr = explain(path)
    assert exit_code == 0, stderr
    assert "root netem delay 50ms" in script and "root tbf rate 8000000bit" in script and "quickack 1" in script
    assert "# It starts no command." not in explain(path, "--command", "CHECK")[1]


@pytest.mark.parametrize("text, said", [("{", "cannot decode"), ('{"name": "x", "plugins": 3}', '"plugins"'), ('{"plugins": []}', "empty")])
def test_explain_says_what_is_wrong_with_a_conflist(tmp_path, text, said):
    path = tmp_path / "x.conflist"
    path.write_text(text)
    exit_code, _, stderr = explain(path)
    assert exit_code == 1 and said in stderr
    assert explain(tmp_path / "none")[2].startswith("mncni.py explain: [Errno 2] No such file")


class TestLogFile:
    def request(self, path):
        conf = {"name": "net", "cniVersion": "1.0.0", "logFile": path}
        return mncni.Request({"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"}, conf)

    def test_each_command_is_noted_with_its_time_and_its_end_for_root_alone(self, tmp_path):
        path = tmp_path / "log"
        run = mncni.logged(lambda command: Reply(1, "", "no such thing\n"), self.request(str(path)))
        assert run(Command(["ip", "-batch", "-"], "link\n", "a link")).exit_code == 1
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# ") and " ADD net c1 eth0: " in lines[0] and lines[0].endswith(" ms, exit 1")
        assert lines[1:] == ["# a link", "ip -batch - <<'E'", "link", "E", "no such thing"]
        assert path.stat().st_mode & 0o777 == 0o600

    def test_it_is_put_aside_once_at_ten_megabytes(self, tmp_path):
        path = tmp_path / "log"
        path.write_bytes(b"x" * mncni.LOG_LIMIT)
        mncni.append_log(str(path), "one\n")
        mncni.append_log(str(path), "two\n")
        assert path.read_text() == "two\n" and sorted(os.listdir(tmp_path)) == ["log", "log.1"]

    def test_a_log_that_cannot_be_written_fails_no_call(self, tmp_path, capsys):
        run = mncni.logged(lambda command: Reply(0, "", ""), self.request(str(tmp_path / "no" / "log")))
        assert run(Command(["ip"])).exit_code == 0
        assert "while" in capsys.readouterr().err

    def test_a_relative_path_is_refused(self):
        with pytest.raises(mncni.CNIError) as raised:
            mncni.logged(None, self.request("log"))
        assert raised.value.code == 7

    def test_without_the_key_nothing_is_in_between(self):
        def run(command):
            return Reply(0, "", "")

        assert mncni.logged(run, self.request(None)) is run
