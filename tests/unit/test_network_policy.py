"""deploy/network-policy: what the engine may do, and what the check before it says. The engine itself: tests/e2e/test_network_policy.py."""

import errno
import importlib.util
import re
import subprocess
import sys

import pytest

from tests import manifests
from tests.conftest import kernel_has
from tests.manifests import DEPLOY, ROOT, find, load

CHECK = DEPLOY / "network-policy/check.py"
spec = importlib.util.spec_from_file_location("check", CHECK)
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)

@pytest.mark.parametrize("bridged, rule, queue, named", [
    (True, 0, errno.ENODEV, []),
    (False, 0, errno.ENODEV, ["modprobe br_netfilter"]),
    (True, errno.ENOENT, errno.ENODEV, ["with CONFIG_NFT_QUEUE"]),
    (True, 0, errno.EINVAL, ["with CONFIG_NETFILTER_NETLINK_QUEUE"]),
    (True, 0, errno.EOPNOTSUPP, ["with CONFIG_NETFILTER_NETLINK_GLUE_CT"]),
    (False, errno.EPERM, errno.EPERM, ["modprobe br_netfilter", "with CONFIG_NFT_QUEUE", "with CONFIG_NETFILTER_NETLINK_QUEUE"]),
])
def test_what_is_missing_is_named_with_the_way_out(bridged, rule, queue, named, monkeypatch):
    monkeypatch.setattr(check, "BRIDGED", "/proc/self" if bridged else "/none")
    monkeypatch.setattr(check, "ask", {check.plan_rule(): rule, check.plan_queue(): queue}.get)
    assert [re.search(r"modprobe \w+|with CONFIG_\w+", line).group() for line in check.look_missing()] == named


PROBE = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("check", {str(CHECK)!r})
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)
rules = check.plan_rule((b"counter\\0", b"")), check.plan_rule((b"nonsense\\0", b"")), check.plan_rule()
print(*(check.ask(request) for request in (*rules, check.plan_queue())))
"""


@pytest.mark.root
def test_the_check_asks_the_kernel_and_leaves_nothing():
    """Whatever this kernel has. The controls: a rule that counts, which every kernel with nftables knows, and one of no kind."""
    words = ["unshare", "--net", "sh", "-c", '"$0" -c "$1"; "$0" -I "$2"; echo $?; nft list tables', sys.executable, PROBE, str(CHECK)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    answers, code = done.stdout.splitlines()
    counts, nonsense, queues, queue = map(int, answers.split())
    assert (counts, nonsense, queues == 0) == (0, errno.ENOENT, kernel_has("nft_queue"))
    assert queue in (errno.ENODEV, errno.EOPNOTSUPP, errno.EINVAL)
    lines = sum([queues != 0, queue != errno.ENODEV, not kernel_has("br_netfilter")])
    assert (code, len(done.stderr.splitlines())) == (str(int(lines > 0)), lines), done.stderr


@pytest.mark.skipif(bool(manifests.yaml_missing()), reason=manifests.yaml_missing())
def test_the_engine_only_reads_what_its_informers_ask_for():
    account, user = "deploy/network-policy/account.yaml", "system:serviceaccount:kube-system:kube-network-policies"
    kinds = ("pods", "namespaces", "networkpolicies")
    assert set(manifests.rights(account)) == {(user, verb, kind) for verb in ("list", "watch") for kind in kinds}
    name = find(load(account), "ServiceAccount", namespace="kube-system")["metadata"]["name"]
    pod = find(load("deploy/network-policy/daemonset.yaml"), "DaemonSet", namespace="kube-system")["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == name


@pytest.mark.skipif(bool(manifests.yaml_missing()), reason=manifests.yaml_missing())
def test_the_engine_has_one_capability_reaches_nothing_of_the_node_and_says_whether_it_fails_open():
    pod = find(load("deploy/network-policy/daemonset.yaml"), "DaemonSet")["spec"]["template"]["spec"]
    [engine], [first] = pod["containers"], pod["initContainers"]
    for container in (engine, first):
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN"]}
    assert pod["hostNetwork"] and all("hostPath" not in volume for volume in pod["volumes"])
    assert {"--fail-open=true", "--strict-mode=true", "--disable-nri=true"} < set(engine["args"])
    get = engine["readinessProbe"]["httpGet"]
    assert f"--metrics-bind-address={get['host']}:{get['port']}" in engine["args"] and "livenessProbe" not in engine


@pytest.mark.skipif(bool(manifests.kubectl_missing()), reason=manifests.kubectl_missing())
def test_the_kustomization_renders_with_the_check():
    objects = manifests.render("deploy/network-policy")
    check_map, pod = find(objects, "ConfigMap"), find(objects, "DaemonSet")["spec"]["template"]["spec"]
    assert [volume["configMap"]["name"] for volume in pod["volumes"]] == [check_map["metadata"]["name"]]
    assert check_map["data"] == {CHECK.name: CHECK.read_text()}
    assert pod["initContainers"][0]["command"][-1] == f"{pod['initContainers'][0]['volumeMounts'][0]['mountPath']}/{CHECK.name}"


def test_no_program_writes_or_reads_connection_labels():
    """The engine's verdict replaces all labels of a connection."""
    for name in ("mncni.py", "agent.py"):
        assert not re.search(r"ct label", (ROOT / name).read_text())
