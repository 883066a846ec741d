"""The plugins that docs/plugin.md teaches, taken out of it and run in a chain behind naivewg."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import mncni

PAGE = Path(mncni.__file__).parent / "docs/plugin.md"
SOURCES = {
    re.search(r'"""(\w+):', source)[1]: source for source in re.findall(r"```python\n(#!.*?)```", PAGE.read_text(), re.DOTALL)
}


@pytest.fixture
def attach(host, tmp_path):
    """attach(name, **keys): a program with that source beside an installed mncni.py, the configuration that a runtime gives it for a pod
    which naivewg has attached, and that pod's namespace."""

    def attach(name, **keys):
        bin_dir = tmp_path / "bin"
        mncni.install(str(bin_dir))
        program = bin_dir / name
        program.write_text(SOURCES[name])
        program.chmod(0o755)
        pod = host.pod(name[:1])
        first = host.add(host.conf(), "c1", pod)
        return str(program), {"cniVersion": "1.1.0", "name": "net", "type": name, "prevResult": first, **keys}, pod

    return attach


def test_the_first_has_thirty_lines_or_so():
    assert len([line for line in SOURCES["txqueue"].splitlines() if line.strip()]) <= 30


@pytest.mark.root
def test_txqueue_works_in_a_chain(host, attach):
    program, conf, pod = attach("txqueue", length=500)
    first = conf["prevResult"]
    for _ in range(2):
        assert host.add(conf, "c1", pod, program=program) == first
    assert json.loads(host.ip("-json link show eth0", netns=pod))[0]["txqlen"] == 500
    assert host.cni("CHECK", conf, "c1", pod, program=program) == (0, None, "")
    exit_code, error, _ = host.cni("CHECK", {**conf, "length": 7}, "c1", pod, program=program)
    assert (exit_code, error["code"]) == (1, 100) and "length 7" in error["msg"]
    for verb, keys in (("ADD", {"length": "long"}), ("ADD", {"length": -1}), ("ADD", {"prevResult": {}}), ("STATUS", {"length": True})):
        assert host.cni(verb, {**conf, **keys}, "c1", pod, program=program)[1]["code"] == 7
    for verb in ("STATUS", "GC", "DEL", "DEL"):
        assert host.cni(verb, conf, "c1", pod, program=program) == (0, None, "")
    assert host.cni("DEL", {**conf, "prevResult": None}, "c1", "", program=program)[0] == 0
    assert host.cni("DEL", host.conf(), "c1", pod)[0] == 0


@pytest.mark.root
def test_txqueue_explains_itself(attach, tmp_path):
    program, conf, _ = attach("txqueue")
    naivewg = {"type": "mncni", "plugin": "naivewg", "ipam": {"ranges": [[{"subnet": "10.88.0.0/24"}]]}}
    conflist = tmp_path / "own.conflist"
    plugins = [naivewg, {"type": "txqueue", "length": 500}]
    conflist.write_text(json.dumps({"cniVersion": "1.0.0", "name": "own", "plugins": plugins}))
    done = subprocess.run([program, "explain", conflist], capture_output=True, text=True, check=True)
    assert "# how many packets may wait in the pod\nnsenter " in done.stdout
    assert "link set dev eth0 txqueuelen 500" in done.stdout and "address add 10.88.0.2/24" in done.stdout


@pytest.mark.root
def test_podhosts_keeps_a_file_for_each_attachment_and_forgets_it(host, attach):
    program, conf, pod = attach("podhosts")
    address, directory = conf["prevResult"]["ips"][0]["address"].partition("/")[0], Path(f"{host.tmp}/run/podhosts/net")
    names = {"program": program, "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=web-0"}
    assert host.add(conf, "c1", pod, **names) == conf["prevResult"]
    assert (directory / "c1-eth0").read_text() == f"{address} web-0\n"
    assert host.cni("CHECK", conf, "c1", pod, **names) == (0, None, "")
    assert host.cni("CHECK", conf, "c1", pod, program=program)[1]["code"] == 100  # another name
    host.add(conf, "c2", pod, **names)
    (directory / ".half").touch()
    assert host.cni("GC", conf, program=program)[0] == 0 and len(os.listdir(directory)) == 3
    valid = {"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}
    assert host.cni("GC", {**conf, **valid}, program=program)[0] == 0 and os.listdir(directory) == ["c1-eth0"]
    for netns in (pod, ""):
        assert host.cni("DEL", {**conf, "prevResult": None}, "c1", netns, program=program) == (0, None, "")
    assert os.listdir(directory) == []
    assert host.cni("DEL", host.conf(), "c1", pod)[0] == 0


def test_what_the_page_names_is_there():
    table = PAGE.read_text().partition("### What a plugin may use of mncni")[2].split("\n\n")[1]
    words = [word for row in table.splitlines()[2:] for word in re.findall(r"`([\w.]+)[^`]*`", row.split("|")[1])]
    request = mncni.Request({"CNI_COMMAND": "ADD"}, {"name": "net"})
    assert len(words) > 30
    for word in words:
        own = word.rpartition(".")[2]
        assert hasattr(request, own) if "." in word else word == "run" or hasattr(mncni, word), word
