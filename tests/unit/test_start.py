"""deploy/naivewg/start.py: what it finds missing, what it does about it, and what it tells the cluster."""

import importlib.util
import json

import pytest

from tests import policies
from tests.apiserver import ApiServer
from tests.manifests import DEPLOY, ROOT

spec = importlib.util.spec_from_file_location("start", DEPLOY / "naivewg/start.py")
start = importlib.util.module_from_spec(spec)
spec.loader.exec_module(start)

ALL_TOOLS = ("ip", "nsenter", "nft", "tc")


def node_root(tmp_path, tools):
    """A node's root directory with these programs."""
    (tmp_path / "usr/sbin").mkdir(parents=True)
    for tool in tools:
        (tmp_path / "usr/sbin" / tool).symlink_to(f"/nowhere/{tool}")  # as absolute links look from outside
    return str(tmp_path)


def python_answers(*statuses):
    answers = list(statuses)
    return lambda argv: (answers.pop(0), "")


@pytest.mark.parametrize(
    "tools, python, needs",
    [
        (ALL_TOOLS, (0, 0), []),
        (ALL_TOOLS, (127,), ["/usr/bin/python3 (package python3)"]),
        (ALL_TOOLS, (0, 1), ["a newer /usr/bin/python3 (at least 3.9)"]),
        (("nft", "tc"), (0, 0), ["ip (package iproute2)", "nsenter (package util-linux)"]),
    ],
    ids=("all", "no-python", "old-python", "no-tools"),
)
def test_what_the_node_lacks_is_told_with_its_package(tmp_path, tools, python, needs):
    assert start.look_node(node_root(tmp_path, tools), python_answers(*python)) == (needs, [])


def test_what_only_some_pods_need_is_no_reason_to_stop(tmp_path):
    needs, misses = start.look_node(node_root(tmp_path, ("ip", "nsenter")), python_answers(0, 0))
    assert needs == []
    assert misses == [
        "without nft (package nftables) pods that ask for host ports do not start",
        "without tc (package iproute2) pods that ask for bandwidth and lat do not start",
    ]


@pytest.mark.parametrize(
    "tools, has_wireguard, packages",
    [
        ("ip nft wg nsenter setpriv", True, []),
        ("ip nft wg nsenter setpriv", False, ["wireguard-go"]),
        ("ip nft wg nsenter setpriv wireguard-go", False, []),
        ("nsenter setpriv", False, ["iproute2", "nftables", "wireguard-tools"]),  # without ip nobody knows what the kernel has
    ],
)
def test_the_container_fetches_wireguard_go_only_where_the_kernel_has_no_wireguard(tools, has_wireguard, packages):
    assert start.look_missing(lambda tool, path: tool in tools.split(), lambda: has_wireguard) == packages


class Apt:
    """Stands for apt-get: fails the first times, then the tools are there."""

    def __init__(self, failures):
        self.failures, self.calls, self.installed = failures, [], False

    def run(self, argv, timeout_s=0):
        self.calls.append(argv)
        if len(self.calls) <= self.failures:
            return 100, "E: no network\nE: Some index files failed to download.\n"
        self.installed = self.installed or "install" in argv
        return 0, ""


def provide(monkeypatch, apt):
    monkeypatch.setattr(start, "run", apt.run)
    monkeypatch.setattr(start, "look_missing", lambda: [] if apt.installed else ["nftables"])
    monkeypatch.setattr(start.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(start.time, "sleep", lambda seconds: None)
    return start.provide()


def test_packages_are_installed_and_a_mirror_that_fails_once_is_asked_again(monkeypatch, capsys):
    apt = Apt(failures=1)
    assert provide(monkeypatch, apt) == ""
    assert [words[-1] for words in apt.calls] == ["update", "update", "nftables"]
    assert "missing here: nftables; installing with apt-get" in capsys.readouterr().err


def test_without_a_network_it_gives_up_with_the_reason_and_the_way_out(monkeypatch):
    apt = Apt(failures=1000)
    assert provide(monkeypatch, apt) == "cannot install nftables in the agent's container: E: no network; see deploy/image"
    assert len(apt.calls) == start.TRIES


@pytest.fixture
def api(tmp_path, monkeypatch):
    """The double with the policies, as seen from the pod of n1's agent."""
    with ApiServer() as api:
        policies.install(api)
        for node in policies.nodes():
            api.create_node(node)
        config = api.kubeconfig(tmp_path / "kubeconfig", policies.AGENT, node="n1")
        monkeypatch.setattr(start, "AGENT_DIR", str(ROOT))
        monkeypatch.setenv("MNCNI_NODE_NAME", "n1")
        import kube

        opened = kube.open_api
        monkeypatch.setattr(kube, "open_api", lambda kubeconfig, *rest: opened(config, *rest))
        yield api


def test_a_node_without_python3_says_so_in_its_condition_and_an_event(api, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(start, "HOST", node_root(tmp_path, ALL_TOOLS))
    monkeypatch.setattr(start, "run", python_answers(127, 127))
    assert start.check() == start.check() == 1  # the second time the Event is there already
    condition = next(row for row in api.node("n1")["status"]["conditions"] if row["type"] == "NetworkUnavailable")
    assert (condition["status"], condition["reason"]) == ("True", "MncniNodeLacksTools")
    assert "/usr/bin/python3 (package python3)" in condition["message"]
    events = [json.loads(entry.item) for entry in api.store.entries["events"].values()]
    assert events and all("package python3" in event["message"] for event in events)
    assert "cannot tell the cluster" not in capsys.readouterr().err


def test_a_cluster_that_cannot_be_told_does_not_hide_the_reason(api, monkeypatch, tmp_path, capsys):
    api.down()
    monkeypatch.setattr(start, "HOST", node_root(tmp_path, ALL_TOOLS))
    monkeypatch.setattr(start, "run", python_answers(127))
    assert start.check() == 1
    said = capsys.readouterr().err
    assert "package python3" in said
    assert "cannot tell the cluster" in said
