"""mncni.py install --chain: our chained plugins on top of another network's conflist."""

import json
import os
import stat
import subprocess

import pytest

import mncni

FLANNEL = """{
  "name": "cbr0", "cniVersion": "0.3.1",
  "notes": {"plugins": ["not these"]},
  "plugins": [
    {"type": "flannel", "delegate": {"hairpinMode": true, "isDefaultGateway": true}},
    { "type": "portmap",
      "capabilities": {"portMappings": true} }
  ]
}
"""


class Node:
    """A plugin directory, a CNI configuration directory and backups."""

    def __init__(self, tmp):
        self.tmp, self.conf_dir, self.backups = tmp, tmp / "net.d", tmp / "backup"
        self.conf_dir.mkdir()

    def write(self, name, text, mode=0o644):
        (self.conf_dir / name).write_text(text)
        (self.conf_dir / name).chmod(mode)

    def read(self, name="10-flannel.conflist"):
        return (self.conf_dir / name).read_text()

    def chain(self, name="lat", **options):
        return mncni.chain(name, str(self.conf_dir), str(self.backups), **options)


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path)
    made.write("10-flannel.conflist", FLANNEL)
    return made


def plugins(text):
    return [plugin.get("plugin", plugin["type"]) for plugin in json.loads(text)["plugins"]]


@pytest.mark.parametrize("name", ["lat", "bandwidth", "quickack"])
def test_it_is_added_at_the_end_and_a_second_time_changes_nothing(node, name):
    assert node.chain(name) == str(node.conf_dir / "10-flannel.conflist")
    after = node.read()
    assert plugins(after) == ["flannel", "portmap", name]
    assert node.chain(name) == ""
    assert node.read() == after


def test_the_rest_says_what_it_said_and_the_file_is_indented_by_two(node):
    node.chain()
    before, after = json.loads(FLANNEL), json.loads(node.read())
    assert {**after, "plugins": after["plugins"][:-1]} == before
    assert node.read() == json.dumps(after, indent=2) + "\n"


def test_taken_out_again_the_file_says_what_it_said(node):
    node.chain("bandwidth")
    node.chain("lat")
    node.chain("bandwidth", remove=True)
    assert plugins(node.read()) == ["flannel", "portmap", "lat"]
    node.chain("lat", remove=True)
    assert json.loads(node.read()) == json.loads(FLANNEL)
    assert node.chain("lat", remove=True) == ""


def test_what_was_there_is_kept_under_a_number_once(node):
    node.chain()
    node.write("10-flannel.conflist", FLANNEL)  # the other network writes its own again
    node.chain()
    assert [path.name for path in node.backups.iterdir()] == ["10-flannel.conflist.1"]
    node.chain("quickack")
    assert sorted(path.name for path in node.backups.iterdir()) == ["10-flannel.conflist.1", "10-flannel.conflist.2"]
    assert (node.backups / "10-flannel.conflist.1").read_text() == FLANNEL


def test_mode_stays_and_no_temporary_file(node):
    node.write("10-flannel.conflist", FLANNEL, 0o600)
    node.chain()
    assert stat.S_IMODE(os.stat(node.conf_dir / "10-flannel.conflist").st_mode) == 0o600
    assert os.listdir(node.conf_dir) == ["10-flannel.conflist"]


def test_the_file_that_a_runtime_takes_is_the_first_by_name(node):
    node.write("05-first.conflist", FLANNEL)
    node.write(".00-half.conflist", "{")
    node.write("00-readme.txt", "")
    assert node.chain() == str(node.conf_dir / "05-first.conflist")
    assert node.read() == FLANNEL


def test_a_single_conf_is_refused_with_the_conflist_to_write_instead(node):
    node.write("05-bridge.conf", '{"cniVersion": "1.0.0", "name": "net", "type": "bridge", "bridge": "cni0"}')
    with pytest.raises(
        mncni.CNIError, match=r"05-bridge.conf is no list of plugins; put in its place a file .*05-bridge.conflist"
    ) as caught:
        node.chain()
    (node.conf_dir / "05-bridge.conf").unlink()
    node.write("05-bridge.conflist", caught.value.details)
    assert node.chain() == ""  # it is complete
    assert json.loads(caught.value.details)["plugins"][0] == {"type": "bridge", "bridge": "cni0"}


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"name": "net"', "cannot decode .*: Expecting"),
        ('{"cniVersion": "1.0.0", "name": "net", "plugins": "bridge"}', '"plugins" must be an array'),
        ('{"cniVersion": "9.0.0", "name": "net", "plugins": [{"type": "bridge"}]}', "9.0.0.* is not supported"),
        ('{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}, {"type": "lat"}]}', "has a plugin lat already"),
        (
            '{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "mncni", "plugin": ["naivewg", "lat"]}]}',
            "has a plugin lat already",
        ),
    ],
)
def test_what_cannot_be_chained_to_is_refused_and_left_alone(node, text, said):
    node.write("05-bad.conflist", text)
    with pytest.raises(mncni.CNIError, match=said):
        node.chain()
    assert node.read("05-bad.conflist") == text
    assert not node.backups.exists()


def test_without_any_network_there_is_nothing_to_chain_to(node):
    (node.conf_dir / "10-flannel.conflist").unlink()
    with pytest.raises(mncni.CNIError, match="there is no network in .*/net.d yet"):
        node.chain()


def test_the_command_writes_the_programs_first_then_the_conflist(node):
    argv = [mncni.__file__, "install", "--root", str(node.tmp), "--chain", "lat", "--conf-dir", "/net.d"]
    done = subprocess.run(argv, capture_output=True, text=True)  # that system has no python3: the conflist must not name the plugin
    assert (done.returncode, done.stdout.count("\n")) == (1, 3)
    assert "no /usr/bin/python3" in done.stderr
    assert node.read() == FLANNEL


def test_remove_without_chain_is_a_mistake(node):
    done = subprocess.run([mncni.__file__, "install", "--bin-dir", str(node.tmp), "--remove"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "say which with --chain" in done.stderr
    assert not (node.tmp / "mncni.py").exists()
