"""The plugin that docs/plugin.md teaches, taken out of it and run in a chain behind naivewg."""

import json
import re
from pathlib import Path

import pytest

import mncni

PAGE = Path(mncni.__file__).parent / "docs/plugin.md"


def plugin_source(number=0):
    return re.findall(r"```python\n(#!.*?)```", PAGE.read_text(), re.DOTALL)[number]


@pytest.mark.parametrize("number", [0, 1])
def test_they_have_thirty_lines_or_so(number):
    assert len([line for line in plugin_source(number).splitlines() if line.strip()]) <= 32


def test_what_the_page_lists_is_there():
    named = re.findall(r"`mncni\.(\w+)`", PAGE.read_text())
    assert len(named) > 15 and [name for name in named if name != "py" and not hasattr(mncni, name)] == []


@pytest.mark.root
def test_the_one_with_a_state_keeps_it_and_removes_what_is_not_valid(host, tmp_path):
    program = tmp_path / "podnames"
    program.write_text(plugin_source(1).replace("sys.path.append(", f"sys.path.append({str(Path(mncni.__file__).parent)!r}); ("))
    program.chmod(0o755)
    pods, states = [host.pod("a"), host.pod("b")], tmp_path / "states"
    conf = {"cniVersion": "1.1.0", "name": "net", "type": "podnames", "directory": str(states)}
    for number, pod in enumerate(pods):
        first = host.add(host.conf(), f"c{number}", pod)
        assert host.add({**conf, "prevResult": first}, f"c{number}", pod, program=str(program)) == first
    assert (states / "net:c0:eth0").read_text().startswith(first["ips"][0]["address"].rpartition(".")[0])
    keep = {"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}
    assert host.cni("GC", {**conf, **keep}, program=str(program))[0] == 0
    assert [path.name for path in states.iterdir()] == ["net:c1:eth0"]
    for _ in range(2):
        assert host.cni("DEL", conf, "c1", pods[1], program=str(program))[0] == 0
    assert not list(states.iterdir())


@pytest.mark.root
def test_it_works_in_a_chain(host, tmp_path):
    bin_dir = tmp_path / "bin"
    mncni.install(str(bin_dir))
    program = bin_dir / "txqueue"
    program.write_text(plugin_source())
    program.chmod(0o755)
    pod = host.pod("a")
    first = host.add(host.conf(), "c1", pod)
    conf = {"cniVersion": "1.1.0", "name": "net", "type": "txqueue", "length": 500, "prevResult": first}
    assert host.add(conf, "c1", pod, program=str(program)) == first
    assert json.loads(host.ip("-json link show eth0", netns=pod))[0]["txqlen"] == 500
    assert host.cni("CHECK", conf, "c1", pod, program=str(program)) == (0, None, "")
    exit_code, error, _ = host.cni("CHECK", {**conf, "length": 7}, "c1", pod, program=str(program))
    assert (exit_code, error["code"]) == (1, 100) and "500" in error["msg"]
    assert host.cni("ADD", {**conf, "length": "long"}, "c1", pod, program=str(program))[1]["code"] == 7
    for verb in ("STATUS", "GC", "DEL", "DEL"):
        assert host.cni(verb, conf, "c1", pod, program=str(program))[0] == 0
    assert host.cni("DEL", host.conf(), "c1", pod)[0] == 0
