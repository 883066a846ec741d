"""What the admission policies allow and refuse, as hooks of the API double: the same CASES that a real API server gets."""

import pytest

import agent
import kube
from tests import policies
from tests.apiserver import ApiServer


@pytest.fixture
def api():
    with ApiServer() as api:
        for name, hook in policies.HOOKS.items():
            api.add_policy(hook, name, name)
        for node in policies.nodes():
            api.create_node(node)
        yield api


@pytest.mark.parametrize("case", policies.CASES, ids=lambda case: f"{case.user.rpartition(':')[2]} {case.claim}".replace(" ", "-"))
def test_the_policies_allow_and_refuse(api, case):
    nodes = {name: api.node(name) for name in ("n1", "n2", "n3")}
    client = kube.Api({"server": api.url, "certificate-authority": api.ca_file, "token": api.token(case.user, node=case.token)})
    assert policies.refusal(case, nodes, client) == case.refused
    unchanged = {name: api.node(name) for name in ("n1", "n2", "n3")} == nodes
    assert unchanged or not case.refused


def test_the_test_of_the_agent_whether_it_is_watched_is_refused_by_the_policy(api):
    """_test_guard: a dry-run write to another Node."""
    store = agent.KubernetesStore(
        kube.Api({"server": api.url, "certificate-authority": api.ca_file, "token": api.token(policies.AGENT, node="n1")}), "n1"
    )
    assert store._test_guard() is True
    api.policies.clear()
    assert store._test_guard() is False
