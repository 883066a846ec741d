"""lat on a real kernel: what the words of an annotation do to the pod's pings, alone and beside the limits of bandwidth."""

import json
import re
import statistics

import pytest

from tests.conftest import kernel_has
from tests.integration.conftest import PLUGIN, Host
from tests.integration.test_chained import limits, speed

pytestmark = pytest.mark.root

CAPABILITY = "io.kubernetes.cri.pod-annotations"
GATEWAY = "10.88.0.1"
# An expression -> what tc reads back of it, and how it shows in ten pings: the times of the answers in ms, sorted, a double answer twice.
WORDS = {
    "delay 100ms 50ms 25%": (
        {"delay": {"delay": 0.1, "jitter": 0.05, "correlation": 0.25}},
        lambda times: len(times) == 10 and times[0] >= 49 and times[-1] - times[0] > 5,
    ),
    "delay 100ms 20ms distribution pareto": (
        {"delay": {"delay": 0.1, "jitter": 0.02, "correlation": 0}},
        lambda times: len(times) == 10 and times[-1] - times[0] > 1,
    ),
    "loss 0%": ({}, lambda times: len(times) == 10),
    "loss 100%": ({"loss-random": {"loss": 1, "correlation": 0}}, lambda times: not times),
    "duplicate 100%": ({"duplicate": {"duplicate": 1, "correlation": 0}}, lambda times: len(times) > 15),
    # It flips one bit of a packet. Only where that is one of the sender's MAC nobody notices.
    "corrupt 100%": ({"corrupt": {"corrupt": 1, "correlation": 0}}, lambda times: len(times) < 6),
    "delay 500ms reorder 100%": (
        {"delay": {"delay": 0.5, "jitter": 0, "correlation": 0}, "reorder": {"reorder": 1, "correlation": 0}},
        lambda times: len(times) == 10 and times[-1] < 400,  # all of them overtake
    ),
    # 98 bytes of a ping take 98 ms.
    "rate 8kbit": ({"rate": {"rate": 1000, "packetoverhead": 0, "cellsize": 0, "celloverhead": 0}}, lambda times: times[0] > 95),
    "slot 300ms 400ms": (
        {"slot": {"min-delay": 0.3, "max-delay": 0.4, "packets": 0, "bytes": 0}},
        lambda times: len(times) == 10 and times[-1] > 100,
    ),
    "delay 20ms 5ms distribution normal loss 0.5% 25% duplicate 1% corrupt 0.1% reorder 2% 50% rate 10mbit limit 500 slot 1ms": (
        {
            "delay": {"delay": 0.02, "jitter": 0.005, "correlation": 0},
            "loss-random": {"loss": 0.005, "correlation": 0.25},
            "duplicate": {"duplicate": 0.01, "correlation": 0},
            "corrupt": {"corrupt": 0.001, "correlation": 0},
            "reorder": {"reorder": 0.02, "correlation": 0.5},
            "rate": {"rate": 1_250_000, "packetoverhead": 0, "cellsize": 0, "celloverhead": 0},
            "slot": {"min-delay": 0.001, "max-delay": 0.001, "packets": 0, "bytes": 0},
            "limit": 500,
        },
        lambda times: len(times) > 4,
    ),
}


def installed(host):
    """The launcher that `mncni.py install` writes. It is faster than the file itself, which counts where the processor is emulated."""
    host.sh(f"{PLUGIN} install --bin-dir {host.tmp}/bin")
    return f"{host.tmp}/bin/mncni"


class Pod:
    """A pod on a bridge, and a chained lat with an annotation on it."""

    def __init__(self, host):
        self.host, self.netns, self.program = host, host.pod("a"), installed(host)
        self.result = host.add(host.conf(), "c1", self.netns, program=self.program)

    def call(self, command, text):
        """(exit status, stdout as an object or None, stderr)."""
        conf = {**self.host.conf(plugin="lat", prevResult=self.result), **annotated(text)}
        return self.host.cni(command, conf, "c1", self.netns, program=self.program)

    def add(self, text):
        exit_code, result, stderr = self.call("ADD", text)
        assert (exit_code, result) == (0, self.result), stderr

    def delete(self, text):
        assert self.call("DEL", text) == (0, None, "")


@pytest.fixture(scope="module")
def pod(tmp_path_factory):
    host = Host(tmp_path_factory.mktemp("lat"))
    yield Pod(host)
    host.close()


def annotated(text):
    return {"runtimeConfig": {CAPABILITY: {"lat": text}}}


def pings(host, netns, count=10):
    """The times in ms after which pings of the gateway are answered, sorted. They are sent every 50 ms."""
    out = host.sh(f"ping -n -c {count} -i 0.05 -W 2 {GATEWAY}", netns=netns, check=False)
    return sorted(float(time) for time in re.findall(r"bytes from .* time=([\d.]+) ms", out))


def netem(host, netns):
    """The options of netem on the pod's interface as tc reads them back; None if there is none."""
    found = [qdisc["options"] for qdisc in json.loads(host.sh("tc -json qdisc show dev eth0", netns=netns)) if qdisc["kind"] == "netem"]
    return found[0] if found else None


@pytest.mark.kernel("netem")
def test_50_ms_are_50_ms(pod, figure):
    """The median of 20 pings with and without: 50 ms more, at least 49 and at most 58. A busy machine may need up to three measurements."""
    for attempt in (1, 2, 3):
        without = statistics.median(pings(pod.host, pod.netns, 20))
        pod.add("50ms")
        with_lat = statistics.median(pings(pod.host, pod.netns, 20))
        pod.delete("50ms")
        more = with_lat - without
        medians = f"{with_lat:.1f} ms, without {without:.1f} ms"
        figure(f"lat 50ms: median of 20 pings {medians}: {more:+.1f} ms (measurement {attempt} of at most 3)")
        if 49 <= more <= 58:
            break
    assert 49 <= more <= 58


@pytest.mark.kernel("netem")
@pytest.mark.parametrize("text", WORDS)
def test_each_word_is_set_shows_passes_check_and_goes(pod, text):
    expected, shows = WORDS[text]
    pod.add(text)
    assert netem(pod.host, pod.netns) == {"limit": 1000, "ecn": False, "gap": int("reorder" in text), **expected}
    assert pod.call("CHECK", text) == (0, None, "")
    times = pings(pod.host, pod.netns)
    assert shows(times), times
    pod.delete(text)
    assert netem(pod.host, pod.netns) is None


@pytest.mark.kernel("netem")
def test_check_sees_netem_removed_by_hand_del_does_not_mind_and_a_second_add_changes_it(pod):
    pod.add("50ms")
    pod.host.sh("tc qdisc delete dev eth0 root", netns=pod.netns)
    exit_code, error, _ = pod.call("CHECK", "50ms")
    assert (exit_code, error["code"]) == (1, 100) and "eth0 in the pod has no netem" in error["msg"]
    pod.delete("50ms")
    for text, delay_s in (("50ms", 0.05), ("20ms", 0.02)):
        pod.add(text)
        assert netem(pod.host, pod.netns)["delay"]["delay"] == delay_s
    pod.delete("20ms")


@pytest.mark.kernel("netem")
def test_lat_and_bandwidth_work_in_one_pod(host, figure):
    rates = limits(ingressRate=16_000_000, egressRate=8_000_000)
    conf = host.conf(plugin=["naivewg", "bandwidth", "lat"], runtimeConfig={**rates, **annotated("50ms")["runtimeConfig"]})
    netns, program = host.pod("a"), installed(host)
    result = host.add(conf, "c1", netns, program=program)
    check = {**conf, "prevResult": result}
    veth, ifb = result["interfaces"][1]["name"], result["interfaces"][3]["name"]
    assert host.cni("CHECK", check, "c1", netns, program=program) == (0, None, "")
    median, measured = statistics.median(pings(host, netns)), speed(host, netns, "egress", 5)
    figure(f"lat 50ms and bandwidth, egress 8 Mbit/s, in one pod: median ping {median:.1f} ms, {measured:.2f} Mbit/s")
    assert 49 < median < 150 and 4 < measured < 9.2
    # CHECK goes through the whole list and reports the first that is missing.
    for said, device, inside in (("no netem", "eth0", netns), ("egress is not limited", ifb, None), ("ingress is not limited", veth, None)):
        host.sh(f"tc qdisc delete dev {device} root", netns=inside)
        exit_code, error, _ = host.cni("CHECK", check, "c1", netns, program=program)
        assert (exit_code, error["code"]) == (1, 100) and said in error["msg"]
    assert host.cni("DEL", conf, "c1", netns, program=program) == (0, None, "")
    assert "eth0" not in host.ip("-brief link", netns=netns) and ifb not in host.ip("-brief link")


def test_a_kernel_without_netem_is_told_by_name_and_nothing_of_the_pod_is_left(host):
    if kernel_has("netem"):
        pytest.skip("needs a kernel without netem")
    netns = host.pod("a")
    exit_code, error, _ = host.cni("ADD", {**host.conf(plugin=["naivewg", "lat"]), **annotated("50ms")}, "c1", netns)
    assert (exit_code, error["code"]) == (1, 4) and "sch_netem" in error["msg"] and "linux-modules-extra" in error["msg"]
    assert "eth0" not in host.ip("-brief link", netns=netns) and host.files() == []
