"""bandwidth and lat on top of another network, put there by `mncni.py install --chain`, under containerd."""

import json
import shutil
from pathlib import Path

import pytest

from deploy import lab as labs
from tests.runtimes.runtimes import HELLO, NETWORK

pytestmark = pytest.mark.root

THEIRS = {
    "cniVersion": "0.4.0",
    "name": "theirs",
    "plugins": [{"type": "bridge", "bridge": "theirs0", "isGateway": True, "ipam": {"type": "host-local", "subnet": "10.99.0.0/24"}}],
}


@pytest.fixture
def chain(cri):
    """chain(name): put a plugin of ours on top of a network of the reference plugins, which is the active one for the time of a test."""
    programs = [shutil.which(name, path="/usr/lib/cni:/opt/cni/bin") for name in ("bridge", "host-local")]
    if None in programs:
        pytest.skip("needs the reference plugins bridge and host-local: package containernetworking-plugins")
    for program in programs:
        shutil.copy(program, cri.node.path("/opt/cni/bin"))
    conflist = cri.node.path("/etc/cni/net.d/05-theirs.conflist")
    conflist.write_text(json.dumps(THEIRS))
    cri.wait_for_network("theirs")

    def install(name):
        cri.node.run(["/opt/mncni/mncni.py", "install", "--chain", name])
        cri.wait_for_network("theirs", name)

    yield install
    for pod in list(cri.pods):
        pod.remove()
    conflist.unlink()
    for program in programs:
        cri.node.path(f"/opt/cni/bin/{Path(program).name}").unlink()
    cri.node.run(["ip", "link", "delete", "theirs0"])
    # Pods of MNCNI's network start again when the agent has seen that the other one is gone.
    labs.wait_until(lambda: json.loads(cri.node.path("/run/mncni/ready").read_text())["ok"], 60, "the agent to be content")
    cri.wait_for_network(NETWORK)


def test_the_bandwidth_annotation_works_on_another_network(cri, chain):
    chain("bandwidth")
    pod = cri.start("one", annotations={"kubernetes.io/ingress-bandwidth": "8M", "kubernetes.io/egress-bandwidth": "16M"})
    assert [attachment["networkName"] for attachment in cri.node.attachments()] == ["theirs"]
    shaped = [qdisc for qdisc in json.loads(cri.node.run(["tc", "-json", "qdisc", "show"])) if qdisc["kind"] == "tbf"]
    assert sorted(qdisc["options"]["rate"] for qdisc in shaped) == [1_000_000, 2_000_000]  # bytes a second
    other = cri.start("other")
    assert other.get(pod.addresses()[0]) == HELLO
    pod.remove()
    assert "tbf" not in cri.node.run(["tc", "qdisc", "show"]) and " mi" not in cri.node.run(["ip", "-oneline", "link"])


def test_the_lat_annotation_reaches_the_plugin_on_another_network(cri, chain):
    chain("lat")
    cri.start("one")
    with pytest.raises(labs.LabError, match='annotation "lat": "slowly" is none of'):
        cri.start("other", annotations={"lat": "slowly"})
