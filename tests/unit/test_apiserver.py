"""The API server double is like the real one in what the agent and the node IPAM rely on. Most of these claims are also run against a real
kube-apiserver: tests/e2e/test_apiserver_real.py."""
import contextlib
import http.client
import json
import os
import shutil
import socket
import ssl
import threading
import time
import urllib.parse

import pytest

from tests.apiobjects import json_patch, merge_patch, realistic_node, strategic_merge
from tests.apiserver import ApiError, ApiProcess, ApiServer

AGENT = "system:serviceaccount:kube-system:mncni-agent"
MERGE, STRATEGIC, JSON_PATCH = (f"application/{kind}+json" for kind in ("merge-patch", "strategic-merge-patch", "json-patch"))
PARTIAL = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
PARTIAL_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
EVENTS = "/api/v1/namespaces/default/events"
NEW_EVENTS = "/apis/events.k8s.io/v1/namespaces/default/events"


class Client:
    """A plain client of one server, with one user."""

    def __init__(self, api, user=AGENT, token=None, user_agent="mncni-agent/1", ca_file=None, certificate=None, **token_options):
        self.api, self.user_agent = api, user_agent
        self.token = api.token(user, **token_options) if token is None and not certificate else token
        self.tls = ssl.create_default_context(cafile=ca_file or api.ca_file)
        if certificate:
            self.tls.load_cert_chain(*certificate)

    def connect(self, timeout_s=10):
        url = urllib.parse.urlsplit(self.api.url)
        return http.client.HTTPSConnection(url.hostname, url.port, context=self.tls, timeout=timeout_s)

    def headers(self, **headers):
        sent = {"User-Agent": self.user_agent, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return {**sent, "Authorization": f"Bearer {self.token}"} if self.token else sent

    def send(self, method, path, body=None, timeout_s=10, **headers):
        """The response, its body not read yet; its connection is response.connection."""
        connection = self.connect(timeout_s)
        connection.request(method, path, None if body is None else json.dumps(body), self.headers(**headers))
        response = connection.getresponse()
        response.connection = connection
        return response

    def call(self, method, path, body=None, **headers):
        """(code, object or text)."""
        response = self.send(method, path, body, **headers)
        with contextlib.closing(response.connection):
            text = response.read()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text

    def get(self, path="/api/v1/nodes", **headers):
        code, obj = self.call("GET", path, **headers)
        assert code == 200, obj
        return obj

    def patch(self, name, patch, subresource="", kind=MERGE, query="", code=200):
        path = f"/api/v1/nodes/{name}" + (f"/{subresource}" if subresource else "") + query
        got, obj = self.call("PATCH", path, patch, Content_Type=kind)
        assert got == code, obj
        return obj

    def watch(self, query="", path="/api/v1/nodes", **headers):
        return WatchReader(self.send("GET", f"{path}?watch=1&{query}", **headers))


class WatchReader:
    """The events of a watch, one by one."""

    def __init__(self, response):
        self.response, self.status = response, response.status

    def next(self):
        """The next event, None at the end of the stream."""
        line = self.response.readline()
        return json.loads(line) if line else None

    def events(self, count):
        """[(type, name)] of the next events."""
        return [(event["type"], event["object"]["metadata"]["name"]) for event in (self.next() for _ in range(count))]

    def close(self):
        self.response.connection.close()
        self.response.close()


def message(answer):
    code, status = answer
    assert status["kind"] == "Status" and status["status"] == "Failure" and status["code"] == code, status
    return code, status["reason"], status["message"]


def wait_until(probe, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not probe():
        assert time.monotonic() < deadline, "the state did not come"
        time.sleep(0.005)


@pytest.fixture
def api():
    with ApiServer() as server:
        yield server


@pytest.fixture
def client(api):
    return Client(api)


@pytest.fixture
def three(api):
    """Three small nodes, a to c."""
    for name in "cab":
        api.create_node(name)
    return api


# ---- reading ---------------------------------------------------------------------------------------------------------------


def test_version_and_health_need_no_token(api):
    nobody = Client(api, token="")
    assert nobody.get("/version")["gitVersion"].startswith("v1.30.")
    assert nobody.call("GET", "/healthz") == (200, b"ok")


def test_without_a_token_a_request_is_anonymous_and_forbidden(api):
    assert message(Client(api, token="").call("GET", "/api/v1/nodes")) == (
        403, "Forbidden", 'nodes is forbidden: User "system:anonymous" cannot list resource "nodes" in API group "" at the cluster scope')


def test_an_unknown_token_is_unauthorized(api):
    assert message(Client(api, token="wrong").call("GET", "/api/v1/nodes")) == (401, "Unauthorized", "Unauthorized")


def test_an_unknown_path_is_no_status_object(client):
    assert client.call("GET", "/frobs") == (404, b"404 page not found\n")


def test_an_unknown_resource_is_not_found(client):
    answer = client.call("GET", "/api/v1/frobs")
    assert message(answer) == (404, "NotFound", "the server could not find the requested resource")


def test_a_missing_node_is_not_found(client):
    code, status = client.call("GET", "/api/v1/nodes/n9")
    assert message((code, status)) == (404, "NotFound", 'nodes "n9" not found')
    assert status["details"] == {"name": "n9", "kind": "nodes"}


def test_items_of_a_list_have_no_kind_and_come_sorted(three, client):
    nodes = client.get()
    assert (nodes["kind"], nodes["apiVersion"]) == ("NodeList", "v1")
    assert [node["metadata"]["name"] for node in nodes["items"]] == ["a", "b", "c"]
    assert "kind" not in nodes["items"][0]
    assert client.get("/api/v1/nodes/a")["kind"] == "Node"


def test_a_list_carries_the_version_of_the_store_not_of_its_newest_item(three, client):
    three.bump()
    nodes = client.get()
    assert nodes["metadata"]["resourceVersion"] == three.resource_version
    assert all(node["metadata"]["resourceVersion"] != three.resource_version for node in nodes["items"])


def test_pages_of_a_list_are_one_moment(three, client):
    first = client.get("/api/v1/nodes?limit=2")
    assert first["metadata"]["remainingItemCount"] == 1
    three.delete_node("c")
    three.create_node("d")
    second = client.get(f"/api/v1/nodes?limit=2&continue={first['metadata']['continue']}")
    assert [node["metadata"]["name"] for node in first["items"] + second["items"]] == ["a", "b", "c"]
    assert second["metadata"] == {"resourceVersion": first["metadata"]["resourceVersion"]}


def test_limit_is_ignored_with_version_0(three, client):
    nodes = client.get("/api/v1/nodes?limit=1&resourceVersion=0")
    assert len(nodes["items"]) == 3 and "continue" not in nodes["metadata"]


def test_a_continue_token_expires_with_compaction_and_another_goes_on(three, client):
    token = client.get("/api/v1/nodes?limit=1")["metadata"]["continue"]
    three.create_node("d")
    three.compact()
    answer = client.call("GET", f"/api/v1/nodes?limit=1&continue={token}")
    assert message(answer)[:2] == (410, "Expired")
    assert "too old to display a consistent list result" in answer[1]["message"]
    rest = client.get(f"/api/v1/nodes?continue={answer[1]['metadata']['continue']}")
    assert [node["metadata"]["name"] for node in rest["items"]] == ["b", "c", "d"]


@pytest.mark.parametrize("query, code, text", [
    ("resourceVersionMatch=Exact", 422, "resourceVersionMatch is forbidden unless resourceVersion is provided"),
    ("resourceVersion=0&resourceVersionMatch=Exact", 422, 'resourceVersionMatch "exact" is forbidden for resourceVersion "0"'),
    ("resourceVersion=1&resourceVersionMatch=Newer", 422, 'Unsupported value: "Newer"'),
    ("resourceVersion=x", 500, "invalid syntax"),
    ("resourceVersion=2&continue=eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6MSwic3RhcnQiOiJhXHUwMDAwIn0", 400,
     "specifying resource version is not allowed when using continue"),
    ("resourceVersion=2&resourceVersionMatch=Exact&continue=abc", 422, "resourceVersionMatch is forbidden when continue is provided"),
    ("continue=abc", 400, "continue key is not valid"),
    ("resourceVersion=999999", 504, "Timeout: Too large resource version: 999999, current: "),
    ("fieldSelector=status.phase%3DReady", 400, "field label not supported: status.phase"),
])
def test_a_list_with_parameters_that_make_no_sense_is_refused(three, client, query, code, text):
    answer = client.call("GET", f"/api/v1/nodes?{query}")
    assert answer[0] == code and text in answer[1]["message"]


def test_the_double_knows_no_label_selectors(three, client):
    assert "knows no label selectors" in client.call("GET", "/api/v1/nodes?labelSelector=a%3Db")[1]["message"]


def test_version_match_exact_gives_the_past(three, client):
    then = three.resource_version
    three.delete_node("a")
    past = client.get(f"/api/v1/nodes?resourceVersion={then}&resourceVersionMatch=Exact")
    assert len(past["items"]) == 3 and past["metadata"]["resourceVersion"] == then
    assert len(client.get(f"/api/v1/nodes?resourceVersion={then}&resourceVersionMatch=NotOlderThan")["items"]) == 2
    three.compact()
    assert message(client.call("GET", f"/api/v1/nodes?resourceVersion={then}&resourceVersionMatch=Exact"))[:2] == (410, "Expired")


def test_a_field_selector_picks_one_node(three, client):
    nodes = client.get("/api/v1/nodes?fieldSelector=metadata.name%3Db")
    assert [node["metadata"]["name"] for node in nodes["items"]] == ["b"]


def test_metadata_only_has_no_spec_and_no_status(api, client):
    api.create_node(realistic_node("n1", 1))
    nodes = client.get(Accept=PARTIAL_LIST)
    assert (nodes["kind"], nodes["apiVersion"]) == ("PartialObjectMetadataList", "meta.k8s.io/v1")
    assert set(nodes["items"][0]) == {"kind", "apiVersion", "metadata"}
    assert nodes["items"][0]["metadata"]["managedFields"]
    assert set(client.get("/api/v1/nodes/n1", Accept=PARTIAL)) == {"kind", "apiVersion", "metadata"}


def test_the_kind_of_metadata_has_to_fit(three, client):
    assert message(client.call("GET", "/api/v1/nodes", Accept=PARTIAL))[:2] == (406, "NotAcceptable")
    assert message(client.call("GET", "/api/v1/nodes/a", Accept=PARTIAL_LIST))[:2] == (406, "NotAcceptable")
    assert client.call("GET", "/api/v1/nodes?watch=1", Accept=PARTIAL_LIST) == (200, b"")
    assert message(client.call("GET", "/api/v1/nodes", Accept="text/html"))[:2] == (406, "NotAcceptable")


def test_the_first_acceptable_form_wins(three, client):
    accept = f"application/vnd.kubernetes.protobuf;as=x, {PARTIAL_LIST}, application/json"
    assert client.get(Accept=accept)["kind"] == "PartialObjectMetadataList"


def test_large_answers_are_compressed_for_those_who_ask(api, client):
    api.create_nodes(20)
    plain = len(client.send("GET", "/api/v1/nodes").read())
    response = client.send("GET", "/api/v1/nodes", Accept_Encoding="gzip")
    assert response.headers["Content-Encoding"] == "gzip" and len(response.read()) < plain / 3


def test_a_connection_serves_several_requests(three, client):
    connection = client.connect()
    for _ in range(3):
        connection.request("GET", "/api/v1/nodes/a", headers=client.headers())
        assert json.loads(connection.getresponse().read())["metadata"]["name"] == "a"
    connection.close()


# ---- watching --------------------------------------------------------------------------------------------------------------


def test_a_watch_begins_after_its_version(three, client):
    version = three.resource_version
    three.patch_node("a", {"metadata": {"annotations": {"x": "1"}}})
    three.delete_node("b")
    watch = client.watch(f"resourceVersion={version}")
    assert watch.events(2) == [("MODIFIED", "a"), ("DELETED", "b")]
    three.create_node("d")
    assert watch.events(1) == [("ADDED", "d")]
    watch.close()


@pytest.mark.parametrize("query", ["", "resourceVersion=0"])
def test_a_watch_without_a_version_begins_with_all_objects(three, client, query):
    watch = client.watch(query)
    assert watch.events(3) == [("ADDED", "a"), ("ADDED", "b"), ("ADDED", "c")]
    watch.close()


def test_a_deleted_object_has_the_version_of_its_deletion(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}")
    three.delete_node("a")
    assert watch.next()["object"]["metadata"]["resourceVersion"] == three.resource_version
    watch.close()


def test_a_watch_ends_cleanly_after_its_time_and_before_with_a_bookmark_for_those_who_ask(three, client):
    query = f"resourceVersion={three.resource_version}&timeoutSeconds=3"
    whole, partial, plain = (client.watch(query + more, Accept=form) for more, form in (
        ("&allowWatchBookmarks=true", "application/json"), ("&allowWatchBookmarks=true", PARTIAL), ("", "application/json")))
    three.create_node("d")
    version = [watch.next()["object"]["metadata"]["resourceVersion"] for watch in (whole, partial, plain)][0]
    bookmark, short = whole.next(), partial.next()
    assert (bookmark["type"], bookmark["object"]["kind"], bookmark["object"]["spec"]) == ("BOOKMARK", "Node", {})
    assert bookmark["object"]["metadata"] == {"resourceVersion": version, "creationTimestamp": None}
    assert short["object"] == {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": bookmark["object"]["metadata"]}
    for watch, last in ((whole, bookmark), (partial, short), (plain, None)):  # a real server may say its last bookmark once more
        assert [event for event in iter(watch.next, None) if event != last] == []


def test_a_bookmark_does_not_repeat_the_version_that_a_watch_began_with(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}&timeoutSeconds=3&allowWatchBookmarks=true")
    assert watch.next() is None


def test_bookmarks_come_regularly_and_when_the_test_says_so(three, client):
    three.bookmark_s = 0.05
    watch = client.watch(f"resourceVersion={three.resource_version}&allowWatchBookmarks=true")
    three.send_bookmarks()
    assert watch.next()["type"] == "BOOKMARK"
    three.bump()
    three.create_node("d")
    assert [watch.next()["type"] for _ in range(3)] == ["ADDED", "BOOKMARK", "BOOKMARK"]
    watch.close()


def test_a_watch_by_metadata_has_no_spec(three, client):
    watch = client.watch("resourceVersion=0", Accept=PARTIAL)
    assert [set(watch.next()["object"]) for _ in range(3)] == [{"kind", "apiVersion", "metadata"}] * 3
    watch.close()


def test_a_watch_of_one_name_sees_no_other(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}&fieldSelector=metadata.name%3Db")
    three.patch_node("a", {"metadata": {"annotations": {"x": "1"}}})
    three.patch_node("b", {"metadata": {"annotations": {"x": "1"}}})
    assert watch.events(1) == [("MODIFIED", "b")]
    watch.close()


def test_a_version_before_the_compaction_gets_an_error_event(three, client):
    version = three.resource_version
    three.create_node("d")
    three.compact()
    watch = client.watch(f"resourceVersion={version}")
    event = watch.next()
    assert (watch.status, event["type"], event["object"]["code"], event["object"]["reason"]) == (200, "ERROR", 410, "Expired")
    assert event["object"]["message"] == f"too old resource version: {version} ({three.resource_version})"
    assert watch.next() is None


def test_compaction_can_be_told_by_http_status(three, client):
    version = three.resource_version
    three.create_node("d")
    three.compact()
    three.gone_as_http = True
    assert message(client.call("GET", f"/api/v1/nodes?watch=1&resourceVersion={version}"))[:2] == (410, "Expired")


def test_an_open_watch_outlives_a_compaction(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}")
    three.create_node("d")
    three.compact()
    three.create_node("e")
    assert watch.events(2) == [("ADDED", "d"), ("ADDED", "e")]
    watch.close()


def test_a_watch_that_its_client_closes_is_gone_at_once(three, client):
    watch = client.watch()
    wait_until(lambda: three.watches(AGENT) == 1)
    watch.close()
    wait_until(lambda: three.watches() == 0)


# ---- writing ---------------------------------------------------------------------------------------------------------------


def test_nodes_leaves_status_alone(three, client):
    client.patch("a", {"metadata": {"annotations": {"x": "1"}}, "status": {"phase": "Running"}})
    assert three.node("a")["metadata"]["annotations"] == {"x": "1"}
    assert "phase" not in three.node("a")["status"]


def test_nodes_status_leaves_spec_alone_but_changes_annotations(three, client):
    client.patch("a", {"metadata": {"annotations": {"x": "1"}}, "spec": {"unschedulable": True}, "status": {"phase": "Running"}}, "status")
    node = three.node("a")
    assert node["metadata"]["annotations"] == {"x": "1"} and node["status"]["phase"] == "Running"
    assert "unschedulable" not in node["spec"]


def test_conditions_merge_by_type_in_a_strategic_patch(api, client):
    api.create_node(realistic_node("n1", 1))
    before = {row["type"]: row for row in api.node("n1")["status"]["conditions"]}
    row = {"type": "NetworkUnavailable", "status": "True", "reason": "TunnelDown"}
    node = client.patch("n1", {"status": {"conditions": [row]}}, "status", STRATEGIC)
    after = {row["type"]: row for row in node["status"]["conditions"]}
    assert after == {**before, "NetworkUnavailable": {**before["NetworkUnavailable"], **row}}
    assert list(after) == list(before)


def test_conditions_are_replaced_in_a_merge_patch_and_absent_times_are_null(api, client):
    api.create_node(realistic_node("n1", 1))
    row = {"type": "NetworkUnavailable", "status": "True"}
    whole = {**row, "lastHeartbeatTime": None, "lastTransitionTime": None}
    assert client.patch("n1", {"status": {"conditions": [row]}}, "status", MERGE)["status"]["conditions"] == [whole]


def test_a_condition_that_is_new_stands_first(api, client):
    api.create_node(realistic_node("n1", 1))
    before = [row["type"] for row in api.node("n1")["status"]["conditions"]]
    node = client.patch("n1", {"status": {"conditions": [{"type": "New", "status": "True"}]}}, "status", STRATEGIC)
    assert [row["type"] for row in node["status"]["conditions"]] == ["New", *before]


def test_times_are_kept_in_whole_seconds_of_utc(three, client):
    row = {"type": "NetworkUnavailable", "status": "True", "lastTransitionTime": "2024-05-01T10:00:00.9+02:00"}
    node = client.patch("a", {"status": {"conditions": [row]}}, "status", STRATEGIC)
    assert node["status"]["conditions"][0]["lastTransitionTime"] == "2024-05-01T08:00:00Z"


def test_a_condition_without_its_type_is_an_internal_error(three, client):
    client.patch("a", {"status": {"conditions": [{"type": "Ready", "status": "1"}]}}, "status", STRATEGIC)
    status = client.patch("a", {"status": {"conditions": [{"status": "1"}]}}, "status", STRATEGIC, code=500)
    assert status["message"] == "map: map[status:1] does not contain declared merge key: type"


def test_a_json_patch_with_a_failing_test_changes_nothing(three, client):
    patch = [{"op": "test", "path": "/metadata/name", "value": "b"}, {"op": "add", "path": "/metadata/annotations", "value": {"x": "1"}}]
    answer = client.call("PATCH", "/api/v1/nodes/a", patch, Content_Type=JSON_PATCH)
    assert message(answer) == (422, "Invalid", "the server rejected our request due to an error in our request")
    patch[0]["value"] = "a"
    assert client.patch("a", patch, kind=JSON_PATCH)["metadata"]["annotations"] == {"x": "1"}


def test_an_unknown_kind_of_patch_is_refused(three, client):
    assert message(client.call("PATCH", "/api/v1/nodes/a", {}, Content_Type="application/json"))[:2] == (415, "UnsupportedMediaType")


def test_a_version_in_a_write_is_a_precondition(three, client):
    old = three.node("a")
    three.patch_node("a", {"metadata": {"annotations": {"x": "1"}}})
    stale = {"metadata": {"resourceVersion": old["metadata"]["resourceVersion"], "annotations": {"y": "2"}}}
    text = ('Operation cannot be fulfilled on nodes "a": the object has been modified; please apply your changes to the latest version '
            "and try again")
    assert message((409, client.patch("a", stale, code=409))) == (409, "Conflict", text)
    assert message(client.call("PUT", "/api/v1/nodes/a", old)) == (409, "Conflict", text)
    stale["metadata"]["resourceVersion"] = three.node("a")["metadata"]["resourceVersion"]
    client.patch("a", stale)


def test_a_write_that_changes_nothing_makes_no_version_and_no_event(three, client):
    version = three.resource_version
    watch = client.watch(f"resourceVersion={version}")
    node = client.patch("a", {"metadata": {"annotations": {"x": "1"}}})
    again = client.patch("a", {"metadata": {"annotations": {"x": "1"}}})
    assert again == node and int(three.resource_version) == int(version) + 1
    three.delete_node("c")
    assert watch.events(2) == [("MODIFIED", "a"), ("DELETED", "c")]
    watch.close()


def test_a_dry_run_answers_and_changes_nothing(three, client):
    before, changes = three.node("a"), three.changes
    node = client.patch("a", {"metadata": {"annotations": {"x": "1"}}}, query="?dryRun=All")
    assert node["metadata"]["annotations"] == {"x": "1"}
    assert node["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    assert client.call("DELETE", "/api/v1/nodes/a?dryRun=All")[0] == 200
    assert client.call("POST", "/api/v1/nodes?dryRun=All", {"metadata": {"name": "d"}})[0] == 201
    assert (three.node("a"), three.node("d"), three.changes) == (before, None, changes)
    assert message((422, client.patch("a", {}, query="?dryRun=some", code=422)))[2] == (
        'PatchOptions.meta.k8s.io "" is invalid: dryRun: Unsupported value: []string{"some"}: supported values: "All"')


def test_pod_cidrs_go_from_none_to_some_and_no_further(three, client):
    node = client.patch("a", {"spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00::/64"]}}, kind=STRATEGIC)
    assert node["spec"]["podCIDRs"] == ["10.1.0.0/24", "fd00::/64"]
    text = 'Node "a" is invalid: spec.podCIDRs: Forbidden: node updates may not change podCIDR except from "" to valid'
    for spec in ({"podCIDRs": ["10.1.0.0/24"]}, {"podCIDR": "10.2.0.0/24"}, {"podCIDR": None, "podCIDRs": None}):
        assert message((422, client.patch("a", {"spec": spec}, code=422))) == (422, "Invalid", text)


def test_one_of_the_two_fields_is_enough(three, client):
    assert client.patch("a", {"spec": {"podCIDR": "10.1.0.0/24"}})["spec"]["podCIDRs"] == ["10.1.0.0/24"]
    assert client.patch("b", {"spec": {"podCIDRs": ["fd00::/64"]}})["spec"]["podCIDR"] == "fd00::/64"


@pytest.mark.parametrize("cidrs, text", [
    (["10.1.0.0/24", "10.2.0.0/24"], "no more than one CIDR for each IP family"),
    (["10.1.0.1/240"], "must be a valid CIDR value"),
])
def test_pod_cidrs_have_to_be_good(three, client, cidrs, text):
    assert text in client.patch("a", {"spec": {"podCIDRs": cidrs}}, code=422)["message"]


def test_a_new_object_gets_uid_and_creation_time(client):
    code, node = client.call("POST", "/api/v1/nodes", {"metadata": {"name": "n1"}, "status": {"phase": "Running"}})
    assert code == 201 and node["metadata"]["uid"] and node["metadata"]["creationTimestamp"]
    assert node["status"]["phase"] == "Running"      # kubelet registers with its status
    assert node["status"]["nodeInfo"]["kubeletVersion"] == ""
    assert node["spec"]["taints"] == [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]
    again = client.call("POST", "/api/v1/nodes", {"metadata": {"name": "n1"}})
    assert message(again) == (409, "AlreadyExists", 'nodes "n1" already exists')


def test_a_uid_in_a_write_means_that_object_alone(three, client):
    three.delete_node("a")
    three.create_node("a")
    assert message((422, client.patch("a", {"metadata": {"uid": "other"}}, code=422)))[2] == (
        'Node "a" is invalid: metadata.uid: Invalid value: "other": field is immutable')
    put = client.call("PUT", "/api/v1/nodes/a", {"metadata": {"name": "a", "uid": "other"}})
    assert message(put)[:2] == (409, "Conflict") and "Precondition failed: UID in precondition: other" in put[1]["message"]
    gone = client.call("DELETE", "/api/v1/nodes/a", {"preconditions": {"uid": "other"}})
    assert message(gone)[:2] == (409, "Conflict") and "deleted and then recreated" in gone[1]["message"]
    assert gone[1]["message"].startswith('Operation cannot be fulfilled on Node "a": the UID in the precondition (other)')


def test_a_put_does_not_make_a_node(client):
    assert message(client.call("PUT", "/api/v1/nodes/n1", {"metadata": {"name": "n1"}})) == (404, "NotFound", 'nodes "n1" not found')


def test_deletion_answers_with_a_status(three, client):
    uid = three.node("a")["metadata"]["uid"]
    code, status = client.call("DELETE", "/api/v1/nodes/a")
    assert (code, status["status"], status["details"]) == (200, "Success", {"name": "a", "kind": "nodes", "uid": uid})
    assert three.node("a") is None


def test_a_node_with_a_finalizer_stays_until_that_has_gone(three, client):
    client.patch("a", {"metadata": {"finalizers": ["example.com/one"]}})
    watch = client.watch(f"resourceVersion={three.resource_version}")
    for _ in range(2):
        code, node = client.call("DELETE", "/api/v1/nodes/a")
        assert (code, node["kind"]) == (200, "Node") and node["metadata"]["deletionTimestamp"]
    assert "no new finalizers can be added" in client.patch("a", {"metadata": {"finalizers": ["example.com/two"]}}, code=422)["message"]
    client.patch("a", {"metadata": {"finalizers": None}})
    assert watch.events(2) == [("MODIFIED", "a"), ("DELETED", "a")]
    assert three.node("a") is None
    watch.close()


def test_fields_that_no_node_has_are_dropped(three, client):
    assert "podCidr" not in client.patch("a", {"spec": {"podCidr": "10.1.0.0/24"}})["spec"]
    strict = client.patch("a", {"spec": {"podCidr": "10.1.0.0/24"}}, query="?fieldValidation=Strict", code=422)
    assert 'unknown field "spec.podCidr"' in strict["message"]


def test_an_annotation_is_a_string(three, client):
    status = client.patch("a", {"metadata": {"annotations": {"x": {"v": 1}}}}, code=422)
    assert "cannot unmarshal object into Go struct field" in status["message"]


def test_no_object_grows_beyond_the_limit_of_annotations(three, client):
    status = client.patch("a", {"metadata": {"annotations": {"x": "y" * 262144}}}, code=422)
    assert "Too long: must have at most 262144 bytes" in status["message"]


def test_a_method_that_makes_no_sense_is_not_allowed(three, client):
    assert message(client.call("POST", "/api/v1/nodes/a", {}))[:2] == (405, "MethodNotAllowed")


def test_managed_fields_say_who_wrote_what(three, client):
    client.patch("a", {"spec": {"podCIDRs": ["10.1.0.0/24"]}}, query="?fieldManager=mncni-nodeipam")
    client.patch("a", {"status": {"conditions": [{"type": "NetworkUnavailable", "status": "False"}]}}, "status", STRATEGIC)
    entries = {entry["manager"]: entry for entry in three.node("a")["metadata"]["managedFields"]}
    assert entries["mncni-nodeipam"]["fieldsV1"] == {
        "f:spec": {"f:podCIDR": {}, "f:podCIDRs": {".": {}, 'v:"10.1.0.0/24"': {}}}}
    assert entries["mncni-agent"]["subresource"] == "status"
    assert entries["mncni-agent"]["fieldsV1"] == {"f:status": {"f:conditions": {
        ".": {}, 'k:{"type":"NetworkUnavailable"}': {
            ".": {}, "f:lastHeartbeatTime": {}, "f:lastTransitionTime": {}, "f:status": {}, "f:type": {}}}}}


def test_a_field_belongs_to_who_changed_it_last(three, client):
    for manager in ("first", "second"):
        client.patch("a", {"metadata": {"annotations": {"x": manager}}}, query=f"?fieldManager={manager}")
    owners = {entry["manager"]: entry["fieldsV1"] for entry in three.node("a")["metadata"]["managedFields"]}
    assert owners["second"] == {"f:metadata": {"f:annotations": {"f:x": {}}}}
    assert "f:x" not in json.dumps(owners["first"])


def test_an_object_without_managers_never_gets_any(api, client):
    code, node = client.call("POST", "/api/v1/nodes", {"metadata": {"name": "bare"}})
    assert code == 201 and "managedFields" not in node["metadata"]
    assert "managedFields" not in client.patch("bare", {"metadata": {"annotations": {"x": "1"}}})["metadata"]


# ---- leases and events -----------------------------------------------------------------------------------------------------


def lease(holder="one", **meta):
    return {"metadata": {"name": "nodeipam", **meta},
            "spec": {"holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": "2024-05-01T10:00:00.000000Z"}}


def test_a_lease_is_won_by_one_of_two_writers(client):
    code, made = client.call("POST", LEASES, lease())
    assert code == 201
    version = made["metadata"]["resourceVersion"]
    assert client.call("PUT", f"{LEASES}/nodeipam", lease("two", resourceVersion=version))[0] == 200
    late = client.call("PUT", f"{LEASES}/nodeipam", lease("three", resourceVersion=version))
    assert message(late)[:2] == (409, "Conflict")
    assert late[1]["message"].startswith('Operation cannot be fulfilled on leases.coordination.k8s.io "nodeipam"')
    assert client.get(f"{LEASES}/nodeipam")["spec"]["holderIdentity"] == "two"


def test_a_lease_is_not_updated_without_a_version(client):
    client.call("POST", LEASES, lease())
    assert message(client.call("PUT", f"{LEASES}/nodeipam", lease("two"))) == (
        422, "Invalid", 'leases.coordination.k8s.io "nodeipam" is invalid: metadata.resourceVersion: Invalid value: 0x0: must be specified '
                        "for an update")


def test_a_put_makes_a_lease_where_the_user_may_create(api, client):
    api.rbac = [(AGENT, "update", "leases")]
    assert message(client.call("PUT", f"{LEASES}/nodeipam", lease()))[0] == 403
    api.rbac.append((AGENT, "create", "leases"))
    assert client.call("PUT", f"{LEASES}/nodeipam", lease())[0] == 201


def test_times_of_a_lease_have_microseconds(client):
    made = lease()
    made["spec"]["renewTime"] = "2024-05-01T10:00:00Z"
    answer = client.call("POST", LEASES, made)
    assert answer[0] == 400 and 'as "2006-01-02T15:04:05.000000Z07:00"' in answer[1]["message"]


def event(**changes):
    return {"metadata": {"name": "n1.1"}, "involvedObject": {"kind": "Node", "name": "n1"}, "reason": "Quarantined", "message": "bad key",
            "type": "Warning", **changes}


def test_an_event_about_a_node_belongs_into_default(client):
    assert client.call("POST", EVENTS, event())[0] == 201
    elsewhere = client.call("POST", EVENTS.replace("default", "kube-system"), event())
    assert message(elsewhere) == (
        422, "Invalid", 'Event "n1.1" is invalid: involvedObject.namespace: Invalid value: "": does not match event.namespace')
    counted = client.call("PATCH", f"{EVENTS}/n1.1", {"count": 2}, Content_Type=MERGE)[1]
    assert (counted["count"], counted["message"]) == (2, "bad key")
    assert (counted["source"], counted["eventTime"], counted["reportingComponent"]) == ({}, None, "")


def test_a_new_event_says_who_reports_and_when(client):
    new = {"metadata": {"name": "n1.2"}, "regarding": {"kind": "Node", "name": "n1"}, "note": "bad key", "reason": "Quarantined",
           "type": "Warning", "action": "Quarantine", "reportingController": "mncni.dev/agent", "reportingInstance": "n2"}
    assert message(client.call("POST", NEW_EVENTS, new)) == (
        422, "Invalid", 'Event "n1.2" is invalid: eventTime: Required value')
    new.update(metadata={"generateName": "n1-"}, eventTime="2024-05-01T10:00:00.000000Z")
    code, made = client.call("POST", NEW_EVENTS, new)
    assert code == 201 and made["note"] == "bad key" and made["metadata"]["name"].startswith("n1-")
    again = client.call("PATCH", f"{NEW_EVENTS}/{made['metadata']['name']}", {"note": "other"}, Content_Type=MERGE)
    assert "message: Invalid value: \"other\": field is immutable" in again[1]["message"]
    del new["action"]
    assert "action: Required value" in client.call("POST", NEW_EVENTS, new)[1]["message"]
    old_form = client.get(EVENTS)["items"][0]
    assert (old_form["message"], old_form["involvedObject"]) == ("bad key", {"kind": "Node", "name": "n1"})


def test_a_name_to_be_made_up_must_not_end_in_a_dot(client):
    answer = client.call("POST", LEASES, lease(name="", generateName="n1."))
    assert answer[0] == 422 and 'metadata.generateName: Invalid value: "n1.": a lowercase RFC 1123 subdomain' in answer[1]["message"]


def test_a_namespace_has_to_exist(client):
    assert message(client.call("POST", EVENTS.replace("default", "mncni"), event())) == (404, "NotFound", 'namespaces "mncni" not found')


# ---- rights, policies, credentials -----------------------------------------------------------------------------------------


def test_rights_are_per_user_verb_and_resource(three, client):
    three.rbac = [(AGENT, "get", "nodes"), ("system:serviceaccounts", "patch", "nodes/status")]
    client.get("/api/v1/nodes/a")
    client.patch("a", {"metadata": {"annotations": {"x": "1"}}}, "status")
    assert message((403, client.patch("a", {}, code=403))) == (
        403, "Forbidden", f'nodes "a" is forbidden: User "{AGENT}" cannot patch resource "nodes" in API group "" at the cluster scope')
    assert message(client.call("GET", LEASES)) == (
        403, "Forbidden", f'leases.coordination.k8s.io is forbidden: User "{AGENT}" cannot list resource "leases" in API group '
                          '"coordination.k8s.io" in the namespace "kube-system"')


def test_a_right_on_one_name_lets_list_and_watch_that_name(three, client):
    three.rbac = [(AGENT, "*", "nodes", "a")]
    assert len(client.get("/api/v1/nodes?fieldSelector=metadata.name%3Da")["items"]) == 1
    assert client.call("GET", "/api/v1/nodes")[0] == 403
    assert client.call("GET", "/api/v1/nodes?watch=1&fieldSelector=metadata.name%3Db")[0] == 403


def own_node_only(user, operation, old, new):
    """The heart of the agent's admission policy."""
    node = user["extra"].get("authentication.kubernetes.io/node-name", [""])[0]
    if operation == "UPDATE" and user["username"] == AGENT and node != new["metadata"]["name"]:
        return "an agent may change its own node alone"
    return None


def test_a_policy_sees_the_node_of_the_token_and_bites_in_a_dry_run(three):
    three.add_policy(own_node_only, name="mncni-agent", binding="mncni-agent")
    client = Client(three, node="a", pod="mncni-agent-x")
    client.patch("a", {"metadata": {"annotations": {"x": "1"}}}, "status")
    text = ("nodes \"b\" is forbidden: ValidatingAdmissionPolicy 'mncni-agent' with binding 'mncni-agent' denied request: "
            "an agent may change its own node alone")
    for query in ("", "?dryRun=All"):
        assert message((422, client.patch("b", {"metadata": {"annotations": {"x": "1"}}}, query=query, code=422))) == (422, "Invalid", text)
    three.policies.clear()
    client.patch("b", {"metadata": {"annotations": {"x": "1"}}})


def test_a_policy_may_answer_forbidden(three, client):
    three.add_policy(lambda user, operation, old, new: "no", code=403)
    assert message((403, client.patch("a", {"metadata": {"annotations": {"x": "1"}}}, code=403)))[1] == "Forbidden"


def test_a_policy_sees_the_object_as_it_would_be_stored(three, client):
    seen = []
    three.add_policy(lambda user, operation, old, new: seen.append((operation, old, new)))
    client.patch("a", {"status": {"phase": "Running"}})                 # nodes: the status is not changed
    client.call("DELETE", "/api/v1/nodes/a")
    assert seen[0][0] == "UPDATE" and "phase" not in seen[0][2]["status"]
    assert (seen[1][0], seen[1][2]) == ("DELETE", None)


def test_a_client_certificate_is_a_user_with_groups(three):
    user = Client(three, certificate=three.client_certificate("system:node:a", ["system:nodes"]))
    three.rbac = [("system:nodes", "get", "nodes")]
    user.get("/api/v1/nodes/a")
    assert three.count("get", "nodes", user="system:node:a") == 1


def test_old_tokens_are_refused_after_a_change_and_files_have_new_ones(api, tmp_path):
    directory = api.service_account_dir(tmp_path / "sa", AGENT, node="a")
    old = Client(api, token=(tmp_path / "sa/token").read_text())
    old.get()
    api.rotate_tokens()
    assert old.call("GET", "/api/v1/nodes")[0] == 401
    assert sorted(name for name in os.listdir(directory) if not name.startswith("..")) == ["ca.crt", "namespace", "token"]
    assert (tmp_path / "sa/namespace").read_text() == "kube-system"
    Client(api, token=(tmp_path / "sa/token").read_text(), ca_file=tmp_path / "sa/ca.crt").get()


def test_one_token_can_be_revoked(api, client):
    api.revoke(client.token)
    assert client.call("GET", "/api/v1/nodes")[0] == 401


def test_after_a_change_of_the_ca_the_old_file_does_not_do(api, client, tmp_path):
    shutil.copy(api.ca_file, tmp_path / "old.crt")
    api.rotate_ca(publish=False)
    with pytest.raises(ssl.SSLCertVerificationError):
        client.get()
    api.publish_ca()
    Client(api).get()
    with pytest.raises(ssl.SSLCertVerificationError):
        Client(api, ca_file=tmp_path / "old.crt").get()


def test_a_new_certificate_of_the_same_ca_is_believed(api, client):
    api.rotate_certificate()
    client.get()


@pytest.mark.parametrize("certificate", [False, True])
def test_a_kubeconfig_has_all_that_a_client_needs(api, tmp_path, certificate):
    api.kubeconfig(tmp_path / "config", AGENT, certificate=certificate)
    config = json.loads((tmp_path / "config").read_text())
    assert config["clusters"][0]["cluster"]["server"] == api.url
    user = config["users"][0]["user"]
    if certificate:
        client = Client(api, certificate=(user["client-certificate"], user["client-key"]))
    else:
        client = Client(api, token=user["token"])
    client.get()
    assert api.count("list", user=AGENT) == 1


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6 on lo")
@pytest.mark.parametrize("host", ["::1", "::"])
def test_it_listens_on_ipv6_and_its_certificate_says_so(host):
    with ApiServer(host=host) as api:
        assert api.url.startswith("https://[::1]:")
        Client(api).get()


# ---- counters --------------------------------------------------------------------------------------------------------------


def test_counters_tell_requests_apart(three, client):
    other = Client(three, "system:serviceaccount:kube-system:other", user_agent="other/2")
    client.get()
    client.patch("a", {"metadata": {"annotations": {"x": "1"}}}, "status")
    client.patch("a", {}, query="?dryRun=All")
    other.get("/api/v1/nodes/a")
    other.call("GET", "/api/v1/nodes/z")
    assert three.count() == 5 and three.count(user=AGENT) == 3 and three.count(user_agent="other/*") == 2
    assert three.count("patch", "nodes/status") == 1 and three.count(code=404) == 1
    assert three.writes() == 1 and three.count("patch", dry_run=True) == 1 and three.writes("*:other") == 0
    assert three.bytes_sent(AGENT) > 500 and three.bytes_received(AGENT) > 500
    three.reset_counters()
    assert (three.count(), three.bytes_sent()) == (0, 0)


def test_bytes_are_those_of_http(three, client):
    with socket.create_connection(("127.0.0.1", three.port)) as raw, client.tls.wrap_socket(raw, server_hostname="127.0.0.1") as sock:
        request = f"GET /api/v1/nodes HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.token}\r\n\r\n".encode()
        sock.sendall(request)
        received = sock.recv(65536)
        wait_until(lambda: three.bytes_sent() == len(received))
        assert three.bytes_received() == len(request)


# ---- faults ----------------------------------------------------------------------------------------------------------------


def test_a_fault_hits_as_often_as_asked_and_only_what_matches(three, client):
    fault = three.fault("status", times=2, verb="get", name="a", code=503)
    assert [client.call("GET", f"/api/v1/nodes/{name}")[0] for name in "abaa"] == [503, 200, 503, 200]
    assert fault.used == 2


def test_too_many_requests_is_plain_text_with_a_time(three, client):
    three.fault("status", code=429, retry_after=7)
    response = client.send("GET", "/api/v1/nodes")
    assert (response.status, response.headers["Retry-After"]) == (429, "7")
    assert response.read() == b"Too many requests, please try again later."


def test_a_hanging_request_is_never_answered_and_leaves_others_alone(three, client):
    fault = three.fault("hang")
    with pytest.raises(socket.timeout):
        client.send("GET", "/api/v1/nodes", timeout_s=0.2)
    client.get()
    assert fault.used == 1


def test_a_slow_answer_is_late_and_comes_in_pieces(three, client):
    three.fault("slow", delay_s=0.1, chunk=500, pause_s=0.01)
    start = time.monotonic()
    assert len(client.get()["items"]) == 3
    assert time.monotonic() - start > 0.12


@pytest.mark.parametrize("kind, error", [("close", http.client.RemoteDisconnected), ("reset", ConnectionResetError),
                                         ("truncate", http.client.IncompleteRead)])
def test_a_connection_can_break_in_the_middle(three, client, kind, error):
    three.fault(kind)
    with pytest.raises(error):
        client.get()
    client.get()


def test_a_body_can_be_half_a_document(three, client):
    three.fault("bad_json")
    assert isinstance(client.call("GET", "/api/v1/nodes")[1], bytes)


def test_a_list_can_be_empty_or_of_another_kind(three, client):
    three.fault("empty_list")
    assert client.get()["items"] == []
    three.fault("wrong_kind", kind="PodList")
    assert client.get()["kind"] == "PodList"


def test_a_node_can_lack_what_it_should_have(api, client):
    api.create_node(realistic_node("n1", 1))
    three = ["metadata.annotations", "status.addresses", "spec.podCIDR"]
    api.fault("strip", times=2, drop=three)
    for node in (client.get()["items"][0], client.get("/api/v1/nodes/n1")):
        assert "annotations" not in node["metadata"] and "addresses" not in node["status"] and "podCIDR" not in node["spec"]
    assert client.get("/api/v1/nodes/n1")["spec"]["podCIDR"]


def test_a_watch_can_begin_with_an_error_event(three, client):
    three.fault("error_event", verb="watch", code=410)
    watch = client.watch(f"resourceVersion={three.resource_version}")
    assert watch.next()["object"]["code"] == 410 and watch.next() is None


def test_an_open_watch_can_get_an_error_event(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}")
    wait_until(three.watches)
    three.send_error(410)
    assert watch.next()["type"] == "ERROR" and watch.next() is None


def test_a_stream_can_be_cut_in_the_middle_of_an_event(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}")
    three.fault("cut", verb="watch", name="d")
    three.create_node("x")
    three.create_node("d")
    assert watch.events(1) == [("ADDED", "x")]
    with pytest.raises((json.JSONDecodeError, http.client.IncompleteRead)):
        watch.next()


def test_a_stream_can_go_silent(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}", timeout_s=0.3)
    fault = three.fault("stall")
    three.create_node("d")
    fault.wait()
    with pytest.raises(socket.timeout):
        watch.next()
    assert three.watches() == 1
    watch.close()
    wait_until(lambda: three.watches() == 0)


def test_events_can_come_twice_or_in_another_order(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}")
    three.fault("duplicate", name="d")
    three.fault("reorder", name="e")
    for name in "def":
        three.create_node(name)
    assert watch.events(4) == [("ADDED", "d"), ("ADDED", "d"), ("ADDED", "f"), ("ADDED", "e")]
    watch.close()


def test_an_event_can_be_swallowed_by_a_bookmark(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}")
    three.fault("swallow")
    three.create_node("d")
    event = watch.next()
    assert (event["type"], event["object"]["metadata"]["resourceVersion"]) == ("BOOKMARK", three.resource_version)
    watch.close()


def test_an_event_can_be_no_json_and_the_stream_goes_on(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}")
    three.fault("bad_event")
    three.fault("wrong_event", kind="Pod", name="e")
    three.create_node("d")
    with pytest.raises(json.JSONDecodeError):
        watch.next()
    three.create_node("e")
    assert watch.next()["object"]["kind"] == "Pod"
    watch.close()


def test_the_server_can_go_down_and_come_back_on_its_port(three, client):
    watch, url = client.watch(f"resourceVersion={three.resource_version}"), three.url
    wait_until(three.watches)
    three.down()
    assert watch.next() is None
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            client.get()
    three.up()
    client.get()
    assert three.url == url


def test_a_frozen_server_accepts_and_says_nothing(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}", timeout_s=0.3)
    wait_until(three.watches)
    three.freeze()
    three.create_node("d")
    with pytest.raises(socket.timeout):
        watch.next()
    socket.create_connection(("127.0.0.1", three.port)).close()
    with pytest.raises(socket.timeout):
        client.send("GET", "/version", timeout_s=0.2)
    three.thaw()
    client.get()


def test_all_watches_can_be_closed(three, client):
    watch = client.watch(f"resourceVersion={three.resource_version}")
    wait_until(three.watches)
    three.close_watches()
    assert watch.next() is None
    wait_until(lambda: three.watches() == 0)


def test_faults_can_be_cleared(three, client):
    three.fault("status", times=None, code=500)
    assert client.call("GET", "/api/v1/nodes")[0] == 500
    three.clear_faults()
    client.get()
    with pytest.raises(ValueError, match="no fault 'nonsense'"):
        three.fault("nonsense")


# ---- patches as functions --------------------------------------------------------------------------------------------------


def test_a_merge_patch_is_rfc_7386():
    assert merge_patch({"a": "b", "c": {"d": "e", "f": "g"}}, {"a": "z", "c": {"f": None}}) == {"a": "z", "c": {"d": "e"}}
    assert merge_patch({"a": [1, 2]}, {"a": [3]}) == {"a": [3]}
    assert merge_patch({"a": "b"}, ["c"]) == ["c"]


@pytest.mark.parametrize("operations, expected", [
    ([{"op": "add", "path": "/a/-", "value": 3}], {"a": [1, 2, 3], "b": {"c~/": 1}}),
    ([{"op": "add", "path": "/a/0", "value": 0}], {"a": [0, 1, 2], "b": {"c~/": 1}}),
    ([{"op": "remove", "path": "/b/c~0~1"}], {"a": [1, 2], "b": {}}),
    ([{"op": "move", "from": "/a/0", "path": "/b/d"}], {"a": [2], "b": {"c~/": 1, "d": 1}}),
    ([{"op": "copy", "from": "/b", "path": "/e"}], {"a": [1, 2], "b": {"c~/": 1}, "e": {"c~/": 1}}),
    ([{"op": "replace", "path": "", "value": {"x": 1}}], {"x": 1}),
])
def test_a_json_patch_is_rfc_6902(operations, expected):
    assert json_patch({"a": [1, 2], "b": {"c~/": 1}}, operations) == expected


@pytest.mark.parametrize("operation", [
    {"op": "remove", "path": "/none"}, {"op": "replace", "path": "/none", "value": 1}, {"op": "add", "path": "/no/ne", "value": 1},
    {"op": "test", "path": "/a", "value": 2}, {"op": "add", "path": "/list/7", "value": 1}, {"op": "frobnicate", "path": "/a"},
])
def test_a_json_patch_that_does_not_apply_is_an_error(operation):
    with pytest.raises(ApiError):
        json_patch({"a": 1, "list": []}, [operation])


def test_directives_of_a_strategic_merge():
    node = {"status": {"conditions": [{"type": "A", "status": "1"}, {"type": "B", "status": "1"}]}, "spec": {"podCIDRs": ["x"]},
            "metadata": {"finalizers": ["f", "g"], "annotations": {"a": "1"}}}
    patch = {"status": {"conditions": [{"type": "A", "$patch": "delete"}, {"type": "C", "status": "2"}],
                        "$setElementOrder/conditions": [{"type": "C"}, {"type": "B"}]},
             "spec": {"podCIDRs": ["y"]}, "metadata": {"$deleteFromPrimitiveList/finalizers": ["f"], "annotations": {"a": None}}}
    assert strategic_merge(node, patch) == {
        "status": {"conditions": [{"type": "C", "status": "2"}, {"type": "B", "status": "1"}]}, "spec": {"podCIDRs": ["y", "x"]},
        "metadata": {"finalizers": ["g"], "annotations": {}}}
    assert strategic_merge(node, {"spec": {"$patch": "replace", "podCIDR": "z"}})["spec"] == {"podCIDR": "z"}
    with pytest.raises(ApiError, match="does not contain declared merge key: type"):
        strategic_merge(node, {"status": {"conditions": [{"status": "1"}]}})


# ---- size and speed, a process of its own ----------------------------------------------------------------------------------


def test_a_realistic_node_is_about_13_kb():
    node = realistic_node("node-17", 17)
    assert 11_000 < len(json.dumps(node, separators=(",", ":"))) < 15_000
    other = realistic_node("node-18", 18)
    for path in (("metadata", "uid"), ("spec", "podCIDR"), ("status", "addresses"), ("metadata", "managedFields")):
        assert node[path[0]][path[1]] != other[path[0]][path[1]]


def test_a_hundred_watches_see_every_event(api, client):
    api.create_node("a")
    watches = [client.watch(f"resourceVersion={api.resource_version}") for _ in range(100)]
    writers = [threading.Thread(target=api.patch_node, args=("a", {"metadata": {"annotations": {f"k{n}": "1"}}})) for n in range(10)]
    for writer in writers:
        writer.start()
    for watch in watches:
        versions = [int(watch.next()["object"]["metadata"]["resourceVersion"]) for _ in range(10)]
        assert versions == sorted(set(versions))
    for watch in watches:
        watch.close()
    wait_until(lambda: api.watches() == 0)


def test_it_runs_as_a_process_that_ends_with_its_test(tmp_path):
    with ApiProcess(tmp_path / "api", nodes=3) as process:
        assert len(process.call("nodes")) == 3
        fault = process.call("fault", "status", code=503)
        client = Client(process, token=process.call("token", AGENT, node="node-1"))
        assert client.call("GET", "/api/v1/nodes")[0] == 503
        assert len(client.get()["items"]) == 3
        assert process.call("fault_used", fault) == 1 and process.call("count", "list") == 2
        process.call("set", "rbac", [])
        assert client.call("GET", "/api/v1/nodes")[0] == 403
        with pytest.raises(RuntimeError, match="no method 'stop'"):
            process.call("stop")
        process.process.stdin.close()                # what happens when the test dies
        assert process.process.wait(10) == 0
