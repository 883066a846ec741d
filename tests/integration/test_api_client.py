"""kube.py's client of the Kubernetes API, against a server that lies, stalls, breaks off and changes its certificates."""

import contextlib
import json
import os
import re
import stat
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import kube
import mncni
from tests.apiserver import ApiServer

USER = "system:serviceaccount:kube-system:mncni-agent"


@pytest.fixture
def server():
    with ApiServer() as server:
        yield server


@pytest.fixture
def client(server, tmp_path):
    """A client with the agent's kubeconfig and little patience."""
    return client_of(server, tmp_path)


def client_of(server, tmp_path, **options):
    client = kube.open_api(server.kubeconfig(tmp_path / "kubeconfig", USER, **options), {}, None)
    client.READ_S = client.SILENCE_S = 1
    return client


def refused(act, *arguments, **options):
    with pytest.raises(kube.ApiError) as caught:
        result = act(*arguments, **options)
        list(result) if not isinstance(result, (dict, tuple)) else None
    return caught.value


def names(items):
    return [item["metadata"]["name"] for item in items]


# ---- requests ----


def test_a_patch_is_answered_with_the_object_and_counted_under_the_agents_name(server, client):
    server.create_node("n1")
    body = {"metadata": {"annotations": {"mncni.dev/node": "x"}}}
    answer = client.request("PATCH", "/api/v1/nodes/n1", body, content_type=kube.MERGE_PATCH)
    assert answer["metadata"]["annotations"] == {"mncni.dev/node": "x"}
    assert server.count("patch", "nodes", USER, f"mncni/{mncni.PROGRAM_VERSION}") == 1


def test_requests_share_a_connection_and_survive_its_end(server, client):
    server.create_node("n1")
    for _ in range(3):
        client.request("GET", "/api/v1/nodes/n1")
    ((_, kept),) = client.idle
    kept.sock.shutdown(2)  # as a server that has lost patience
    assert client.request("GET", "/api/v1/nodes/n1")["metadata"]["name"] == "n1"


def test_a_write_on_a_connection_that_proves_dead_is_not_said_twice(server, client):
    server.create_node("n1")
    client.request("GET", "/api/v1/nodes/n1")
    server.fault("close", verb="patch")
    body = {"metadata": {"annotations": {"a": "b"}}}
    assert refused(client.request, "PATCH", "/api/v1/nodes/n1", body, content_type=kube.MERGE_PATCH).status == 0
    assert server.count("patch") == 1


REFUSALS = [(409, "Conflict"), (410, "Expired"), (429, "Too Many Requests"), (500, "InternalError"), (503, "ServiceUnavailable")]


@pytest.mark.parametrize("code, reason", REFUSALS)
def test_a_refusal_has_the_servers_status_reason_and_words(server, client, code, reason):
    server.fault("status", code=code, retry_after=7)
    error = refused(client.request, "GET", "/api/v1/nodes")
    assert (error.status, error.reason, error.retry_after_s) == (code, reason, 7)
    assert "GET /api/v1/nodes" in str(error)


def test_a_403_names_the_verb_and_the_resource_that_are_missing(server, client):
    server.create_node("n1")
    server.rbac = []
    error = refused(client.request, "PATCH", "/api/v1/nodes/n1/status", {}, content_type=kube.MERGE_PATCH)
    assert error.status == 403 and 'cannot patch resource "nodes/status"' in str(error)


@pytest.mark.parametrize("kind, options", [("reset", {}), ("close", {}), ("truncate", {}), ("bad_json", {}), ("hang", {})])
def test_half_an_answer_is_an_error_and_no_answer(server, client, kind, options):
    server.create_nodes(3)
    fault = server.fault(kind, times=None, **options)
    error = refused(client.request, "GET", "/api/v1/nodes")
    assert error.status == 0 and "/api/v1/nodes" in str(error)
    fault.cancel()
    assert len(client.list("/api/v1/nodes")[0]) == 3


def test_a_slow_answer_in_pieces_is_waited_for(server, client):
    server.create_nodes(1)
    server.fault("slow", delay_s=0.5, chunk=4096, pause_s=0.05)
    assert len(client.list("/api/v1/nodes")[0]) == 1


def test_a_server_that_is_away_is_status_0_and_named(server, client):
    server.down()
    error = refused(client.request, "GET", "/api/v1/nodes")
    assert error.status == 0 and server.url in str(error)
    server.up()
    client.request("GET", "/api/v1/nodes")


def test_a_server_that_accepts_and_never_answers_costs_a_timeout(server, client):
    client.CONNECT_S = 0.5
    server.freeze()
    assert refused(client.request, "GET", "/api/v1/nodes").status == 0
    server.thaw()
    client.request("GET", "/api/v1/nodes")


# ---- lists ----


def test_a_list_comes_in_pages_and_keeps_what_take_returns(server, client):
    server.create_nodes(1203)
    items, version = client.list("/api/v1/nodes", accept=kube.METADATA_LIST, take=lambda item: item["metadata"]["name"])
    assert sorted(items) == sorted(f"node-{index}" for index in range(1203))
    assert version == str(server.resource_version) and server.count("list", "nodes") == 3


def test_metadata_alone_is_a_fraction_of_the_whole(server, client):
    server.create_nodes(20)
    sizes = [0]
    for accept in (kube.JSON, kube.METADATA_LIST):
        client.list("/api/v1/nodes", accept=accept)
        sizes.append(client.counts.figures["mncni_api_received_bytes_total", ()] - sum(sizes))
    assert 0 < sizes[2] < sizes[1] / 2


def test_a_list_that_expires_in_the_middle_is_a_410(server, client):
    server.create_nodes(600)
    assert refused(client.list, "/api/v1/nodes", take=lambda item: server.fault("status", code=410)).status == 410


def test_a_list_of_another_kind_is_no_list(server, client):
    server.create_nodes(3)
    server.fault("wrong_kind")
    assert "cannot understand" in str(refused(client.list, "/api/v1/nodes"))


# ---- watches ----


def watch(client, server, **options):
    return client.watch("/api/v1/nodes", str(server.resource_version), **options)


def test_a_watch_tells_what_changes_in_order_until_the_server_ends_it(server, client):
    server.create_node("n1")
    events = watch(client, server)
    server.create_node("n2")
    server.patch_node("n2", {"metadata": {"labels": {"a": "b"}}})
    server.delete_node("n2")
    found = [next(events) for _ in range(3)]
    server.send_bookmarks()
    found.append(next(events))
    server.close_watches()
    assert list(events) == []
    assert [kind for kind, _ in found] == ["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]


@pytest.mark.parametrize("kind", ["cut", "bad_event", "wrong_event", "stall"])
def test_a_watch_that_breaks_off_is_an_error(server, client, kind):
    events = watch(client, server)
    server.fault(kind)
    server.create_node("n1")
    assert refused(list, events).status == 0


def test_a_silent_watch_is_dead_after_a_while(server, client):
    begin = time.monotonic()
    assert refused(watch, client, server).status == 0
    assert 0.9 < time.monotonic() - begin < 10


@pytest.mark.parametrize("as_http", [True, False])
def test_a_version_that_has_expired_is_a_410(server, client, as_http):
    server.gone_as_http = as_http
    server.create_nodes(3)
    server.compact()
    assert refused(client.watch, "/api/v1/nodes", "1").status == 410


def test_an_error_in_the_stream_has_its_own_code(server, client):
    events = watch(client, server)
    server.send_error(code=500)
    assert refused(list, events).status == 500


# ---- credentials ----


def test_in_a_pod_the_service_account_is_used(server, tmp_path):
    directory = server.service_account_dir(tmp_path / "account", USER)
    host, port = server.url.rpartition("/")[2].split(":")
    client = kube.Api(kube.in_cluster({"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}, str(directory)))
    client.request("GET", "/api/v1/nodes")
    server.rotate_tokens()
    server.rotate_ca()
    client.request("GET", "/api/v1/nodes")
    assert server.count("list", user=USER, code=200) == 2


def test_a_token_renewed_while_a_request_was_under_way_is_used_at_once(server, tmp_path):
    token = tmp_path / "token"
    token.write_text("old")
    client = kube.Api({"server": server.url, "certificate-authority": str(server.ca_file), "tokenFile": str(token)})
    fault = server.fault("slow", delay_s=1)
    waiting = threading.Timer(0.1, lambda: (fault.wait(), token.write_text(server.token(USER))))
    waiting.start()
    client.request("GET", "/api/v1/nodes")
    waiting.join()
    assert [row["code"] for row in server.log] == [401, 200]


def test_a_client_certificate_in_a_kubeconfig_is_on_no_disk(server, tmp_path):
    client = client_of(server, tmp_path, certificate=True)
    before = set(Path("/tmp").iterdir())
    client.request("GET", "/api/v1/nodes")
    assert server.count("list", user=USER) == 1
    for path in set(Path("/tmp").iterdir()) - before:
        with contextlib.suppress(OSError):  # a directory, or another test's file that is gone
            assert client._part("client-key") not in path.read_bytes()


def test_a_server_of_another_ca_is_refused_before_the_token_is_told(server, tmp_path):
    host, port = server.url.rpartition("/")[2].split(":")
    environ = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    client = kube.Api(kube.in_cluster(environ, str(server.service_account_dir(tmp_path / "account", USER))))
    server.rotate_ca(publish=False)
    assert "certificate" in str(refused(client.request, "GET", "/api/v1/nodes"))
    assert server.count() == 0
    server.publish_ca()
    client.request("GET", "/api/v1/nodes")


def test_an_address_that_does_not_answer_is_passed_over(server, tmp_path):
    client = client_of(server, tmp_path)
    client = kube.Api({**client.access, "server": f"https://127.0.0.1:1,{server.url}"})
    for _ in range(2):
        client.request("GET", "/api/v1/nodes")
    assert client.servers[0] == server.url


def test_an_ipv6_address_is_an_address(tmp_path):
    with ApiServer(host="::1") as server:
        client_of(server, tmp_path).request("GET", "/api/v1/nodes")
        directory = server.service_account_dir(tmp_path / "account", USER)
        environ = {"KUBERNETES_SERVICE_HOST": "::1", "KUBERNETES_SERVICE_PORT": server.url.rpartition(":")[2]}
        kube.Api(kube.in_cluster(environ, str(directory))).request("GET", "/api/v1/nodes")


# ---- kubeconfigs ----

CLUSTER = {"server": "https://192.0.2.1:6443", "certificate-authority": "ca.crt"}


BAD_SERVERS = [
    *("192.0.2.1", "192.0.2.1:6443", "ftp://192.0.2.1", "https://", "", "https://192.0.2.1:6443\n", "https://a b", "https://192.0.2.1:0"),
    *("https://user:SeCrEt@192.0.2.1", "https://192.0.2.1/?x=SeCrEt", "https://192.0.2.1#x", "https://192.0.2.1,http//192.0.2.2"),
]


def write_kubeconfig(path, user, cluster=CLUSTER, **changes):
    config = {"clusters": [{"name": "c", "cluster": cluster}], "users": [{"name": "u", "user": user}], "current-context": "x"}
    config = {**config, "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}], **changes}
    path.write_text(json.dumps(config))
    return str(path)


def test_files_of_a_kubeconfig_are_beside_it(tmp_path):
    path = write_kubeconfig(tmp_path / "config", {"tokenFile": "token", "client-key": "/abs/key", "client-certificate": "crt"})
    access = kube.read_kubeconfig(path, None)
    assert access["certificate-authority"] == str(tmp_path / "ca.crt")
    assert (access["tokenFile"], access["client-key"]) == (str(tmp_path / "token"), "/abs/key")


@pytest.mark.parametrize(
    "user, changes, said",
    [
        ({"exec": {"command": "aws"}}, {}, '"exec" is not supported (an object): give a direct server'),
        ({"auth-provider": {"name": "gcp"}}, {}, '"auth-provider" is not supported'),
        *(({key: "x"}, {}, f'"{key}" is not supported') for key in ("username", "password", "as", "as-uid", "some-later-key")),
        ({"as-groups": ["x"]}, {}, '"as-groups" is not supported'),
        ({"as-user-extra": {"x": ["y"]}}, {}, '"as-user-extra" is not supported'),
        ({"token": 5}, {}, '"token" is not supported (a number)'),
        ({"client-key-data": "eA=="}, {}, "a client certificate and its key go together"),
        ({"client-certificate": "crt"}, {}, "a client certificate and its key go together"),
        ({"token": "t"}, {"current-context": "y"}, '0 contexts with the name "y"; set current-context'),
        ({"token": "t"}, {"current-context": None}, "0 contexts with the name null; set current-context"),
        ({"token": "t"}, {"current-context": ["x"]}, "0 contexts with the name"),
        ({"token": "t"}, {"contexts": None}, '0 contexts with the name "x"'),
        ({"token": "t"}, {"contexts": [{"name": "x", "context": {"cluster": "c", "user": "gone"}}]}, '0 users with the name "gone"'),
        ({"token": "t"}, {"contexts": [{"name": "x", "context": {"cluster": "gone"}}]}, '0 clusters with the name "gone"'),
        ({"token": "t"}, {"contexts": [{"name": "x", "context": None}]}, "0 clusters with the name null"),
        ({"token": "t"}, {"users": [{"name": "u", "user": {}}] * 2}, '2 users with the name "u"'),
        ({"token": "t"}, {"contexts": 5}, "TypeError"),
        ({"token": "t"}, {"cluster": {**CLUSTER, "proxy-url": "http://192.0.2.9:3128"}}, '"proxy-url" is not supported'),
        ({"token": "t"}, {"cluster": {**CLUSTER, "insecure-skip-tls-verify": "false"}}, "is not supported (a string)"),
        ({"token": "t"}, {"cluster": {**CLUSTER, "certificate-authority-data": "!!!!"}}, '"certificate-authority-data" is no base64'),
        *(({"token": "t"}, {"cluster": {"server": server}}, "no http(s):// address") for server in BAD_SERVERS),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_says_why(tmp_path, user, changes, said):
    path = write_kubeconfig(tmp_path / "config", user, **changes)
    with pytest.raises(mncni.CNIError) as caught:
        kube.read_kubeconfig(path, None)
    assert said in str(caught.value) and path in str(caught.value) and caught.value.code == 7
    assert "SeCrEt@" not in str(caught.value) and ":SeCrEt" not in str(caught.value)


@pytest.mark.parametrize("port", ["https://192.0.2.1:x", "https://192.0.2.1:99999", "https://[::1"])
def test_a_server_address_that_python_cannot_read_is_refused_with_what_it_says(tmp_path, port):
    with pytest.raises(mncni.CNIError, match="Port|port|IPv6") as caught:
        kube.read_kubeconfig(write_kubeconfig(tmp_path / "config", {"token": "t"}, {"server": port}), None)
    assert caught.value.code == 7


@pytest.mark.parametrize(
    "server", ["http://localhost", "https://[2001:db8::1]:6443/k8s/clusters/c-1", "HTTPS://api.example", "https://192.0.2.1,https://192.0.2.2:1"]
)
def test_keys_that_change_nothing_are_ignored_and_these_servers_are_fine(tmp_path, server):
    cluster = {"server": server, "disable-compression": True, "extensions": [{"name": "x"}], "proxy-url": ""}
    user = {"token": "t", "username": "", "exec": None, "as-groups": []}
    contexts = [{"name": name, "context": {"cluster": "c", "user": "u", "namespace": "n", "extensions": []}} for name in ("w", "x", "y")]
    access = kube.read_kubeconfig(write_kubeconfig(tmp_path / "config", user, cluster, contexts=contexts), None)
    assert access == {"server": server, "token": "t"}


def test_the_name_that_the_servers_certificate_is_for_can_be_given(server, tmp_path):
    """And a certificate for another name is refused. The server's certificate is for 127.0.0.1 and localhost."""
    access = {"server": server.url, "certificate-authority": str(server.ca_file), "token": server.token(USER)}
    kube.Api({**access, "tls-server-name": "localhost"}).request("GET", "/api/v1/nodes")
    error = refused(kube.Api({**access, "tls-server-name": "elsewhere.example"}).request, "GET", "/api/v1/nodes")
    assert error.status == 0 and "elsewhere.example" in str(error)


def test_a_proxy_in_the_environment_is_not_used(server, tmp_path, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    client_of(server, tmp_path).request("GET", "/api/v1/nodes")


@pytest.mark.parametrize("token", ["SeCrEt\r\nX-Evil: 1", "SeCrEt\u00e9", "Se\x00CrEt"])
def test_a_token_that_is_none_is_quoted_in_no_error(server, tmp_path, token):
    client = kube.Api({"server": server.url, "certificate-authority": str(server.ca_file), "token": token})
    error = refused(client.request, "GET", "/api/v1/nodes")
    assert error.status == 0 and "CrEt" not in repr(error) and "characters that no token has" in str(error)


def test_a_line_feed_at_the_end_of_a_token_is_no_part_of_it(server, tmp_path):
    access = {"server": server.url, "certificate-authority": str(server.ca_file), "token": server.token(USER) + "\n"}
    kube.Api(access).request("GET", "/api/v1/nodes")


def test_an_event_about_a_node_with_the_longest_name_has_a_name_that_fits():
    sent = []
    api = SimpleNamespace(request=lambda method, path, body: sent.append(body["metadata"]["name"]))
    for name in ("n1", "a" * 253, "a" * 252 + "b", "a" * 199 + ".-" + "b" * 52):
        kube.send_event(api, name, name, "it is long", reason="Test")
    assert len(set(sent)) == 4 and sent[0].startswith("n1.")
    for name in sent:
        assert len(name) <= 253 and all(re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", label) for label in name.split(".")), name


def test_no_kubeconfig_and_no_pod_are_told(tmp_path):
    with pytest.raises(mncni.CNIError, match="there is no kubeconfig"):
        kube.read_kubeconfig(str(tmp_path / "none"), None)
    with pytest.raises(mncni.CNIError, match="give --kubeconfig"):
        kube.in_cluster({})


def test_yaml_is_read_through_kubectl_and_without_it_the_way_out_is_told(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    path = tmp_path / "config"
    path.write_text("apiVersion: v1\nkind: Config\n")
    monkeypatch.setattr(mncni, "search_path", lambda environ: str(tmp_path / "bin"))
    with pytest.raises(mncni.CNIError, match="kubectl config view --raw --minify -o json"):
        kube.read_kubeconfig(str(path), None)
    kubectl = tmp_path / "bin" / "kubectl"
    source = write_kubeconfig(tmp_path / "json", {"token": "t"})
    kubectl.write_text(f"#!{sys.executable}\nimport sys\nassert sys.argv[1:3] == ['config', 'view']\nprint(open({source!r}).read())\n")
    kubectl.chmod(0o755)
    assert kube.read_kubeconfig(str(path), mncni.make_run(dict(os.environ)))["token"] == "t"
    assert stat.S_IMODE(path.stat().st_mode) & 0o111 == 0


def test_the_token_is_in_no_error(server, tmp_path):
    client = kube.Api({"server": server.url, "certificate-authority": str(server.ca_file), "token": "SeCrEt"})
    error = refused(client.request, "GET", "/api/v1/nodes")
    assert error.status == 401 and "SeCrEt" not in repr(error)
