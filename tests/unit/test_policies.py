"""What the admission policies allow and refuse, as hooks of the API double: the same CASES that a real API server gets."""

import pytest

import agent
import kube
from tests import policies
from tests.apiserver import ApiServer


@pytest.fixture
def api():
    with ApiServer() as api:
        policies.install(api)
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


@pytest.mark.parametrize("missing, said", [
    ([], []),
    (["mncni-agent"], ["any node can write another's record"]),
    (["mncni-record"], ["a node's record can claim the pods of others", "a node's record can have any length"]),
    (["mncni-agent", "mncni-record"],
     ["any node can write another's record", "a node's record can claim the pods of others", "a node's record can have any length"]),
])
def test_the_agent_finds_out_which_policy_or_binding_is_missing(api, caplog, missing, said):
    """By dry runs; mncni-record refuses a change of another's record that starts as it has to in no case, so each policy needs its own."""
    client = kube.Api({"server": api.url, "certificate-authority": api.ca_file, "token": api.token(policies.AGENT, node="n1")})
    store = agent.KubernetesStore(client, "n1")
    store._test_guard()
    assert (store.guard, store.unguarded) == (True, [])
    api.policies = [policy for policy in api.policies if policy["name"] not in missing]
    store._is_whole()
    assert store.guard is True, "not tested again before an hour is over"
    store.test_at = 0
    store._is_whole()
    assert (store.guard, list(store.unguarded)) == (not missing, said)
    assert all(text in caplog.text for text in said)
    status = {"node": "n1", "ok": True, "reason": "", "peers": [], "quarantine": {}, "admission_guard": store.guard, "unguarded": said}
    assert all(text in agent.format_status(status, 0) for text in said)
    before = {name: api.node(name) for name in ("n1", "n2", "n3")}
    policies.install(api)
    store.test_at = 0
    store._is_whole()
    assert store.guard is True and before == {name: api.node(name) for name in ("n1", "n2", "n3")}


def test_an_old_policy_that_bounds_no_sizes_is_found_out(api):
    client = kube.Api({"server": api.url, "certificate-authority": api.ca_file, "token": api.token(policies.AGENT, node="n1")})
    store = agent.KubernetesStore(client, "n1")
    store._take_own("LIST", [store._parse_own(api.node("n1"))])
    for policy in api.policies:
        if policy["name"] == "mncni-record":
            policy["hook"] = lambda *words, hook=policy["hook"]: next((why for why in [hook(*words)] if why and "4096" not in why), None)
    store._test_guard()
    assert (store.guard, store.unguarded) == (False, ["a node's record can have any length"])
