"""Runs a container of a manifest on a node of the lab, near enough to what a kubelet and runc make of it: its command, environment, user,
capabilities and mounts with their propagation. Its image is the machine's /usr; it shares the node's network, as hostNetwork says."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

from deploy import lab as labs
from tests import manifests

ACCOUNT_DIR = "/run/secrets/kubernetes.io/serviceaccount"
VOLUMES = "var/lib/kubelet/volumes"  # on the node
PATH = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"  # the distribution's python3 first


class Container:
    """A running container. pod: a pod's spec; name: of one of its containers; account: a service account's directory on the node."""

    def __init__(self, lab, node, pod, name, account, environ):
        self.lab, self.node = lab, node
        spec = next(each for each in [*pod.get("initContainers", []), *pod["containers"]] if each["name"] == name)
        assert pod["hostNetwork"] and not pod.get("hostPID")
        self.log = lab.dir / node / f"var/log/{name}.log"
        script = plan_container(pod, spec, account, {**environment(spec, node), **environ})
        write_files(lab.dir / node / VOLUMES, pod)
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "unchanged"]
        argv = [*labs.node_argv(lab, node), *unshare, "sh", "-ec", script]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait(self, timeout_s=60):
        """Its exit status."""
        return self.process.wait(timeout_s)

    def kill(self):
        """End it at once, with all its processes: PID 1 of its PID namespace dies with its parent."""
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            for grandchild in Path(f"/proc/{child}/task/{child}/children").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(grandchild), signal.SIGKILL)
        self.process.wait(20)

    def said(self):
        return self.log.read_text()


def environment(spec, node):
    """{variable: value} of envFrom and env."""
    values = {}
    for source in spec.get("envFrom", []):
        assert source == {"configMapRef": {"name": "mncni-settings"}}
        values.update(manifests.settings())
    for row in spec.get("env", []):
        field = row.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        values[row["name"]] = {"spec.nodeName": node}[field] if field else row["value"]
    return values


def write_files(directory, pod):
    """ConfigMap volumes as kubelet lays them out: links into a directory that is exchanged as a whole."""
    for volume in pod["volumes"]:
        sources = volume.get("projected", {}).get("sources", []) + ([volume] if "configMap" in volume else [])
        names = [source["configMap"]["name"] for source in sources]
        if "emptyDir" in volume:
            (directory / volume["name"]).mkdir(exist_ok=True)
        files = {name: text for each in names for name, text in manifests.config_files(each).items()}
        data = directory / volume["name"] / "..2025_01_01"
        data.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (data / name).write_text(text)
            link = directory / volume["name"] / name
            if not link.is_symlink():
                link.symlink_to(f"..2025_01_01/{name}")


def plan_container(pod, spec, account, environ):
    """A shell script that becomes the container's process."""
    root = "/tmp/container"
    lines = [f"mkdir -p {root}", f"mount -t tmpfs -o mode=0755 tmpfs {root}", f"cd {root}", "mkdir usr proc dev sys etc run tmp var"]
    lines += ["mount --rbind /usr usr", "mount -t proc proc proc", "mount --rbind /dev dev", "mount --rbind /sys sys"]
    lines += ["mount --bind /run/boot_id proc/sys/kernel/random/boot_id", "chmod 1777 tmp", "ln -s ../run var/run"]
    lines += [f"if [ -L /{name} ]; then cp -P /{name} .; fi" for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32")]
    lines += plan_mount(account, ACCOUNT_DIR, {"readOnly": True})
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in spec["volumeMounts"]:
        volume = volumes[mount["name"]]
        path = volume.get("hostPath", {}).get("path") or f"/{VOLUMES}/{mount['name']}"
        if volume.get("hostPath", {}).get("type") == "DirectoryOrCreate":
            lines.append(f"mkdir -p {path}")
        lines += plan_mount(path, mount["mountPath"], mount)
    security = {**pod.get("securityContext", {}), **spec.get("securityContext", {})}
    if security.get("readOnlyRootFilesystem"):
        lines.append("mount -o remount,ro .")
    words = ["chroot", root, *plan_rights(security), "env", "-i", f"PATH={PATH}", *(f"{key}={value}" for key, value in environ.items())]
    return "\n".join([*lines, "cd /", "exec " + shlex.join([*words, *expanded(spec["command"], environ)])])


def expanded(words, environ):
    """Words of a command with $(VARIABLE) replaced, as kubelet does."""
    return [re.sub(r"\$\((\w+)\)", lambda found: environ[found.group(1)], word) for word in words]


def plan_mount(path, target, mount):
    """Lines that mount a path of the node; working directory: the container's root."""
    propagation = {"Bidirectional": "rshared", "HostToContainer": "rslave"}.get(mount.get("mountPropagation"), "rprivate")
    target = target.lstrip("/")
    lines = [f"mkdir -p {target}", f"mount --rbind {path} {target}"]
    # A shared mount stays in the peer group of the node's: that is what Bidirectional means.
    lines += [] if propagation == "rshared" else [f"mount --make-{propagation} {target}"]
    return lines + ([f"mount -o remount,bind,ro {target}"] if mount.get("readOnly") else [])


def plan_rights(security):
    """The beginning of a command line that gives up what the securityContext does not grant."""
    if security.get("privileged"):
        return []
    caps = security["capabilities"]
    assert caps["drop"] == ["ALL"] and security["allowPrivilegeEscalation"] is False
    bounds = ",".join(["-all", *(f"+{name.lower()}" for name in caps.get("add", []))])
    user = [f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}", "--clear-groups"] if "runAsUser" in security else []
    return ["setpriv", *user, f"--bounding-set={bounds}", "--inh-caps=-all", "--no-new-privs"]


def conditions(node):
    """{type: (status, reason)} of a Node."""
    return {row["type"]: (row["status"], row["reason"]) for row in node["status"].get("conditions", [])}


def ready(lab, node):
    """Whether the agent on a node says that its network stands."""
    path = lab.inside(node, "/run/mncni/ready")
    return path.exists() and json.loads(path.read_text())["ok"]

