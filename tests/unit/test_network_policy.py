"""deploy/network-policy: what the engine may do, and what the check before it says. The engine itself: tests/e2e/test_network_policy.py."""

import gzip
import importlib.util
import re
import subprocess
import sys

import pytest

from tests import manifests
from tests.manifests import DEPLOY, ROOT, find, load

CHECK = DEPLOY / "network-policy/check.py"
spec = importlib.util.spec_from_file_location("check", CHECK)
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)

BOTH = "CONFIG_NFT_QUEUE=m\nCONFIG_NETFILTER_NETLINK_QUEUE=y\n"


def run(tmp_path, config=None, builtin="", dep=""):
    """What check.py says of a kernel with this configuration and these modules."""
    path, modules = tmp_path / "config.gz", tmp_path / "modules"
    if config is not None:
        path.write_bytes(gzip.compress(config.encode()))
    modules.mkdir()
    for name, text in (("modules.builtin", builtin), ("modules.dep", dep)):
        (modules / name).write_text(text)
    done = subprocess.run([sys.executable, CHECK, path, modules], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_kernel_with_both_passes(tmp_path):
    dep = "kernel/net/netfilter/nft_queue.ko.zst: kernel/net/netfilter/nf_tables.ko.zst\n"
    assert run(tmp_path, BOTH, "kernel/net/netfilter/nfnetlink_queue.ko\n", dep) == (0, "")


@pytest.mark.parametrize("config", [None, BOTH])
def test_a_kernel_whose_module_is_not_installed_is_named(tmp_path, config):
    code, said = run(tmp_path, config, "kernel/net/netfilter/nfnetlink_queue.ko\n", "kernel/net/netfilter/nf_tables.ko: \n")
    assert code == 1 and " no module nft_queue," in said and "linux-modules-extra" in said


def test_a_kernel_built_without_it_is_named(tmp_path):
    code, said = run(tmp_path, "# CONFIG_NFT_QUEUE is not set\nCONFIG_NETFILTER_NETLINK_QUEUE=y\n")
    assert code == 1 and " no module nft_queue," in said


def test_a_kernel_that_says_nothing_passes(tmp_path):
    assert run(tmp_path) == (0, "")


@pytest.mark.skipif(bool(manifests.yaml_missing()), reason=manifests.yaml_missing())
def test_the_engine_only_reads():
    rules = find(load("deploy/network-policy/account.yaml"), "ClusterRole")["rules"]
    assert {verb for rule in rules for verb in rule["verbs"]} == {"list", "watch"}
    [container] = find(load("deploy/network-policy/daemonset.yaml"), "DaemonSet")["spec"]["template"]["spec"]["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN"]}


def test_no_program_writes_or_reads_connection_labels():
    """The engine's verdict replaces all labels of a connection."""
    for name in ("mncni.py", "agent.py"):
        assert not re.search(r"ct label", (ROOT / name).read_text())
