"""Whatever keeps a runtime from starting the plugin on a node, the agent of that node says so, and is well again when it is mended."""

import json
import os

import pytest

from deploy import lab as labs
from tests.e2e.conftest import lab_up, node_sh

pytestmark = pytest.mark.root

SOON_S = 10
BIN, CONF, DATA = "/opt/cni/bin", "/etc/cni/net.d", "/var/lib/cni/mncni"
MASK, PYTHON = "/run/not-executable", "$(readlink -f /usr/bin/python3)"
OTHER = json.dumps({"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "ptp"}]})

# What is wrong: (how it comes, how it goes, words of the reason)
FAULTS = {
    "python3 is gone": (f"touch {MASK}; mount --bind {MASK} {PYTHON}", f"umount {PYTHON}", "python3"),
    "plugin on a file system without exec": (
        f"mount --bind {BIN} {BIN}; mount -o remount,bind,noexec {BIN}",
        f"umount {BIN}",
        f"{BIN}/mncni",
    ),
    "another network comes first": (f"echo '{OTHER}' > {CONF}/05-other.conflist", f"rm {CONF}/05-other.conflist", "05-other.conflist"),
    "a single configuration comes first": (f"echo '{{}}' > {CONF}/00-x.conf", f"rm {CONF}/00-x.conf", "00-x.conf"),
    "read-only leases": (f"mount --bind {DATA} {DATA}; mount -o remount,bind,ro {DATA}", f"umount {DATA}", "Read-only"),
    "full disk of leases": (
        f"mount -t tmpfs -o size=8k tmpfs {DATA}; head -c 100000 /dev/zero > {DATA}/rest 2>/dev/null || true",
        f"umount {DATA}",
        "No space left",
    ),
    "foreign file in the place of the plugin": (f"printf '#!/bin/sh\\n' > {BIN}/mncni", f"rm {BIN}/mncni", f"{BIN}/mncni"),
}
# No file changes, so without help the next trial tells, within a minute.
SLOW = {"plugin on a file system without exec", "read-only leases", "full disk of leases"}


@pytest.fixture(scope="module")
def lab():
    with lab_up(f"mncni-trial-{os.getpid()}", nodes=1, families=("ipv4",)) as made:
        yield made


def ready(lab):
    """The reason why pods cannot start, "" if they can."""
    said = json.loads(lab.inside("node1", "/run/mncni/ready").read_text())
    return "" if said["ok"] else said["reason"]


@pytest.mark.parametrize("what", FAULTS)
def test_the_agent_says_why_a_runtime_could_not_start_the_plugin(lab, what):
    come, go, words = FAULTS[what]
    node_sh(lab, "node1", come)
    try:
        if what in SLOW:
            lab.inside("node1", f"{BIN}/touched").touch()
        labs.wait_until(lambda: words in ready(lab), SOON_S, f"reason with {words!r}")
    finally:
        node_sh(lab, "node1", go)
        lab.inside("node1", f"{BIN}/touched").unlink(missing_ok=True)
    labs.wait_until(lambda: not ready(lab), SOON_S, "agent that is well again")
    labs.add_pod(lab, "node1", "pod9")
    labs.del_pod(lab, "node1", "pod9")
