"""containerd by CRI, as kubelet drives it: what pods ask for by annotations, what containerd sends, what it does when things break."""

import os
import subprocess

import pytest

from deploy import lab as labs
from tests.integration.test_chained import RECEIVE, SEND
from tests.runtimes.runtimes import HELLO

pytestmark = pytest.mark.root

NO_BURST = 2**32 - 1  # what containerd sends as burst: no annotation names one


def speed(pod, direction, seconds=3):
    """Mbit/s that one TCP connection carries between the node and the pod, to the pod ("ingress") or from it ("egress")."""
    ends = {"pod": pod.node.argv(pod.netns), "node": pod.node.argv()}
    gateway = pod.node.run(["ip", "-brief", "-4", "address", "show", "dev", "mncni0"]).split()[2].partition("/")[0]
    to, since, address = ("pod", "node", pod.addresses()[0]) if direction == "ingress" else ("node", "pod", gateway)
    with labs.start([*ends[to], labs.PYTHON, "-c", RECEIVE, str(seconds)], stdout=subprocess.PIPE) as receiver:
        assert receiver.stdout.readline() == "up\n"
        with labs.start([*ends[since], labs.PYTHON, "-c", SEND, address, str(seconds)], stderr=subprocess.DEVNULL):
            return float(receiver.stdout.readline())


def test_the_plugin_directory_that_the_agent_filled_is_all_that_kubelet_needs(cri):
    """Above all lo, for which containerd calls a plugin named loopback."""
    assert set(os.listdir(cri.node.path("/opt/cni/bin"))) - {"__pycache__"} == {"mncni.py", "mncni", "loopback"}
    conditions = {each["type"]: each.get("status", False) for each in cri.call("Status")["status"]["conditions"]}
    assert conditions["NetworkReady"] is True
    pod = cri.start("one")
    lo = pod.links()["lo"]
    assert "UP" in lo["flags"] and {info["local"] for info in lo["addr_info"]} == {"127.0.0.1", "::1"}
    assert pod.get("127.0.0.1") == HELLO


def test_containerd_reports_the_addresses_that_the_pod_has(cri):
    pod = cri.start("one")
    network = cri.status(pod.container_id)["status"]["network"]
    assert [network["ip"], *(each["ip"] for each in network["additional_ips"])] == pod.addresses()


def test_bandwidth_annotations_shape_both_directions(cri, figure):
    before = cri.node.look()
    pod = cri.start("one", annotations={"kubernetes.io/ingress-bandwidth": "8M", "kubernetes.io/egress-bandwidth": "16M"})
    asked = {"IngressRate": 8_000_000, "IngressBurst": NO_BURST, "EgressRate": 16_000_000, "EgressBurst": NO_BURST}
    assert pod.sent()["bandwidth"] == asked
    measured = {direction: speed(pod, direction) for direction in ("ingress", "egress")}
    figure("containerd's annotations for 8 and 16 Mbit/s: {ingress:.1f} and {egress:.1f} Mbit/s".format(**measured))
    assert 4 < measured["ingress"] < 12 and 8 < measured["egress"] < 24
    pod.remove()
    assert cri.node.changes_since(before) == []


def test_a_pod_without_annotations_is_not_shaped(cri):
    cri.start("one")
    assert not {"tbf", "netem", "ingress"} & set(cri.node.run(["tc", "qdisc", "show"]).split())


def test_the_lat_annotation_delays_what_the_pod_sends_or_says_that_the_kernel_cannot(cri, figure):
    before = cri.node.look()
    has_netem = labs.run(["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"])[0] == 0
    if has_netem:
        pod = cri.start("one", annotations={"lat": "50ms"})
        assert pod.sent()["io.kubernetes.cri.pod-annotations"] == {"lat": "50ms"}
        ping = labs.parse_ping(pod.node.run(["ping", "-n", "-c3", "-i0.2", pod.addresses()[0]]))
        figure(f"annotation lat: 50ms, round trip {ping['rtt_ms']:.0f} ms")
        assert ping["received"] == 3 and ping["rtt_ms"] >= 49
        pod.remove()
    else:
        with pytest.raises(labs.LabError, match="this kernel has no netem: load the module sch_netem"):
            cri.start("one", annotations={"lat": "50ms"})
        figure("annotation lat: this kernel has no netem, so the pod is refused, and says why")
    assert cri.node.changes_since(before) == []


def test_a_lat_annotation_that_is_nonsense_fails_the_pod_with_a_message_that_names_the_word(cri):
    before = cri.node.look()
    with pytest.raises(labs.LabError, match='annotation "lat": "slowly" is none of'):
        cri.start("one", annotations={"lat": "slowly"})
    assert cri.node.changes_since(before) == []


def test_pods_that_come_and_go_side_by_side_get_addresses_of_their_own_and_leave_nothing(cri):
    before = cri.node.look()
    pods = cri.start_all([f"pod{number}" for number in range(10)], annotations={"kubernetes.io/egress-bandwidth": "8M"})
    assert len({address for pod in pods for address in pod.addresses()}) == 20
    replies = cri.calls([("StopPodSandbox", {"pod_sandbox_id": pod.container_id}) for pod in pods])
    assert replies == [{}] * 10
    for pod in pods:
        pod.remove()
    assert cri.node.changes_since(before) == []


def test_a_pod_whose_namespace_is_gone_is_removed_without_a_trace(cri):
    """containerd then calls DEL with no namespace."""
    before = cri.node.look()
    pod = cri.start("one", annotations={"kubernetes.io/egress-bandwidth": "8M"})
    pod.node.run(["umount", "--lazy", pod.netns])
    pod.node.run(["rm", pod.netns])
    pod.remove()
    assert cri.node.changes_since(before) == []


def test_pods_outlive_containerd_and_the_next_one_removes_them(cri, containerd):
    before = cri.node.look()
    pod, other = cri.start("one"), cri.start("other")
    containerd.restart()
    cri.reconnect()
    assert other.get(pod.addresses()[0]) == HELLO
    pod.remove()
    other.remove()
    assert cri.node.changes_since(before) == []


def test_after_a_reboot_old_pods_are_removed_and_new_ones_come(cri, containerd):
    """containerd then calls DEL with no namespace, for links that are gone. Leases of the earlier boot stay as files, and are void."""
    before = cri.node.look()
    pods = cri.start_all(["one", "other"], annotations={"kubernetes.io/egress-bandwidth": "8M"})
    cri.node.reboot()
    assert len(cri.node.attachments()) == 2
    containerd.start()
    cri.reconnect()
    for pod in pods:
        pod.remove()
    assert cri.node.changes_since(before, leaving_out="/var/lib/cni/") == []
    assert cri.node.attachments() == []
    one, other = cri.start_all(["one", "other"])
    assert one.get(other.addresses()[0]) == HELLO
