"""The figures of agent.py, as Prometheus reads them."""

import re
import subprocess

import pytest

import agent
import kube
import nodeipam
from tests.unit.agent_data import make_settings

STATUS = {
    "up": True,
    "reason": "",
    "store": "",
    "admission_guard": None,
    "dropped": {"leaked": 3, "refused": 4, "spoofed": 5},
    "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"],
    "keyTime": 1700000000,
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
    counts = kube.Counts()
    counts.add("mncni_reconcile_seconds_total", 0.25)
    counts.add("mncni_reconcile_passes_total")
    counts.add("mncni_api_requests_total", verb="GET", code=200)
    return kube.format_metrics({**agent.plan_metrics({**STATUS, **changes}), **counts.figures}, agent.METRICS)


def test_every_metric_is_described_and_none_is_without_a_figure():
    text = metrics(admission_guard=True)
    named = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    missing = {*kube.METRICS, *agent.METRICS} - named
    assert missing == {"mncni_reconcile_errors_total", "mncni_api_received_bytes_total"}  # nothing counted yet


def test_names_follow_the_conventions():
    for name, (kind, _) in {**kube.METRICS, **agent.METRICS, **nodeipam.METRICS}.items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert re.fullmatch(r"mncni_[a-z_]+", name)


def test_there_are_figures_before_the_first_pass(tmp_path):
    status = agent.look_status(make_settings(run_dir=str(tmp_path)), None)
    assert "mncni_network_up 0" in kube.format_metrics(agent.plan_metrics({**status, "up": False, "leases": 0}), agent.METRICS)


def test_what_is_unknown_has_no_figure():
    assert "admission_guard" not in metrics()
    assert "mncni_admission_guard 0" in metrics(admission_guard=False)


def test_a_pool_is_what_pods_can_have():
    lines = metrics().splitlines()
    assert 'mncni_pool_addresses{pod_cidr="10.244.1.0/24"} 253' in lines
    assert 'mncni_pool_addresses{pod_cidr="fd00:10:244:1::/64"} 1.84467440737096e+19' in lines


def test_labels_are_escaped():
    assert r'mncni_node_quarantined{node="node3",reason="its key is \"no\nkey\""} 1' in metrics().splitlines()


def test_a_real_parser_of_the_format_reads_it():
    if subprocess.run(["/usr/bin/python3", "-c", "import prometheus_client"], capture_output=True).returncode:
        pytest.skip("needs a parser of the format: apt-get install python3-prometheus-client")
    done = subprocess.run(["/usr/bin/python3", "-c", PARSE], input=metrics(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "counter mncni_leaked_packets_total" in done.stdout
    assert "unknown" not in done.stdout
