"""The claims about the API server double hold for a real kube-apiserver, too: the same functions, run against one. So the double is what
the real one is, and not what somebody remembered of it. Needs `make kubernetes`; no root."""

import json
import random
import urllib.request

import pytest

from tests import kubernetes
from tests.apiserver import ApiServer
from tests.unit import test_apiserver as claims
from tests.unit.test_apiserver import (  # noqa: F401  fixtures, and the claims that are not about faults, counters and the like
    client,
    test_a_bookmark_does_not_repeat_the_version_that_a_watch_began_with,
    test_a_condition_that_is_new_stands_first,
    test_a_condition_without_its_type_is_an_internal_error,
    test_a_connection_serves_several_requests,
    test_a_continue_token_expires_with_compaction_and_another_goes_on,
    test_a_deleted_object_has_the_version_of_its_deletion,
    test_a_dry_run_answers_and_changes_nothing,
    test_a_field_belongs_to_who_changed_it_last,
    test_a_field_selector_picks_one_node,
    test_a_json_patch_with_a_failing_test_changes_nothing,
    test_a_lease_is_not_updated_without_a_version,
    test_a_lease_is_won_by_one_of_two_writers,
    test_a_list_carries_the_version_of_the_store_not_of_its_newest_item,
    test_a_list_with_parameters_that_make_no_sense_is_refused,
    test_a_method_that_makes_no_sense_is_not_allowed,
    test_a_missing_node_is_not_found,
    test_a_name_to_be_made_up_must_not_end_in_a_dot,
    test_a_namespace_has_to_exist,
    test_a_new_event_says_who_reports_and_when,
    test_a_new_object_gets_uid_and_creation_time,
    test_a_node_with_a_finalizer_stays_until_that_has_gone,
    test_a_policy_sees_the_node_of_the_token_and_bites_in_a_dry_run,
    test_a_put_does_not_make_a_node,
    test_a_put_makes_a_lease_where_the_user_may_create,
    test_a_right_on_one_name_lets_list_and_watch_that_name,
    test_a_uid_in_a_write_means_that_object_alone,
    test_a_version_in_a_write_is_a_precondition,
    test_a_watch_begins_after_its_version,
    test_a_watch_by_metadata_has_no_spec,
    test_a_watch_ends_cleanly_after_its_time_and_before_with_a_bookmark_for_those_who_ask,
    test_a_watch_of_one_name_sees_no_other,
    test_a_watch_without_a_version_begins_with_all_objects,
    test_a_write_that_changes_nothing_makes_no_version_and_no_event,
    test_an_annotation_is_a_string,
    test_an_event_about_a_node_belongs_into_default,
    test_an_object_without_managers_never_gets_any,
    test_an_open_watch_outlives_a_compaction,
    test_an_unknown_kind_of_patch_is_refused,
    test_an_unknown_resource_is_not_found,
    test_an_unknown_token_is_unauthorized,
    test_conditions_are_replaced_in_a_merge_patch_and_absent_times_are_null,
    test_conditions_merge_by_type_in_a_strategic_patch,
    test_deletion_answers_with_a_status,
    test_fields_that_no_node_has_are_dropped,
    test_items_of_a_list_have_no_kind_and_come_sorted,
    test_large_answers_are_compressed_for_those_who_ask,
    test_limit_is_ignored_with_version_0,
    test_managed_fields_say_who_wrote_what,
    test_metadata_only_has_no_spec_and_no_status,
    test_no_object_grows_beyond_the_limit_of_annotations,
    test_nodes_leaves_status_alone,
    test_nodes_status_leaves_spec_alone_but_changes_annotations,
    test_one_of_the_two_fields_is_enough,
    test_pages_of_a_list_are_one_moment,
    test_pod_cidrs_go_from_none_to_some_and_no_further,
    test_pod_cidrs_have_to_be_good,
    test_rights_are_per_user_verb_and_resource,
    test_the_first_acceptable_form_wins,
    test_the_kind_of_metadata_has_to_fit,
    test_times_are_kept_in_whole_seconds_of_utc,
    test_times_of_a_lease_have_microseconds,
    test_version_and_health_need_no_token,
    test_version_match_exact_gives_the_past,
    test_without_a_token_a_request_is_anonymous_and_forbidden,
    three,
)

pytestmark = pytest.mark.skipif(bool(kubernetes.missing()), reason=kubernetes.missing() or "-")
NODES, RBAC, POLICIES = "/api/v1/nodes", "/apis/rbac.authorization.k8s.io/v1", "/apis/admissionregistration.k8s.io/v1"

# What the policies of the claims are in a cluster.
CEL = {claims.own_node_only: f"""
    request.userInfo.username != '{claims.AGENT}' ||
    request.userInfo.extra['authentication.kubernetes.io/node-name'][0] == object.metadata.name"""}


class Real:
    """A real API server with the methods of ApiServer that the claims use."""

    def __init__(self, cluster):
        self.cluster, self.url, self.ca_file = cluster, cluster.url, cluster.ca_file
        self.admin = claims.Client(self, token=kubernetes.TOKEN)
        self.tokens, self.policies = {}, Policies(self)
        self.rules = []

    def must(self, method, path, body=None, **headers):
        """The answer to a request of the administrator; what is gone or there already is fine."""
        code, obj = self.admin.call(method, path, body, **headers)
        assert code in (200, 201, 404, 409), obj
        return obj

    def reset(self):
        """No nodes, no events, no lease of the claims; every right for everybody."""
        for path in (NODES, claims.EVENTS, f"{claims.LEASES}?fieldSelector=metadata.name%3Dnodeipam"):
            for item in self.must("GET", path)["items"]:
                if "finalizers" in item["metadata"]:
                    self.patch_node(item["metadata"]["name"], {"metadata": {"finalizers": None}})
                self.must("DELETE", f"{path.partition('?')[0]}/{item['metadata']['name']}")
        self.policies.clear()
        self.rbac = None

    # ---- objects ----

    @property
    def resource_version(self):
        return self.must("GET", f"{NODES}?limit=1")["metadata"]["resourceVersion"]

    @property
    def changes(self):
        return self.resource_version

    def bump(self):
        self.must("POST", claims.EVENTS, {**claims.event(), "metadata": {"generateName": "bump-"}})

    def create_node(self, node):
        if isinstance(node, str):
            node = {"metadata": {"name": node, "labels": {"kubernetes.io/hostname": node}}}
        meta = {key: value for key, value in node["metadata"].items() if key not in ("uid", "creationTimestamp", "managedFields")}
        return self.must("POST", f"{NODES}?fieldManager=test", {**node, "kind": "Node", "apiVersion": "v1", "metadata": meta})

    def create_nodes(self, count):
        for index in range(count):
            self.create_node(claims.realistic_node(f"node-{index}", index))

    def patch_node(self, name, patch):
        return self.must("PATCH", f"{NODES}/{name}?fieldManager=test", patch, Content_Type=claims.MERGE)

    def delete_node(self, name):
        self.must("DELETE", f"{NODES}/{name}")

    def node(self, name):
        node = self.must("GET", f"{NODES}/{name}")
        return node if node["kind"] == "Node" else None

    def compact(self):
        """From what etcd has forgotten no list goes on. The watch cache of the API server is another thing, and has no such button."""
        words = self.cluster.processes[0].args
        etcd = words[words.index("--listen-client-urls") + 1]
        body = json.dumps({"revision": self.resource_version, "physical": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{etcd}/v3/kv/compaction", body), timeout=10) as response:
            response.read()

    # ---- users, rights, policies ----

    def token(self, user, groups=(), node="", pod=""):
        """A real token of the agent's service account, for a pod on a node where one is named; made when it is first asked for."""
        namespace, name = user.split(":")[2:]
        top, bound = f"/api/v1/namespaces/{namespace}", {}
        if (user, node) not in self.tokens:
            self.must("POST", f"{top}/serviceaccounts", {"metadata": {"name": name}})
            if node:
                spec = {"serviceAccountName": name, "nodeName": node, "containers": [{"name": "one", "image": "one"}]}
                self.must("POST", f"{top}/pods", {"metadata": {"name": f"{name}-{node}"}, "spec": spec})
                bound = {"boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": f"{name}-{node}"}}
            made = self.must("POST", f"{top}/serviceaccounts/{name}/token", {"spec": bound})
            self.tokens[user, node] = made["status"]["token"]
        return self.tokens[user, node]

    @property
    def rbac(self):
        return self.rules

    @rbac.setter
    def rbac(self, rules):
        wanted = Rules([("system:authenticated", "*", "*")] if rules is None else rules)
        for index in range(len(self.rules)):
            self.must("DELETE", f"{RBAC}/clusterrolebindings/claim-{index}")
            self.must("DELETE", f"{RBAC}/clusterroles/claim-{index}")
        claims.wait_until(lambda: not any(self.may(*rule) for rule in self.rules))
        self.rules, wanted.add = Rules(), self.allow
        for rule in wanted:
            self.allow(rule)

    def allow(self, rule):
        name, (user, verb, resource, *names) = f"claim-{len(self.rules)}", rule
        self.rules.add = self.allow
        list.append(self.rules, rule)
        row = {"apiGroups": ["*"], "resources": [resource], "verbs": [verb], **({"resourceNames": names} if names else {})}
        subject = {"kind": "User" if user == claims.AGENT else "Group", "name": user, "apiGroup": "rbac.authorization.k8s.io"}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
        self.must("POST", f"{RBAC}/clusterroles", {"metadata": {"name": name}, "rules": [row]})
        self.must("POST", f"{RBAC}/clusterrolebindings", {"metadata": {"name": name}, "roleRef": role, "subjects": [subject]})
        claims.wait_until(lambda: self.may(*rule))

    def may(self, user, verb, resource, *names):
        """Whether the agent has a right now."""
        resource, _, subresource = resource.partition("/")
        group = "coordination.k8s.io" if resource == "leases" else ""
        asked = {"verb": verb, "resource": resource, "subresource": subresource, "group": group, "name": names[0] if names else ""}
        spec = {"user": claims.AGENT, "groups": ["system:serviceaccounts", "system:authenticated"], "resourceAttributes": asked}
        return self.must("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", {"spec": spec})["status"]["allowed"]

    def add_policy(self, hook, name="policy", binding="binding"):
        rule = {"apiGroups": [""], "apiVersions": ["v1"], "resources": ["nodes", "nodes/status"], "operations": ["UPDATE"]}
        reason = "an agent may change its own node alone"
        spec = {"failurePolicy": "Fail", "matchConstraints": {"resourceRules": [rule]},
                "validations": [{"expression": CEL[hook].strip(), "message": reason}]}
        self.must("POST", f"{POLICIES}/validatingadmissionpolicies", {"metadata": {"name": name}, "spec": spec})
        spec = {"policyName": name, "validationActions": ["Deny"]}
        self.must("POST", f"{POLICIES}/validatingadmissionpolicybindings", {"metadata": {"name": binding}, "spec": spec})
        self.policies.append((name, binding))
        self.policies.wait(422)


class Rules(list):
    """Rights: one more is in force when append returns."""

    def append(self, rule):
        self.add(rule)


class Policies(list):
    """Policies: in force, or not any more, when a call returns."""

    def __init__(self, real):
        super().__init__()
        self.real = real

    def clear(self):
        for name, binding in self:
            self.real.must("DELETE", f"{POLICIES}/validatingadmissionpolicybindings/{binding}")
            self.real.must("DELETE", f"{POLICIES}/validatingadmissionpolicies/{name}")
            self.wait(200)
        super().clear()

    def wait(self, code):
        """Wait until the agent of node a gets this code for a dry-run on node b."""
        agent = claims.Client(self.real, node="a")
        patch = {"metadata": {"annotations": {"probe": "1"}}}

        def probe():
            return agent.call("PATCH", f"{NODES}/b?dryRun=All", patch, Content_Type=claims.MERGE)[0] in (code, 404)

        claims.wait_until(probe, 30)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with kubernetes.Kubernetes(tmp_path_factory.mktemp("kubernetes")) as cluster:
        made = Real(cluster)
        claims.wait_until(lambda: claims.Client(made, token="").call("GET", "/version")[0] == 200, 30)  # it makes its own roles last
        yield made


@pytest.fixture
def api(real):
    real.reset()
    return real


# ---- random patches --------------------------------------------------------------------------------------------------------

TYPES = ("Ready", "NetworkUnavailable", "A", "B", "C")


def random_rows(rng):
    """Rows of conditions for a strategic merge, some of them deletions."""
    rows = []
    for name in rng.sample(TYPES, rng.randrange(4)):
        row = {"type": name, "status": rng.choice(["True", "False"]), "reason": rng.choice(["X", "Y", None])}
        if rng.random() < 0.3:
            row["lastTransitionTime"] = rng.choice(["2024-05-01T10:00:00Z", "2024-05-01T10:00:00.5+02:00", None])
        rows.append({"type": name, "$patch": "delete"} if rng.random() < 0.15 else row)
    return rows


def random_patch(rng):
    """A patch of a node, as kubelets, agents and kubectl send them and a little worse."""
    status, meta = {"conditions": random_rows(rng)}, {}
    if status["conditions"] and rng.random() < 0.3 and not any("$patch" in row for row in status["conditions"]):
        more = [name for name in TYPES if rng.random() < 0.4 and all(row["type"] != name for row in status["conditions"])]
        status["$setElementOrder/conditions"] = [{"type": name} for name in [*(row["type"] for row in status["conditions"]), *more]]
    if rng.random() < 0.1:
        status = {"conditions": None}
    if rng.random() < 0.3:
        status["addresses"] = [{"type": rng.choice(["InternalIP", "Hostname"]), "address": f"10.0.0.{rng.randrange(9)}"}]
    if rng.random() < 0.1:
        status["phase"] = rng.choice(["Running", None])
    if rng.random() < 0.5:
        meta["annotations"] = {name: rng.choice(["1", "2", None]) for name in rng.sample("abc", 2)}
    if rng.random() < 0.3:
        meta["finalizers"] = [f"example.com/{name}" for name in rng.sample("fgh", 2)]
    elif rng.random() < 0.2:
        meta["$deleteFromPrimitiveList/finalizers"] = [f"example.com/{rng.choice('fgh')}"]
    return {"metadata": meta, "status": status}


def shape(answer):
    """An answer without what differs by nature: versions, identifiers, times of day."""
    code, obj = answer
    if code != 200:
        return obj
    meta = {key: obj["metadata"][key] for key in ("annotations", "labels", "finalizers") if key in obj["metadata"]}
    entries = [{key: value for key, value in entry.items() if key != "time"} for entry in obj["metadata"]["managedFields"]]
    return {**obj, "metadata": {**meta, "managers": sorted(entries, key=lambda entry: (entry["manager"], entry.get("subresource", "")))}}


@pytest.mark.parametrize("seed", range(3))
def test_random_patches_have_the_same_outcome(api, seed):
    """Strategic merges, their order of rows, and who owns which field afterwards."""
    rng = random.Random(seed)
    with ApiServer() as double:
        clients = [claims.Client(api), claims.Client(double)]
        for each in clients:
            assert each.call("POST", f"{NODES}?fieldManager=kubelet", {"metadata": {"name": "n", "labels": {"l": "1"}}})[0] == 201
        for number in range(100):
            patch, manager = random_patch(rng), rng.choice(["one", "two"])
            kind = rng.choice([claims.STRATEGIC] * 4 + [claims.MERGE])
            path = f"{NODES}/n{rng.choice(['', '/status', '/status'])}?fieldManager={manager}"
            real, own = (shape(each.call("PATCH", path, patch, Content_Type=kind)) for each in clients)
            assert own == real, f"patch {number}, {kind} to {path}: {json.dumps(patch)}"
