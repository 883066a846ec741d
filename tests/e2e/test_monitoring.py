"""deploy/monitoring on a real Prometheus that scrapes the agents of a lab: the rules load, and the dashboard's queries have answers."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deploy import lab as labs
from tests.e2e.conftest import lab_up
from tests.manifests import DEPLOY, ROOT, load, yaml_missing

MONITORING = DEPLOY / "monitoring"
PROMETHEUS_MISSING = "needs Prometheus: apt-get install --no-install-recommends prometheus"
# What a lab without Kubernetes, or without any trouble, has no figures of.
NOT_IN_THE_LAB = ("mncni_api_", "mncni_nodeipam_", "mncni_reconcile_errors", "_packets_total")
FETCH = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:28386/metrics').read().decode(), end='')"
PATIENCE_S = 120


def queries():
    """The dashboard's queries as Prometheus gets them from Grafana: [(title of the panel, query)]."""
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    pairs = [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]
    return [(title, query.replace("$node", ".*").replace("$__rate_interval", "10s")) for title, query in pairs]


class Relay(ThreadingHTTPServer):
    """Serves /NODE as what the agent of that node serves at /metrics: the machine itself has no way into the lab's network."""

    daemon_threads = True

    def __init__(self, lab):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                code, text, _ = labs.run([*labs.node_argv(lab, self.path[1:]), labs.PYTHON, "-c", FETCH])
                self.send_response(502 if code else 200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Prometheus:
    """A Prometheus that scrapes the nodes of a lab every two seconds."""

    def __init__(self, lab, relay, directory):
        self.lab, nodes = lab, lab.nodes()
        targets = [{"targets": [f"127.0.0.1:{relay.server_port}"], "labels": {"instance": n, "__metrics_path__": f"/{n}"}} for n in nodes]
        conf = {
            "global": {"scrape_interval": "2s", "evaluation_interval": "1s"},
            "rule_files": [str(MONITORING / "rules.yml")],
            "scrape_configs": [{"job_name": "mncni-agent", "static_configs": targets}],
        }
        (directory / "prometheus.yml").write_text(json.dumps(conf))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        argv = ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
        with open(directory / "log", "w") as log:
            self.process = subprocess.Popen([*argv, f"--web.listen-address={self.address}"], stdout=log, stderr=log)

    def get(self, path, **parameters):
        """The data of an answer of Prometheus' HTTP API; None while it does not answer."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)["data"]
        return None

    def ask(self, query):
        return (self.get("query", query=query) or {"result": []})["result"]

    def wait(self, query):
        """The result of a query, as soon as there is one."""
        until = time.monotonic() + PATIENCE_S
        while not (found := self.ask(query)):
            assert time.monotonic() < until, f"no answer to {query}"
            time.sleep(0.5)
        return found


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    if not shutil.which("prometheus"):
        pytest.skip(PROMETHEUS_MISSING)
    with lab_up(f"mncni-mon-{os.getpid()}") as lab, Relay(lab) as relay:
        made = Prometheus(lab, relay, tmp_path_factory.mktemp("prometheus"))
        try:
            yield made
        finally:
            made.process.terminate()
            made.process.wait()
            relay.shutdown()


@pytest.mark.root
def test_the_dashboards_queries_have_answers(prometheus):
    prometheus.wait("count(up == 1) == 2")
    prometheus.wait("count(count_over_time(mncni_reconcile_passes_total[10s]) > 2) == 2")
    for title, query in queries():
        if any(word in query for word in NOT_IN_THE_LAB):
            assert prometheus.get("query", query=query) is not None, f"{title}: {query}"  # Prometheus understands it
        else:
            assert prometheus.wait(query), title
    assert [row["value"][1] for row in prometheus.ask("sum(mncni_leases)")] == ["2"]


@pytest.mark.root
def test_what_a_pod_sends_with_anothers_address_is_counted(prometheus):
    pod = labs.pod_argv(prometheus.lab, "node1", "pod1")
    labs.must([*pod, "ip", "address", "add", "10.244.1.99/32", "dev", "eth0"])
    assert labs.run([*pod, "ping", "-n", "-c1", "-W1", "-I", "10.244.1.99", "10.244.1.1"])[0] != 0
    prometheus.wait('mncni_spoofed_packets_total{instance="node1"} > 0')
    labs.must([*pod, "ip", "address", "delete", "10.244.1.99/32", "dev", "eth0"])
    assert prometheus.ask('mncni_spoofed_packets_total{instance="node2"} > 0') == []


@pytest.mark.root
def test_a_healthy_lab_raises_no_alert(prometheus):
    prometheus.wait("count(up == 1) == 2")
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 10 and {rule["health"] for rule in rules} <= {"ok", "unknown"}
    prometheus.wait("count(rate(mncni_reconcile_passes_total[5m]) > 0) == 2")
    prometheus.wait("absent(ALERTS)")
    labs.stop_agent(prometheus.lab, "node2")
    prometheus.wait('ALERTS{alertname="MNCNIAgentDown", instance="node2"}')
    labs.start_agent(prometheus.lab, "node2")
    prometheus.wait("absent(ALERTS)")


def promtool(*arguments):
    if not shutil.which("promtool"):
        pytest.skip(PROMETHEUS_MISSING)
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_fire_when_they_should():
    promtool("check", "rules", MONITORING / "rules.yml")
    promtool("test", "rules", ROOT / "tests/monitoring/rules-test.yml")


def test_prometheus_understands_the_scrape_configuration(tmp_path):
    """Debian builds Prometheus without its discovery of pods, so all but that is checked."""
    if yaml_missing():
        pytest.skip(yaml_missing())
    conf = load("deploy/monitoring/scrape.yml")[0]
    for job in conf["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs")[0]["role"] == "pod"
    (tmp_path / "prometheus.yml").write_text(json.dumps(conf))
    shutil.copy(MONITORING / "rules.yml", tmp_path)
    promtool("check", "config", tmp_path / "prometheus.yml")
