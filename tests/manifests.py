"""Reads the manifests of deploy/ for tests. YAML is read by PyYAML of the distribution's python3, rendering is kubectl's."""

import copy
import fnmatch
import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import agent

ROOT = Path(agent.__file__).resolve().parent
DEPLOY = ROOT / "deploy"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
BINARIES = Path(os.environ.get("MNCNI_KUBERNETES") or CACHE / "mncni-cluster/bin/apiserver")  # what `make kubernetes` makes
TO_JSON = "import json, sys, yaml; json.dump(list(filter(None, yaml.safe_load_all(sys.stdin.buffer))), sys.stdout)"
KUBECTL_AT_LEAST = 25  # 1.25; Debian 12's 1.20 has a kustomize that reads none of this


def yaml_missing():
    """Why YAML cannot be read, "" if it can."""
    done = subprocess.run(["/usr/bin/python3", "-c", "import yaml"], capture_output=True, check=False)
    return "needs PyYAML: apt-get install python3-yaml" if done.returncode else ""


def parse(text):
    """The objects in a YAML text."""
    done = subprocess.run(["/usr/bin/python3", "-c", TO_JSON], input=text.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@functools.cache
def load(path):
    return parse((ROOT / path).read_text())


def find(objects, kind, name="*", namespace=None):
    """The one object of a kind and a name."""
    found = [each for each in objects if each["kind"] == kind and fnmatch.fnmatchcase(each["metadata"]["name"], name)]
    found = [each for each in found if namespace in (None, each["metadata"].get("namespace"))]
    assert len(found) == 1, f"{kind} {name}: {len(found)}"
    return found[0]


# ---------------------------------------------------------------------------------------------------------------------------
# kubectl
# ---------------------------------------------------------------------------------------------------------------------------
def kubectl():
    """The path of a kubectl, "" without one."""
    built = BINARIES / "kubectl"
    return str(built) if os.access(built, os.X_OK) else shutil.which("kubectl") or ""


def kubectl_missing():
    """Why nothing can be rendered, "" if it can."""
    if not kubectl():
        return "needs kubectl: make kubernetes builds one"
    done = subprocess.run([kubectl(), "version", "--client", "-o", "json"], capture_output=True, text=True, check=False)
    version = json.loads(done.stdout)["clientVersion"]
    minor = int("".join(filter(str.isdigit, version["minor"])))
    return "" if minor >= KUBECTL_AT_LEAST else f"needs a newer kubectl than {version['gitVersion']}: make kubernetes builds one"


@functools.cache
def render(folder="."):
    """The objects of a kustomization."""
    done = subprocess.run([kubectl(), "kustomize", str(ROOT / folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return parse(done.stdout)


def render_prebuilt(directory):
    """The objects of the kustomization with the component that its comment names, made in a copy."""
    shutil.copytree(ROOT, directory, ignore=shutil.ignore_patterns(".*", "tests", "__pycache__"))
    path = directory / "kustomization.yaml"
    path.write_text(path.read_text().replace("# components:\n#   - deploy/image", "components:\n  - deploy/image"))
    return render(str(directory))


def prebuilt_agent():
    """The agent's pod as the component of the prebuilt image changes it; without kubectl, and with names that have no hash."""
    pod = copy.deepcopy(load("deploy/naivewg/daemonset.yaml")[0]["spec"]["template"]["spec"])
    patch = parse(load("deploy/image/kustomization.yaml")[0]["patches"][0]["patch"])[0]["spec"]["template"]["spec"]
    container, more = pod["containers"][0], patch["containers"][0]
    container["securityContext"].update(more["securityContext"])
    container["volumeMounts"] += more["volumeMounts"]
    pod["volumes"] += patch["volumes"]
    return pod


def applied_size(item):
    """Bytes of the annotation in which `kubectl apply` keeps what it applied. Go writes <, > and & in six characters."""
    text = json.dumps(item, separators=(",", ":"), ensure_ascii=False)
    return len(text.encode()) + 5 * sum(text.count(char) for char in "<>&")


# ---------------------------------------------------------------------------------------------------------------------------
# Rights
# ---------------------------------------------------------------------------------------------------------------------------
def rights(*paths):
    """The rows of ApiServer.rbac that these manifests' roles and bindings give."""
    objects = [item for path in paths for item in load(path)]
    rows = []
    for binding in objects:
        if not binding["kind"].endswith("RoleBinding"):
            continue
        kind, name = binding["roleRef"]["kind"], binding["roleRef"]["name"]
        role = find(objects, kind, name, binding["metadata"].get("namespace") if kind == "Role" else None)
        for subject in binding["subjects"]:
            user = f"system:serviceaccount:{subject['namespace']}:{subject['name']}"
            rows += [(user, *row) for rule in role["rules"] for row in rows_of(rule)]
    return rows


def rows_of(rule):
    for verb in rule["verbs"]:
        for resource in rule["resources"]:
            for name in rule.get("resourceNames", [None]):
                yield (verb, resource) if name is None else (verb, resource, name)


# ---------------------------------------------------------------------------------------------------------------------------
# Volumes
# ---------------------------------------------------------------------------------------------------------------------------
def config_files(name):
    """{file name: text} of a ConfigMap that a kustomization generates from files of the repository, or deploy/uninstall.yaml asks for."""
    made = re.search(rf"kubectl create configmap -n kube-system {name}((?: --from-file=\S+)+)", (DEPLOY / "uninstall.yaml").read_text())
    if made:
        return {os.path.basename(path): (ROOT / path).read_text() for path in re.findall(r"=(\S+)", made.group(1))}
    for folder in (".", "deploy/naivewg"):
        for generator in load(f"{folder}/kustomization.yaml")[0].get("configMapGenerator", []):
            if generator["name"] == name:
                return {os.path.basename(path): (ROOT / folder / path).read_text() for path in generator["files"]}
    raise AssertionError(f"nothing generates the ConfigMap {name}")


def settings():
    """{variable: value} of deploy/settings.env."""
    lines = (DEPLOY / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))

