"""The plugin that docs/plugin.md teaches, taken out of it and run in a chain behind naivewg."""

import json
import re
from pathlib import Path

import pytest

import mncni

PAGE = Path(mncni.__file__).parent / "docs/plugin.md"


def plugin_source():
    (source,) = re.findall(r"```python\n(#!.*?)```", PAGE.read_text(), re.DOTALL)
    return source


def test_it_has_thirty_lines_or_so():
    assert len([line for line in plugin_source().splitlines() if line.strip()]) <= 30


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
