"""What agent.py serves: health, readiness, and metrics that Prometheus can read."""

import http.client
import re
import socket
import subprocess
import threading
import time

import pytest

import agent
from tests.unit.agent_data import make_settings

STATUS = {
    "up": True,
    "reason": "",
    "store": "",
    "admission_guard": None,
    "leaked": 3,
    "leases": 2,
    "peers": [{"name": "node2", "handshake": 1700000000, "rx": 10, "tx": 20}],
    "quarantine": {"node3": 'its key is "no\nkey"'},
}
PARSE = """
import sys
from prometheus_client.parser import text_string_to_metric_families
for family in text_string_to_metric_families(sys.stdin.read()):
    print(family.type, *(sample.name for sample in family.samples))
"""


def metrics(**changes):
    counts = agent.Counts()
    counts.add("mncni_reconcile_seconds_total", 0.25)
    counts.add("mncni_reconcile_passes_total")
    counts.add("mncni_api_requests_total", verb="GET", code=200)
    return agent.format_metrics({**agent.plan_metrics({**STATUS, **changes}), **counts.figures})


def test_every_metric_is_described_and_none_is_without_a_figure():
    text = metrics(admission_guard=True)
    named = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    missing = {name for name in set(agent.METRICS) - named if not name.startswith("mncni_nodeipam_")}
    assert missing == {"mncni_reconcile_errors_total", "mncni_api_received_bytes_total"}  # nothing counted yet


def test_names_follow_the_conventions():
    for name, (kind, _) in agent.METRICS.items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert re.fullmatch(r"mncni_[a-z_]+", name)


def test_there_are_figures_before_the_first_pass(tmp_path):
    status = agent.look_status(make_settings(run_dir=str(tmp_path)), None)
    assert "mncni_network_up 0" in agent.format_metrics(agent.plan_metrics({**status, "up": False, "leases": 0}))


def test_what_is_unknown_has_no_figure():
    assert "admission_guard" not in metrics()
    assert "mncni_admission_guard 0" in metrics(admission_guard=False)


def test_labels_are_escaped():
    assert r'mncni_node_quarantined{node="node3",reason="its key is \"no\nkey\""} 1' in metrics().splitlines()


def test_a_real_parser_of_the_format_reads_it():
    if subprocess.run(["/usr/bin/python3", "-c", "import prometheus_client"], capture_output=True).returncode:
        pytest.skip("needs a parser of the format: apt-get install python3-prometheus-client")
    done = subprocess.run(["/usr/bin/python3", "-c", PARSE], input=metrics(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "counter mncni_leaked_packets_total" in done.stdout
    assert "unknown" not in done.stdout


@pytest.fixture
def server():
    """A function (path, host) -> (status, text) that asks a server of these pages."""

    def broken():
        raise ValueError("nonsense")

    pages = {"/healthz": lambda: (200, "ok\n"), "/metrics": lambda: (200, "figures\n"), "/broken": broken}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threading.Thread(target=agent.serve_http, args=(("127.0.0.1", port), pages), daemon=True).start()
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ask(path, method="GET"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    return ask


def test_pages_are_served_and_others_are_named(server):
    assert server("/healthz") == (200, "ok\n")
    assert server("/metrics?name=x") == (200, "figures\n")
    assert server("/") == (404, "there are: /healthz, /metrics, /broken\n")
    assert server("/healthz", method="POST")[0] == 501


def test_a_page_that_fails_says_so_and_the_next_is_served(server):
    assert server("/broken") == (500, "ValueError: nonsense\n")
    assert server("/healthz") == (200, "ok\n")


OTHER = [
    ("192.0.2.7", "/healthz", 404),
    ("192.0.2.7", "/metrics", 200),
    ("::ffff:192.0.2.7", "/readyz", 404),
    ("fe80::1%eth0", "/healthz", 404),
]
OWN = [("127.0.0.1", "/healthz", 200), ("::ffff:127.0.0.1", "/healthz", 200), ("::1", "/healthz", 200)]


@pytest.mark.parametrize("client, path, code", OTHER + OWN)
def test_other_hosts_get_metrics_only(client, path, code):
    assert agent.http_page({"/healthz": lambda: (200, ""), "/metrics": lambda: (200, "")}, path, client)[0] == code


class FakeAgent:
    def __init__(self):
        self.now, self.beat, self.reason = 1000.0, 1000.0, ""

    def clock(self):
        return self.now


def test_health_is_that_the_loop_comes_round_and_readiness_that_the_network_stands():
    fake = FakeAgent()
    pages = agent.pages(fake, None)
    assert pages["/healthz"]() == pages["/readyz"]() == (200, "ok\n")
    fake.reason = "no default route"
    assert pages["/readyz"]() == (503, "no default route\n")
    fake.now += agent.STUCK_S
    assert pages["/healthz"]() == (503, "the loop has not come round for 120 s\n")


class FakeIpam:
    def __init__(self):
        self.now, self.beat, self.reason = 1000.0, 1000.0, ""
        self.api = self.election = self
        self.counts, self.ours = agent.Counts(), True
        self.counts.set("mncni_nodeipam_nodes", 2, state="waiting")
        self.counts.add("mncni_nodeipam_ranges_given_total", 5)

    def clock(self):
        return self.now


def test_nodeipam_tells_who_leads_and_who_waits():
    fake = FakeIpam()
    pages = agent.pages(fake, agent.nodeipam_figures)
    code, text = pages["/metrics"]()
    assert code == 200
    for line in ("mncni_nodeipam_leader 1", 'mncni_nodeipam_nodes{state="waiting"} 2', "mncni_nodeipam_ranges_given_total 5"):
        assert line in text.splitlines()
    assert pages["/healthz"]()[0] == 200
    fake.now += agent.STUCK_S
    assert pages["/healthz"]()[0] == 503


@pytest.mark.parametrize("text", ["28386", "localhost:1", "1.2.3.4", "1.2.3.4:x", "1.2.3.4:99999", ":1", "[::1:5"])
def test_a_bad_listen_address_is_refused(text):
    with pytest.raises(agent.argparse.ArgumentTypeError, match="like 127.0.0.1:28386"):
        agent.listen_address(text)


def test_listen_addresses_of_both_families():
    assert agent.listen_address("0.0.0.0:1") == ("0.0.0.0", 1)
    assert agent.listen_address("[::]:28386") == ("::", 28386)
