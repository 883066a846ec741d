"""The policies of deploy/naivewg and deploy/nodeipam once more, as hooks of the API double, and what they must allow and refuse.

A real API server evaluates the expressions themselves, against the same CASES: tests/e2e/test_install.py.
"""
import copy
import json
import re
from collections import namedtuple
from types import SimpleNamespace

import agent
import kube
from tests.apiserver import realistic_node

AGENT = "system:serviceaccount:kube-system:mncni-agent"
NODEIPAM = "system:serviceaccount:kube-system:mncni-nodeipam"
KUBELET, ADMIN = "system:node:n1", "kubernetes-admin"
NODE_NAME = "authentication.kubernetes.io/node-name"


# ---------------------------------------------------------------------------------------------------------------------------
# Hooks: hook(user, operation, old, new) -> None or why not
# ---------------------------------------------------------------------------------------------------------------------------
def agent_policy(user, operation, old, new):
    if user["username"] != AGENT:
        return None
    if operation != "UPDATE":
        return "the agent neither creates nor deletes Nodes"
    if user["extra"].get(NODE_NAME) != [new["metadata"]["name"]]:
        return "the agent may not change another Node"
    if without(annotations(old), agent.RECORD) != without(annotations(new), agent.RECORD):
        return "the agent may change no annotation but mncni.dev/node"
    if rest_of_metadata(old) != rest_of_metadata(new):
        return "the agent may not change labels, finalizers or owners"
    if old.get("spec") != new.get("spec"):
        return "the agent may not change the spec"
    if without_ours(old.get("status", {})) != without_ours(new.get("status", {})):
        return "the agent may change nothing of the status but the condition NetworkUnavailable"
    ours = [row for row in new.get("status", {}).get("conditions", []) if row["type"] == "NetworkUnavailable"]
    if len(ours) > 1 or any(len(row.get(key, "")) > limit for row in ours for key, limit in (("reason", 128), ("message", 1024))):
        return "the condition NetworkUnavailable is there once, and short"
    managers = [len(node["metadata"].get("managedFields", [])) for node in (old, new)]
    return "the agent may add no managers of fields" if managers[1] > max(32, managers[0]) else None


def record_policy(_user, operation, old, new):
    record = annotations(new).get(agent.RECORD) if new else None
    if record is None or (operation == "UPDATE" and record == annotations(old).get(agent.RECORD)):
        return None
    cidrs = new["spec"].get("podCIDRs", [])
    beginning = json.dumps({"v": 2, "podCIDRs": cidrs, "uid": new["metadata"]["uid"]}, separators=(",", ":"))[:-1]
    if not cidrs or not record.startswith(beginning):
        return "the annotation must begin with the Node's own podCIDRs and uid"
    return "the annotation has at most 4096 characters" if len(record) > 4096 else None


def nodeipam_policy(user, operation, old, new):
    if user["username"] != NODEIPAM:
        return None
    if operation != "UPDATE":
        return "nodeipam neither creates nor deletes Nodes"
    if (annotations(old), rest_of_metadata(old)) != (annotations(new), rest_of_metadata(new)):
        return "nodeipam may not change metadata"
    if old.get("status") != new.get("status"):
        return "nodeipam may not change the status"
    if without(old["spec"], "podCIDR", "podCIDRs") != without(new["spec"], "podCIDR", "podCIDRs"):
        return "nodeipam may change nothing of the spec but podCIDR and podCIDRs"
    if pod_cidrs(old) != (None, None) and pod_cidrs(old) != pod_cidrs(new):
        return "nodeipam gives pod CIDRs only to Nodes that have none"
    return "a Node has one pod CIDR of each family" if len(new["spec"].get("podCIDRs", [])) > 2 else None


def pod_cidrs_policy(user, operation, old, new):
    if not user["username"].startswith("system:node:") or operation == "DELETE":
        return None
    before = (None, None) if operation == "CREATE" else pod_cidrs(old)
    return "a kubelet does not set the pod CIDRs of its Node" if pod_cidrs(new) != before else None


def event_policy(account, component):
    def hook(user, _operation, _old, new):
        if user["username"] != account:
            return None
        host = [component == NODEIPAM_NAME or new.get("source", {}).get("host") or ""]
        if new.get("involvedObject", {}).get("kind") != "Node" or new.get("source", {}).get("component") != component:
            return "Events about Nodes only"
        if host not in ([True], user["extra"].get(NODE_NAME)):
            return "Events in the name of its own node only"
        sizes = [len(new.get(key, "")) <= limit for key, limit in (("message", 1024), ("reason", 128), ("action", 128))]
        more = [each for each in ("labels", "annotations", "ownerReferences", "finalizers") if each in new["metadata"]]
        return None if all(sizes) and not more and "related" not in new else "Events are short"

    return hook


AGENT_NAME, NODEIPAM_NAME = "mncni-agent", "mncni-nodeipam"
NODE_PARTS, EVENTS = ("nodes", "nodes/status"), ("events",)
HOOKS = {  # name: (hook, resources)
    "mncni-agent": (agent_policy, NODE_PARTS),
    "mncni-agent-events": (event_policy(AGENT, AGENT_NAME), EVENTS),
    "mncni-record": (record_policy, NODE_PARTS),
    "mncni-nodeipam": (nodeipam_policy, NODE_PARTS),
    "mncni-nodeipam-events": (event_policy(NODEIPAM, NODEIPAM_NAME), EVENTS),
    "mncni-pod-cidrs": (pod_cidrs_policy, ("nodes",)),
}


def install(api):
    """All policies, on an API double."""
    for name, (hook, resources) in HOOKS.items():
        api.add_policy(hook, name, name, resources)


def annotations(node):
    return node["metadata"].get("annotations", {})


def rest_of_metadata(node):
    return [node["metadata"].get(key) or None for key in ("labels", "finalizers", "ownerReferences")]


def pod_cidrs(node):
    return node["spec"].get("podCIDR"), node["spec"].get("podCIDRs")


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def without_ours(status):
    return {**status, "conditions": [row for row in status.get("conditions", []) if row["type"] != "NetworkUnavailable"]}


# ---------------------------------------------------------------------------------------------------------------------------
# Nodes and cases
# ---------------------------------------------------------------------------------------------------------------------------
def nodes():
    """n1 and n2, whose agents have published their records, and n3, which is new: it has no pod CIDRs."""
    made = [realistic_node(name, index, pod_cidrs=index < 3) for index, name in enumerate(("n1", "n2", "n3"), 1)]
    for node in made[:2]:
        node["metadata"]["annotations"][agent.RECORD] = record(node)
    return made


def record(node, gen=1, **changes):
    """The text of a Node's record as its agent writes it, or (changes: pod_cidrs, uid) one that says something else."""
    cidrs = changes.get("pod_cidrs", node["spec"].get("podCIDRs", []))
    settings = SimpleNamespace(pod_cidrs=cidrs, port=28384)
    return agent.format_record(settings, changes.get("uid", node["metadata"]["uid"]), ["192.0.2.1"], "A" * 43 + "=", gen, "")


def says(text):
    return {"metadata": {"annotations": {agent.RECORD: text}}}


def condition(kind="NetworkUnavailable", status="False", *others):
    when = "2025-01-01T00:00:00Z"
    row = {"status": status, "reason": "Tried", "message": "tried", "lastHeartbeatTime": when, "lastTransitionTime": when}
    return {"status": {"conditions": [{"type": each, **row} for each in (kind, *others)]}}


def long_condition(**words):
    body = condition()
    body["status"]["conditions"][0].update(words)
    return body


# body: a merge patch (for "status" a strategic one), a function of {name: Node} -> patch, or None for DELETE; a whole Node for CREATE, or
# with the part "events" a whole Event.
# refused: the policy that refuses, "" for none. token: the node that the user's token names.
Case = namedtuple("Case", "claim user token node part body refused", defaults=("",))


def agent_case(claim, body, refused="", node="n1", part="", token="n1"):
    return Case(claim, AGENT, token, node, part, body, refused and f"mncni-{refused}")


def ipam_case(claim, body, refused="mncni-nodeipam", node="n3", part=""):
    return Case(claim, NODEIPAM, "n2", node, part, body, refused)


def event(component="mncni-agent", host="n1", kind="Node", name="n2", **words):
    """An Event as the programs send it."""
    about = {"apiVersion": "v1", "kind": kind, "name": name, "uid": name, **({} if kind == "Node" else {"namespace": "default"})}
    meta = {"namespace": "default", "generateName": f"{name}.", **words.pop("metadata", {})}
    source = {"component": component, **({"host": host} if host else {})}
    return {"kind": "Event", "apiVersion": "v1", "metadata": meta, "involvedObject": about, "source": source,
            **{"reason": "RecordRefused", "message": "tried", "type": "Warning", "count": 1, **words}}


def own(**changes):
    return lambda nodes: says(record(nodes["n1"], **changes))


def given(*cidrs):
    return {"spec": {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)}}


NOTHING, ITSELF = {}, "itself"

AGENT_CASES = [
    agent_case("writes its record", own(gen=2)),
    agent_case("withdraws its record", says(None)),
    agent_case("writes its record again", own()),
    agent_case("changes nothing", NOTHING),
    agent_case("sets its condition", condition(), part="status"),
    agent_case("sets its condition back", condition(status="True"), part="status"),
    agent_case("removes its condition", {"status": {"conditions": [{"type": "NetworkUnavailable", "$patch": "delete"}]}}, part="status"),
    agent_case("writes record and condition by way of the status", lambda nodes: {**own(gen=3)(nodes), **condition()}, part="status"),
    agent_case("writes another's record", lambda nodes: says(record(nodes["n2"], gen=2)), "agent", node="n2"),
    agent_case("adds a space to another's record", lambda nodes: says(record(nodes["n2"]) + " "), "agent", node="n2"),
    agent_case("withdraws another's record", says(None), "agent", node="n2"),
    agent_case("sets another's condition", condition(), "agent", node="n2", part="status"),
    agent_case("writes its record with a token of no node", own(gen=2), "agent", token=""),
    agent_case("claims another's pod CIDRs", lambda nodes: own(pod_cidrs=nodes["n2"]["spec"]["podCIDRs"])(nodes), "record"),
    agent_case(
        "claims another's pod CIDRs besides its own",
        lambda nodes: own(pod_cidrs=[*nodes["n1"]["spec"]["podCIDRs"], *nodes["n2"]["spec"]["podCIDRs"]])(nodes), "record",
    ),
    agent_case("claims a part of its pod CIDRs", lambda nodes: own(pod_cidrs=nodes["n1"]["spec"]["podCIDRs"][:1])(nodes), "record"),
    agent_case("claims no pod CIDRs", own(pod_cidrs=[]), "record"),
    agent_case("claims another uid", lambda nodes: own(uid=nodes["n2"]["metadata"]["uid"])(nodes), "record"),
    agent_case("claims a longer uid", lambda nodes: own(uid=nodes["n1"]["metadata"]["uid"] + "0")(nodes), "record"),
    agent_case("writes the keys in another order", lambda nodes: says(reordered(record(nodes["n1"]))), "record"),
    agent_case("writes a space before its record", lambda nodes: says(" " + record(nodes["n1"])), "record"),
    agent_case("writes an empty record", says(""), "record"),
    agent_case("claims by way of the status", lambda nodes: own(pod_cidrs=["10.9.9.0/24"])(nodes), "record", part="status"),
    agent_case("claims pod CIDRs before it has any", lambda nodes: says(record(nodes["n3"], pod_cidrs=["10.9.9.0/24"])), "record",
               node="n3", token="n3"),
    agent_case("adds a label", {"metadata": {"labels": {"more": "yes"}}}, "agent"),
    agent_case("adds a label by way of the status", {"metadata": {"labels": {"more": "yes"}}}, "agent", part="status"),
    agent_case("removes a label", {"metadata": {"labels": {"example.com/team": None}}}, "agent"),
    agent_case("adds an annotation", {"metadata": {"annotations": {"more": "yes"}}}, "agent"),
    agent_case("adds an annotation by way of the status", {"metadata": {"annotations": {"more": "yes"}}}, "agent", part="status"),
    agent_case("changes an annotation", {"metadata": {"annotations": {"node.alpha.kubernetes.io/ttl": "1"}}}, "agent"),
    agent_case("removes an annotation", {"metadata": {"annotations": {"node.alpha.kubernetes.io/ttl": None}}}, "agent"),
    agent_case("removes all annotations", {"metadata": {"annotations": None}}, "agent"),
    agent_case("adds a finalizer", {"metadata": {"finalizers": ["example.com/more"]}}, "agent"),
    agent_case("adds an owner", {"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "1-2-3"}]}},
               "agent"),
    agent_case("adds a taint", {"spec": {"taints": [{"key": "more", "effect": "NoSchedule"}]}}, "agent"),
    agent_case("cordons its node", {"spec": {"unschedulable": True}}, "agent"),
    agent_case("gives itself pod CIDRs", given("10.9.9.0/24"), "agent", node="n3", token="n3"),
    agent_case("sets the condition Ready", condition("Ready", "False"), "agent", part="status"),
    agent_case("invents a condition", condition("Mncni", "True"), "agent", part="status"),
    agent_case("sets its condition and another", condition("NetworkUnavailable", "False", "MemoryPressure"), "agent", part="status"),
    agent_case("removes a condition", {"status": {"conditions": [{"type": "PIDPressure", "$patch": "delete"}]}}, "agent", part="status"),
    agent_case("changes an address", {"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.66"}]}}, "agent", part="status"),
    agent_case("changes the capacity", {"status": {"capacity": {"example.com/gpu": "8"}}}, "agent", part="status"),
    agent_case("removes the images", {"status": {"images": None}}, "agent", part="status"),
    agent_case("writes a long record", lambda nodes: says(record(nodes["n1"]) + " " * 4000), "record"),
    agent_case("writes a record of 200 KB", lambda nodes: says(record(nodes["n1"]) + " " * 200_000), "record"),
    agent_case("writes a record of 200 KB by way of the status", lambda nodes: says(record(nodes["n1"]) + " " * 200_000), "record",
               part="status"),
    agent_case("sets its condition with a long message", long_condition(message="x" * 1025), "agent", part="status"),
    agent_case("sets its condition with a long reason", long_condition(reason="x" * 129), "agent", part="status"),
    agent_case("sets its condition with the longest message", long_condition(message="x" * 1024), part="status"),
    agent_case("reports images", {"status": {"images": [{"names": ["x" * 1000], "sizeBytes": 1}]}}, "agent", part="status"),
    agent_case("reports volumes", {"status": {"volumesAttached": [{"name": "x", "devicePath": "y"}]}}, "agent", part="status"),
    agent_case("tells of a record", event(), part="events", node=""),
    agent_case("tells of its own Node", event(name="n1"), part="events", node=""),
    agent_case("tells in another node's name", event(host="n2"), "agent-events", part="events", node=""),
    agent_case("tells in no node's name", event(host=""), "agent-events", part="events", node=""),
    agent_case("tells as the kubelet", event("kubelet"), "agent-events", part="events", node=""),
    agent_case("tells of a Pod", event(kind="Pod"), "agent-events", part="events", node=""),
    agent_case("tells at length", event(message="x" * 1025), "agent-events", part="events", node=""),
    agent_case("tells with annotations", event(metadata={"annotations": {"x": "x" * 100_000}}), "agent-events", part="events", node=""),
    agent_case("deletes its Node", None, "agent"),
    agent_case("creates a Node", {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n4"}}, "agent", node="", token="n4"),
]

OTHER_CASES = [
    Case("a kubelet reports", KUBELET, "", "n1", "status", condition("Ready", "True")),
    Case("a kubelet changes its annotations", KUBELET, "", "n1", "", {"metadata": {"annotations": {"volumes.kubernetes.io/more": "1"}}}),
    Case("a kubelet writes the right record", KUBELET, "", "n1", "", own(gen=7)),
    Case("a kubelet claims what is not its node's", KUBELET, "", "n1", "", own(pod_cidrs=["10.9.9.0/24"]), "mncni-record"),
    Case("a kubelet claims by way of the status", KUBELET, "", "n1", "status", own(pod_cidrs=["10.9.9.0/24"]), "mncni-record"),
    Case("a kubelet writes a long record", KUBELET, "", "n1", "", lambda nodes: says(record(nodes["n1"]) + " " * 4000), "mncni-record"),
    Case("a kubelet creates its Node", "system:node:n4", "", "", "", {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n4"}}),
    Case("a kubelet creates its Node with all pod CIDRs", "system:node:n4", "", "", "",
         {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n4"}, **given("10.244.0.0/16")}, "mncni-pod-cidrs"),
    Case("a kubelet gives itself pod CIDRs", "system:node:n3", "", "n3", "", given("10.244.0.0/16"), "mncni-pod-cidrs"),
    Case("another allocator gives pod CIDRs", ADMIN, "", "n3", "", given("10.9.9.0/24")),
    Case("others send Events as they like", ADMIN, "", "", "events", event("kubelet", kind="Pod", message="x" * 2000)),
    Case("an operator taints a Node", ADMIN, "", "n2", "", {"spec": {"taints": [{"key": "more", "effect": "NoSchedule"}]}}),
    Case("an operator labels a Node without pod CIDRs", ADMIN, "", "n3", "", {"metadata": {"labels": {"more": "yes"}}}),
    Case("an operator removes a record", ADMIN, "", "n2", "", says(None)),
    Case("an operator writes a wrong record", ADMIN, "", "n2", "", own(), "mncni-record"),
    Case("an operator creates a Node", ADMIN, "", "", "", {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n4"}}),
    Case("a Node is created with a record", ADMIN, "", "", "",
         {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n5", "annotations": {agent.RECORD: "{}"}}}, "mncni-record"),
]

NODEIPAM_CASES = [
    ipam_case("changes nothing", NOTHING, ""),
    ipam_case("labels a Node", {"metadata": {"labels": {"more": "yes"}}}),
    ipam_case("annotates a Node", {"metadata": {"annotations": {"more": "yes"}}}),
    ipam_case("withdraws a record", says(None), node="n1"),
    ipam_case("adds a finalizer", {"metadata": {"finalizers": ["example.com/more"]}}),
    ipam_case("taints a Node", {"spec": {"taints": [{"key": "more", "effect": "NoSchedule"}]}}),
    ipam_case("cordons a Node", {"spec": {"unschedulable": True}}),
    ipam_case("gives pod CIDRs and a taint", {"spec": {**given("10.9.9.0/24")["spec"], "unschedulable": True}}),
    ipam_case("sets a condition", condition(), part="status"),
    ipam_case("deletes a Node", None),
    ipam_case("changes a Node's pod CIDRs", given("10.9.9.0/24"), ITSELF, node="n1"),
    ipam_case("takes a Node's pod CIDRs away", {"spec": {"podCIDR": None, "podCIDRs": None}}, ITSELF, node="n1"),
    ipam_case("gives pod CIDRs to a Node without any", given("10.9.9.0/24", "fd09::/64"), ""),
    ipam_case("tells of a Node", event("mncni-nodeipam", ""), "", node="", part="events"),
    ipam_case("tells as an agent", event(), "mncni-nodeipam-events", node="", part="events"),
    ipam_case("tells of a Pod", event("mncni-nodeipam", "", "Pod"), "mncni-nodeipam-events", node="", part="events"),
    ipam_case("tells at length", event("mncni-nodeipam", "", message="x" * 1025), "mncni-nodeipam-events", node="", part="events"),
]

CASES = AGENT_CASES + OTHER_CASES + NODEIPAM_CASES


def reordered(text):
    return json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":"))


def request_of(case, nodes):
    """(method, path, body, content type) of a case. nodes: {name: Node} as the server has them."""
    body = copy.deepcopy(case.body(nodes) if callable(case.body) else case.body)
    if not case.node:
        return "POST", "/api/v1/namespaces/default/events" if case.part == "events" else kube.NODES, body, kube.JSON
    path = "/".join(filter(None, (kube.NODES, case.node, case.part)))
    return ("DELETE", path, None, "") if body is None else ("PATCH", path, body, kube.STRATEGIC_PATCH if case.part else kube.MERGE_PATCH)


def refusal(case, nodes, client):
    """Tries a case: the name of the policy that refuses it, "itself" where the API needs no policy for that, "" when it is allowed.
    ApiError for any other trouble."""
    method, path, body, content_type = request_of(case, nodes)
    try:
        client.request(method, path, body, None, content_type or kube.JSON)
    except kube.ApiError as error:
        found = re.search("ValidatingAdmissionPolicy '([a-z-]*)'", error.message)
        if not found and error.status != 422:
            raise
        return found.group(1) if found else "itself"
    return ""
