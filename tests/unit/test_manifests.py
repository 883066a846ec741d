"""The manifests: they parse and render, fit the API's limits, and agree with each other and with the programs."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

import agent
import kube
import nodeipam
from tests import manifests, policies
from tests.apiserver import ApiServer
from tests.manifests import DEPLOY, ROOT, find, load

pytestmark = pytest.mark.skipif(bool(manifests.yaml_missing()), reason=manifests.yaml_missing())
rendering = pytest.mark.skipif(bool(manifests.kubectl_missing()), reason=manifests.kubectl_missing())

YAML = sorted(str(path.relative_to(ROOT)) for path in [*DEPLOY.glob("*.yaml"), *DEPLOY.glob("*/*.yaml"), ROOT / "kustomization.yaml"]
              if path.parent.name != "cluster")  # where CoreDNS is as kubeadm has it
ANNOTATIONS_LIMIT = 262_144
ROOM = 16_384  # for the programs to grow a little before somebody's `kubectl apply` fails
AGENT_FILES = ("deploy/naivewg/account.yaml", "deploy/naivewg/policy.yaml", "deploy/naivewg/daemonset.yaml")
NODEIPAM_FILES = ("deploy/nodeipam/account.yaml", "deploy/nodeipam/policy.yaml", "deploy/nodeipam/deployment.yaml")


def pod_of(path, kind):
    return find(load(path), kind)["spec"]["template"]["spec"]


# ---- form -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML)
def test_it_parses_and_no_object_is_there_twice(path):
    objects = load(path)
    assert objects
    if path.endswith("kustomization.yaml"):
        assert objects[0]["kind"] == ("Component" if "image" in path else "Kustomization")
        return
    names = [(each["apiVersion"], each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in objects]
    assert len(set(names)) == len(names)


@rendering
def test_the_kustomization_renders_and_every_configmap_that_it_mentions_is_in_it():
    objects = manifests.render()
    there = {each["metadata"]["name"] for each in objects if each["kind"] == "ConfigMap"}
    text = str([each for each in objects if each["kind"] in ("DaemonSet", "Deployment")])
    mentioned = set(re.findall(r"mncni-[a-z]+-[a-z0-9]{10}", text))
    assert len(there) == 5
    assert mentioned == there


@rendering
def test_the_guides_directory_of_ones_own_sets_what_it_says(tmp_path):
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "deploy/README.md").read_text(), re.DOTALL).group(1)
    (tmp_path / "kustomization.yaml").write_text(text.replace("../mncni", os.path.relpath(ROOT, tmp_path)))
    objects = manifests.render(str(tmp_path))
    data = [each["data"] for each in objects if each["metadata"]["name"].startswith("mncni-settings")]
    assert [row["MNCNI_SERVICE_CIDR"] for row in data] == ["10.96.0.0/12"] and data[0]["MNCNI_PORT"] == "28384"
    pods = [each["spec"]["template"]["spec"] for each in objects if each["kind"] in ("DaemonSet", "Deployment")]
    images = {each["image"] for pod in pods for each in [*pod.get("initContainers", []), *pod["containers"]]}
    assert images == {f"registry.corp.example/mncni@sha256:{'0' * 64}"}


@rendering
def test_what_is_applied_fits_into_the_annotation_that_keeps_it(figure):
    sizes = {f"{each['kind']} {each['metadata']['name']}": manifests.applied_size(each) for each in manifests.render()}
    largest = max(sizes, key=sizes.get)
    figure(f"kubectl apply: the largest object is {largest}, {sizes[largest]:,} of {ANNOTATIONS_LIMIT:,} bytes")
    assert sizes[largest] < ANNOTATIONS_LIMIT - ROOM


@rendering
@pytest.mark.parametrize("path", [path for path in YAML if path.count("/") == 1])
def test_kubectl_understands_a_manifest_that_stands_alone(path):
    argv = [manifests.kubectl(), "patch", "--local", "-f", str(ROOT / path), "--type", "merge", "-p", "{}", "-o", "name"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(load(path))


@rendering
def test_the_component_of_the_prebuilt_image_names_it_everywhere_and_makes_the_agents_root_read_only(tmp_path):
    objects = manifests.render_prebuilt(tmp_path / "copy")
    workloads = [each for each in objects if each["kind"] in ("DaemonSet", "Deployment")]
    pods = [each["spec"]["template"]["spec"] for each in workloads]
    containers = [each for pod in pods for each in [*pod.get("initContainers", []), *pod["containers"]]]
    assert {each["image"] for each in containers} == {"registry.example/mncni:1"} and len(containers) == 3
    assert all(each["securityContext"]["readOnlyRootFilesystem"] for each in containers)
    ours, theirs = find(objects, "DaemonSet")["spec"]["template"]["spec"], manifests.prebuilt_agent()
    for pod in (ours, theirs):
        pod["containers"][0]["volumeMounts"].sort(key=lambda mount: mount["name"])
    assert ours["containers"][0]["volumeMounts"] == theirs["containers"][0]["volumeMounts"]
    assert {volume["name"] for volume in ours["volumes"]} == {volume["name"] for volume in theirs["volumes"]}


# ---- names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, kind, user",
    [(AGENT_FILES, "DaemonSet", policies.AGENT), (NODEIPAM_FILES, "Deployment", policies.NODEIPAM)],
    ids=("agent", "nodeipam"),
)
def test_account_rights_policy_and_workload_mean_the_same_account(files, kind, user):
    account, policy, workload = (load(path) for path in files)
    name = user.rpartition(":")[2]
    assert find(account, "ServiceAccount", name, "kube-system")
    assert find(workload, kind, name, "kube-system")["spec"]["template"]["spec"]["serviceAccountName"] == name
    bindings = [each for each in account if each["kind"].endswith("Binding")]
    assert all(each["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": "kube-system"}] for each in bindings)
    conditions = find(policy, "ValidatingAdmissionPolicy", name)["spec"]["matchConditions"]
    assert [each["expression"] for each in conditions] == [f'request.userInfo.username == "{user}"']


@pytest.mark.parametrize("path", [AGENT_FILES[1], NODEIPAM_FILES[1]])
def test_every_policy_is_bound_denies_and_fails_closed(path):
    for policy in (each for each in load(path) if each["kind"] == "ValidatingAdmissionPolicy"):
        name = policy["metadata"]["name"]
        assert find(load(path), "ValidatingAdmissionPolicyBinding", name)["spec"] == {"policyName": name, "validationActions": ["Deny"]}
        assert policy["spec"]["failurePolicy"] == "Fail"
        assert name in policies.HOOKS


def test_the_policies_name_the_record_as_the_agent_does_and_know_how_it_begins():
    text = (DEPLOY / "naivewg/policy.yaml").read_text()
    assert set(re.findall(r"mncni\.dev/\w+", text)) == {agent.RECORD}
    expression = find(load(AGENT_FILES[1]), "ValidatingAdmissionPolicy", "mncni-record")["spec"]["validations"][0]["expression"]
    pieces = re.findall(r'"((?:[^"\\]|\\.)*)"', expression.partition("startsWith(")[2])
    first, comma, middle, last = (piece.replace('\\"', '"') for piece in pieces)
    node = policies.nodes()[0]
    beginning = first + comma.join(node["spec"]["podCIDRs"]) + middle + node["metadata"]["uid"] + last
    assert policies.record(node).startswith(beginning)
    assert policies.record(node)[len(beginning)] == ","


@rendering
def test_the_lease_is_still_the_one_in_what_kustomize_makes_of_it():
    """It takes a resourceName that is the name of a generated ConfigMap for that, and adds its hash."""
    rules = find(manifests.render(), "Role", "mncni-nodeipam", "kube-system")["rules"]
    assert [(rule["resourceNames"], rule["verbs"]) for rule in rules] == [(["mncni-nodeipam"], ["get", "update"])]


def test_the_lease_that_nodeipam_wants_is_the_one_that_it_has_rights_on():
    lease = {row[0]: row[2] for row in nodeipam.FLAGS}["--lease"]
    assert find(load(NODEIPAM_FILES[0]), "Lease", lease.partition("/")[2], "kube-system").keys() == {"apiVersion", "kind", "metadata"}
    role = find(load(NODEIPAM_FILES[0]), "Role", namespace="kube-system")
    assert {f"kube-system/{name}" for rule in role["rules"] for name in rule.get("resourceNames", [])} == {lease}
    assert find(load(NODEIPAM_FILES[2]), "Deployment")["metadata"]["name"] == nodeipam.MANAGER


def test_every_setting_is_a_flag_and_both_programs_accept_them_all():
    flags = {"MNCNI_" + row[0][2:].upper().replace("-", "_") for row in (*agent.FLAGS, *nodeipam.FLAGS)}
    assert set(manifests.settings()) <= flags
    parser = agent.build_parser(manifests.settings())
    assert agent.parse_settings(parser, parser.parse_args(["run", "--node-name", "n1"]), manifests.settings()).cluster_cidrs
    parser = nodeipam.build_parser(manifests.settings())
    assert nodeipam.parse_pools(parser, parser.parse_args([]), manifests.settings())


def test_the_probes_ask_where_the_programs_listen_and_none_of_them_kills():
    flags = {row[0]: row[2] for row in (*agent.FLAGS, *nodeipam.FLAGS)}
    listens = {(AGENT_FILES[2], "DaemonSet"): flags["--listen"], (NODEIPAM_FILES[2], "Deployment"): flags["--listen-nodeipam"]}
    for workload, listen in listens.items():
        container = pod_of(*workload)["containers"][0]
        get = container["readinessProbe"]["httpGet"]
        assert (f"{get['host']}:{get['port']}", get["path"]) == (listen, "/readyz")
        assert not {"livenessProbe", "startupProbe"} & set(container), "whoever keeps the port busy could have it killed"


def test_the_command_of_the_guide_puts_the_digest_into_every_place_that_names_the_image(tmp_path):
    """With a stand-in for docker. The guide's last line shows what has none."""
    (commands,) = re.findall(r"```sh\n(digest=.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docker").write_text('#!/bin/sh\necho "$*" >>asked\necho sha256:$DIGEST\n')
    (tmp_path / "docker").chmod(0o755)

    def run(text, letter):
        environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DIGEST": letter * 64}
        return subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False).stdout

    assert len(run(commands.splitlines()[-1], "").splitlines()) >= 9, "the check shows that there is none yet"
    for letter in "ab":  # the second time it is another one
        assert run(commands, letter) == ""
        texts = [path.read_text() for path in (tmp_path / "deploy").rglob("*") if path.suffix == ".yaml" or path.name == "Dockerfile"]
        images = re.findall(r"(?:image:|FROM) *(\S*python:\S*)", "".join(texts))
        assert set(images) == {f"python:3-slim@sha256:{letter * 64}"} and len(images) >= 9
    assert "buildx imagetools inspect python:3-slim" in (tmp_path / "asked").read_text()


# ---- what containers may do -----------------------------------------------------------------------------------------------

PODS = [
    (path, each["metadata"]["name"], each["spec"]["template"]["spec"])
    for path in YAML
    for each in ([] if manifests.yaml_missing() else load(path))
    if each["kind"] in ("DaemonSet", "Deployment")
]
PRIVILEGED = {("mncni-agent", "agent"), ("mncni-uninstall", "uninstall")}


@pytest.mark.parametrize("path, name, pod", PODS, ids=[name for _, name, _ in PODS])
def test_a_container_that_is_not_privileged_has_what_the_restricted_standard_asks_of_it(path, name, pod):
    """But for the user: some write files of root's on the node."""
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        context = container["securityContext"]
        if (name, container["name"]) in PRIVILEGED:
            assert context["privileged"] is True
            continue
        assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
        assert context["capabilities"]["drop"] == ["ALL"] and len(context["capabilities"].get("add", [])) <= 1
        assert {**pod.get("securityContext", {}), **context}["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("path, name, pod", PODS, ids=[name for _, name, _ in PODS])
def test_only_the_agents_containers_see_where_the_key_is(path, name, pod):
    key_dir = {row[0]: row[2] for row in agent.FLAGS}["--state-dir"]
    paths = [volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume]
    seen = [each for each in paths if os.path.commonpath([each, key_dir]) == each]
    assert bool(seen) == (name in {owner for owner, _ in PRIVILEGED}), seen


# ---- rights ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def api():
    """A double with the rights and the policies of the manifests."""
    with ApiServer() as api:
        api.rbac = manifests.rights(AGENT_FILES[0], NODEIPAM_FILES[0])
        policies.install(api)
        for node in policies.nodes():
            api.create_node(node)
        yield api


def wait_until(is_so, timeout_s=30, why=lambda: ""):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)


def test_the_agent_needs_no_other_rights_and_uses_all_that_it_has(api, tmp_path):
    """But `get nodes`, which who may list them has anyway. Its node has a record of an earlier life."""
    store = agent.KubernetesStore(kube.open_api(api.kubeconfig(tmp_path / "kubeconfig", policies.AGENT, node="n1"), {}, None), "n1")
    store.start()
    wait_until(lambda: store.identity())
    text = policies.record(api.node("n1"), gen=9)
    store.publish("n1", text)
    store.say("it is down")
    store.note("n2", "RecordRefused", "its record is a lie")
    wait_until(lambda: api.node("n1")["metadata"]["annotations"][agent.RECORD] == text)
    wait_until(lambda: any(row["resource"] == agent.SERVICE_CIDRS for row in api.log))
    wait_until(lambda: api.count("create", "events") and api.count("patch", "nodes/status") and api.watches() == 2)
    assert store.guard is True
    store.withdraw("n1")
    refused = [row for row in api.log if row["code"] in (403, 422) and not row["dry_run"]]
    assert refused == []
    used = {(policies.AGENT, row["verb"], row["resource"]) for row in api.log}
    used.remove((policies.AGENT, "get", agent.SERVICE_CIDRS))  # this server does not know the resource, and so not the verb
    rights = {row for row in api.rbac if row[0] == policies.AGENT and row[1] != "get"}
    assert used == rights - {(policies.AGENT, "list", "servicecidrs")} < rights


def test_nodeipam_needs_no_other_rights_and_uses_all_that_it_has(api, tmp_path):
    api.create_node("foreign")
    api.put("leases", find(load(NODEIPAM_FILES[0]), "Lease"))
    config = api.kubeconfig(tmp_path / "kubeconfig", policies.NODEIPAM)
    argv = [sys.executable, str(ROOT / "nodeipam.py"), "--kubeconfig", config, "--cluster-cidr", "10.200.0.0/23"]
    with open(tmp_path / "log", "w+") as log:
        for node in ("n1", "n2"):  # their CIDRs are another allocator's
            api.delete_node(node)
        process = subprocess.Popen(argv, stderr=log, env={"PATH": os.environ["PATH"]})
        try:
            wait_until(lambda: all(api.node(node)["spec"].get("podCIDRs") for node in ("n3", "foreign")))
            api.create_node("late")  # there is no range left: an Event
            wait_until(lambda: api.count("create", "events") and api.count("update", "leases", code=200), why=(tmp_path / "log").read_text)
        finally:
            process.terminate()
            process.wait(20)
        log.seek(0)
        assert [row for row in api.log if row["code"] in (403, 422)] == [], log.read()
    used = {(row["verb"], row["resource"]) for row in api.log}
    assert used == {row[1:3] for row in api.rbac if row[0] == policies.NODEIPAM}
