#!/usr/bin/python3
"""A real Kubernetes cluster on this machine, with MNCNI as its network: API server, kubelets, kube-proxies, containerd, CoreDNS.

As in the lab (deploy/lab.py, which this builds upon) a node is a set of namespaces with a disk, a /run and a boot ID of its own, on an
underlay that is a network namespace; the machine's own network is not touched. Here a node is a Debian system, and it has cgroups of its
own. node1 runs the control plane, too.

    cluster.py up                       variables: PROXY=iptables|nftables|ipvs FAMILIES=4|6|46 CONTAINERD=debian (1.6; else build.sh's)
    cluster.py status                   nodes, and which of their programs run
    cluster.py kubectl get nodes        kubectl, as the administrator
    cluster.py exec node1 -- COMMAND    a command on a node, or outside of the cluster: exec underlay -- COMMAND
    cluster.py off node2                pull its plug
    cluster.py boot node2               start it again, its disk is as it was
    cluster.py wipe node2               pull its plug, and its disk
    cluster.py stop node2 kubelet       end a program
    cluster.py start node2 kubelet      start it again
    cluster.py images ARCHIVE           import images into all nodes
    cluster.py down                     remove all of it, except for what is in the cache

The cache is ~/.cache/mncni-cluster (build.sh fills its bin/); disks and logs of the nodes are below /var/lib/mncni-cluster/NODE.
Reading order: programs.py (what a node runs); then here, from the bottom to the top, as `up` does it.
"""
import argparse
import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from deploy import lab as labs  # noqa: E402
from deploy.cluster import images, programs  # noqa: E402
from deploy.lab import LabError, must, parallel, run, wait_until  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "mncni-cluster"
NODE_COUNT, CONTROL = 3, "node1"
PROXIES = ("iptables", "nftables", "ipvs")
NODE_PATH = f"/k8s/bin/containerd:/k8s/bin/kubernetes:{labs.PATH}"
NODE_PACKAGES = ("conntrack", "containerd", "curl", "ethtool", "ipset", "iptables", "iputils-ping", "kmod", "procps", "runc", "socat",
                 "tcpdump")
START_TIMEOUT_S, IMPORT_TIMEOUT_S, ROLLOUT_TIMEOUT_S = 180, 600, 600
NEEDED_GB = 8                                        # for the disks of the nodes
# What kubelet sets for the whole machine. In a node it finds a file there, so that it sees what it wants and changes nothing.
SYSCTLS = {"vm/overcommit_memory": 1, "vm/panic_on_oom": 0, "kernel/panic": 10, "kernel/panic_on_oops": 1,
           "kernel/keys/root_maxkeys": 1000000, "kernel/keys/root_maxbytes": 25000000}
# What the kernel must have -> a command that works only then, and what to do. It runs in a network namespace that is gone afterwards.
KERNEL = {
    "overlayfs": ("grep -qw overlay /proc/filesystems || modprobe overlay", "modprobe overlay"),
    "br_netfilter": ("test -e /proc/sys/net/bridge/bridge-nf-call-iptables",
                     "modprobe br_netfilter; it is for all network namespaces, and makes the machine's own bridges ask iptables, too, "
                     "unless net.bridge.bridge-nf-call-iptables is 0 there"),
    "nftables": ("nft add table inet probe", "a kernel with nf_tables"),
    "ipvs": ("test -e /proc/net/ip_vs || modprobe ip_vs", "modprobe ip_vs, or another PROXY than ipvs"),
}


class Cluster(labs.Lab):
    """Names, paths and state of the cluster: as of a lab, with "families", "proxy", "containerd" and "kubernetes" (the version)."""
    home = Path("/var/lib")

    def __init__(self, name="mncni-cluster", verbose=True):
        super().__init__(name, verbose)
        self.pki, self.source, self.kubeconfig = self.dir / "pki", self.dir / "mncni", self.dir / "pki/admin.kubeconfig"

    def state(self):
        if not self.file.exists():
            raise LabError("the cluster is not up; start it with: make cluster")
        return super().state()

    def init_argv(self, node, boot_id):
        # Only the init process itself is in the control groups, of which it sees its own as the roots.
        return [*labs.UNSHARE, *join(self.cgroups(node)), "unshare", "--cgroup", "--",
                labs.PYTHON, str(HERE / "cluster.py"), "node-init", self.name, node, boot_id]

    def cgroups(self, node):
        """{hierarchy: the directory of a node's control group}: each of version 1, or the one of version 2, which is called ""."""
        return {hierarchy: Path("/sys/fs/cgroup", hierarchy, f"{self.name}-{node}") for hierarchy in look_hierarchies()}

    def addresses(self, node):
        """The node's own addresses, as a list."""
        return [address for address, _ in labs.endpoints(self, node)]


def join(cgroups, leaf=""):
    """The words to put before a command so that it runs in these control groups."""
    script = 'for group in $1; do echo 0 >"$group/cgroup.procs" || exit 1; done; shift; exec "$@"'
    return ["sh", "-c", script, "sh", " ".join(str(path / leaf) for path in cgroups.values())]


def enter(cluster, node):
    """The words to put before a command so that it runs on a node, as one of its own processes. LabError if the node is down."""
    row = cluster.node(node)
    if not labs.is_running(row):
        raise LabError(f"{node} is down; start it with: cluster.py boot {node}")
    environment = [f"PATH={NODE_PATH}", "HOME=/root", "LC_ALL=C.UTF-8", f"KUBECONFIG={programs.PKI}/admin.kubeconfig"]
    return [*join(cluster.cgroups(node), LEAF), "nsenter", "--target", str(row["pid"]), "--mount", "--uts", "--ipc", "--net", "--pid",
            "--cgroup", "--", "env", "-i", *environment]


def inside(cluster, node, *words, timeout_s=60):
    """Run a command on a node. Returns its stdout. LabError if it fails."""
    return must([*enter(cluster, node), *words], timeout_s=timeout_s)


def kubectl_argv(cluster):
    """The words to put before kubectl's: it runs outside of the cluster, on the underlay."""
    program = str(CACHE / "bin" / cluster.state()["kubernetes"] / "kubectl")
    return ["nsenter", f"--net=/run/netns/{cluster.underlay}", program, "--kubeconfig", str(cluster.kubeconfig)]


def kubectl(cluster, *words, stdin="", timeout_s=120):
    """What kubectl prints, run at the top of the installed copy of MNCNI. LabError if it fails."""
    return must([*kubectl_argv(cluster), *words], stdin, timeout_s=timeout_s)


# ---------------------------------------------------------------------------------------------------------------------------
# Control groups
# ---------------------------------------------------------------------------------------------------------------------------
def look_hierarchies():
    """The hierarchies of control groups of version 1, such as "cpu,cpuacct"; [""] where there is version 2 alone."""
    rows = [line.split(":")[1] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    return [row for row in rows if row and not row.startswith("name=")] or [""]


VERSION_2 = look_hierarchies() == [""]
LEAF = "init" if VERSION_2 else ""                   # of version 2 a group that has groups below it has no processes of its own


def make_cgroups(cluster, node):
    """Make the control groups of a node, before anything runs in them."""
    for hierarchy, path in cluster.cgroups(node).items():
        if VERSION_2:
            delegate(path.parent)
        path.mkdir(exist_ok=True)
        if "cpuset" in hierarchy:                    # what is new there has no processors
            (path / "cgroup.clone_children").write_text("1")
            for name in ("cpuset.cpus", "cpuset.mems"):
                (path / name).write_text((path.parent / name).read_text())


def delegate(path):
    """Version 2: let the groups below this one have all controllers that it has."""
    for controller in (path / "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):
            (path / "cgroup.subtree_control").write_text(f"+{controller}")


def remove_cgroups(cluster, node):
    """Remove the control groups of a node that is off, from the leaves up. The kernel may need a moment for processes that were killed."""
    def removed():
        for path in cluster.cgroups(node).values():
            for directory, _, _ in os.walk(path, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        return not any(path.exists() for path in cluster.cgroups(node).values())

    wait_until(removed, 30, f"end of the control groups of {node}")


# ---------------------------------------------------------------------------------------------------------------------------
# Certificates
# ---------------------------------------------------------------------------------------------------------------------------
def make_certificates(cluster):
    """Write all certificates, keys and kubeconfigs into the directory that all nodes see."""
    cluster.pki.mkdir(mode=0o700)
    addresses = cluster.addresses(CONTROL)
    rows = programs.plan_certificates(cluster.state(), cluster.nodes(), addresses)
    for row in rows:
        make_certificate(cluster.pki, *row)
    for user in ("admin", *programs.CLIENTS, *cluster.nodes()):
        config = plan_kubeconfig(cluster.pki, user, f"https://{programs.bracketed(addresses[0])}:{programs.API_PORT}")
        (cluster.pki / f"{user}.kubeconfig").write_text(json.dumps(config, indent=1))


def make_certificate(pki, name, authority, subject, names):
    """Write NAME.key and NAME.crt."""
    by = ["-CA", pki / f"{authority}.crt", "-CAkey", pki / f"{authority}.key"] if authority else []
    usage = "extendedKeyUsage=serverAuth,clientAuth" if authority else "keyUsage=critical,keyCertSign,cRLSign"
    words = ["-addext", f"basicConstraints=critical,CA:{'FALSE' if authority else 'TRUE'}", "-addext", usage]
    words += ["-addext", f"subjectAltName={','.join(names)}"] if names else []
    must(["openssl", "req", "-x509", "-config", "/dev/stdin", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
          "-days", "3650", "-subj", subject, *by, *words, "-keyout", pki / f"{name}.key", "-out", pki / f"{name}.crt"],
         "[req]\ndistinguished_name = name\n[name]\n")


def plan_kubeconfig(pki, user, server):
    def data(name):
        return base64.b64encode((pki / name).read_bytes()).decode()

    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "mncni",
        "clusters": [{"name": "mncni", "cluster": {"server": server, "certificate-authority-data": data("ca.crt")}}],
        "users": [{"name": user, "user": {"client-certificate-data": data(f"{user}.crt"), "client-key-data": data(f"{user}.key")}}],
        "contexts": [{"name": "mncni", "context": {"cluster": "mncni", "user": user}}],
    }


# ---------------------------------------------------------------------------------------------------------------------------
# Nodes
# ---------------------------------------------------------------------------------------------------------------------------
def make_node_dir(cluster, node):
    """Make what survives reboots of a node: its disk and its configuration."""
    top, state = cluster.dir / node, cluster.state()
    for name in ("root", "work", "disk/etc", "conf", "sysctl", "var/log", "var/containerd", "var/kubelet", "var/etcd"):
        (top / name).mkdir(parents=True)
    for name, value in SYSCTLS.items():
        (top / "sysctl" / name.replace("/", ",")).write_text(f"{value}\n")
    (top / "disk/etc/hostname").write_text(f"{node}\n")
    # No name server: what is not of the cluster has no name here.
    (top / "disk/etc/resolv.conf").write_text("nameserver 127.0.0.1\n")
    hosts = [f"{address} {other}\n" for other in cluster.nodes() for address in cluster.addresses(other)]
    (top / "disk/etc/hosts").write_text("".join(["127.0.0.1 localhost\n", "::1 localhost\n", *hosts]))
    for name, text in programs.plan_files(state, node).items():
        (top / "conf" / name).write_text(text)
    (top / "conf/hook").write_text(programs.HOOK)
    (top / "conf/hook").chmod(0o755)


def plan_node_root(cluster, node, root):
    """The commands that make the root file system of a node below `root`, of which its disk is an overlay."""
    top = cluster.dir / node

    def mount(target, *words):
        return ["mount", *map(str, words), "-o", "X-mount.mkdir", f"{root}{target}"]

    overlay = f"lowerdir={node_root()},upperdir={top}/disk,workdir={top}/work"
    plan = [
        ["mount", "-t", "overlay", "-o", overlay, "overlay", str(root)],
        mount("/proc", "-t", "proc", "proc"),
        mount("/sys", "-t", "sysfs", "sysfs"),
        mount("/dev", "--rbind", "/dev"),
        mount("/run", "-t", "tmpfs", "-o", "mode=0755", "tmpfs"),
        mount("/tmp", "-t", "tmpfs", "-o", "mode=1777", "tmpfs"),
        mount("/k8s/bin/kubernetes", "--bind", CACHE / "bin" / cluster.state()["kubernetes"]),
        mount("/k8s/pki", "--bind", cluster.pki),
        mount("/k8s/conf", "--bind", top / "conf"),
        mount("/var/log", "--bind", top / "var/log"),
        # On the machine's file system, as an overlay cannot lie upon another one.
        *(mount(f"/var/lib/{name}", "--bind", top / "var" / name) for name in ("containerd", "kubelet", "etcd")),
        *(mount(f"/proc/sys/{path.name.replace(',', '/')}", "--bind", path) for path in (top / "sysctl").iterdir()),
    ]
    if cluster.state()["containerd"] != "debian":
        plan.append(mount("/k8s/bin/containerd", "--bind", CACHE / "bin" / f"containerd-{cluster.state()['containerd']}"))
    if Path("/lib/modules").exists():
        plan.append(mount("/lib/modules", "--bind", "/lib/modules"))
    return plan + plan_cgroup_mounts(mount)


def plan_cgroup_mounts(mount):
    """They show what is below the node's control group, as it is the root of a cgroup namespace."""
    if VERSION_2:
        return [mount("/sys/fs/cgroup", "-t", "cgroup2", "cgroup2")]
    return [mount("/sys/fs/cgroup", "-t", "tmpfs", "-o", "mode=0755", "cgroup"),
            *(mount(f"/sys/fs/cgroup/{hierarchy}", "-t", "cgroup", "-o", hierarchy, "cgroup") for hierarchy in look_hierarchies())]


def plan_node_pivot(root):
    """The commands that make `root` the root file system and unmount the old one, so that the node sees nothing else of the machine."""
    return [
        ["mkdir", "-p", f"{root}/old"],
        ["pivot_root", str(root), f"{root}/old"],
        ["umount", "--lazy", "/old"],
        ["mount", "--bind", "/k8s/boot_id", "/proc/sys/kernel/random/boot_id"],
        ["mount", "--make-rshared", "/"],            # as systemd has it; containers ask for it
        ["ip", "link", "set", "lo", "up"],
    ]


def node_init(arguments):
    """The init process of a node: node-init NAME NODE BOOT_ID. As lab.node_init."""
    name, node, boot_id = arguments
    print(os.readlink("/proc/self"), flush=True)     # this /proc is still the machine's
    if sys.stdin.readline() != "go\n":
        return
    cluster = Cluster(name)
    socket.sethostname(node)
    root = cluster.dir / node / "root"
    for argv in plan_node_root(cluster, node, root):
        must(argv)
    (root / "k8s/boot_id").write_text(f"{boot_id}\n")
    os.chdir(root)
    for argv in plan_node_pivot(root):
        must(argv)
    os.chdir("/")
    if VERSION_2:
        Path("/sys/fs/cgroup", LEAF).mkdir()
        Path("/sys/fs/cgroup", LEAF, "cgroup.procs").write_text("0")
        delegate(Path("/sys/fs/cgroup"))
    labs.serve_as_init()


def boot(cluster, node):
    """Start a node that is off, with all its programs. A new one gets a disk with the images on it."""
    if not (cluster.dir / node).exists():
        make_node_dir(cluster, node)
    make_cgroups(cluster, node)
    labs.start_node(cluster, node)
    route = [["ip", f"-{family}", "route", "add", "default", "via", programs.FAMILIES[family]["gateway"].partition("/")[0]]
             for family in cluster.state()["families"]]
    for argv in route:
        inside(cluster, node, *argv)
    for name in plan_programs(cluster, node):
        start(cluster, node, name)
        if name in PROBES:
            wait_started(cluster, node, name)
        if name == "containerd":
            import_images(cluster, node, CACHE / "images.tar")
    cluster.say(f"{node}: booted")


# Program -> the command that works on the node as soon as the program serves others.
PROBES = {"containerd": ("ctr", "version"), "kube-apiserver": ("kubectl", "get", "--raw", "/readyz")}


def wait_started(cluster, node, name):
    """Wait until a program serves. LabError with the end of its log if it ends, or takes too long."""
    def serves():
        if not is_started(cluster, node, name):
            raise LabError(f"{name} ended")
        return run([*enter(cluster, node), *PROBES[name]])[0] == 0

    try:
        wait_until(serves, START_TIMEOUT_S, f"answer of {name}")
    except LabError as error:
        raise LabError(f"{node}: {error}; the end of its log:\n{labs.tail(cluster.dir / node / f'var/log/{name}.log')}") from None


def off(cluster, node):
    """Pull the plug of a node."""
    labs.kill_node(cluster, node)
    run(["ip", "-n", cluster.underlay, "link", "del", node])     # the kernel removes it as well, a moment later
    remove_cgroups(cluster, node)


def wipe(cluster, node):
    """Pull the plug of a node, and its disk."""
    off(cluster, node)
    shutil.rmtree(cluster.dir / node, ignore_errors=True)


def import_images(cluster, node, archive):
    """Import an archive of images into a node's containerd, once."""
    top = cluster.dir / node / "var/containerd"
    done = top / f"imported-{archive.parent.name}-{archive.name}"
    if done.exists():
        return
    began, shown = time.monotonic(), top / "import.tar"
    shutil.copyfile(archive, shown)
    words = ("ctr", "--namespace", "k8s.io", "images", "import", f"/var/lib/containerd/{shown.name}")
    inside(cluster, node, *words, timeout_s=IMPORT_TIMEOUT_S)
    shown.unlink()
    done.touch()
    cluster.say(f"{node}: images imported in {time.monotonic() - began:.0f} s")


# ---------------------------------------------------------------------------------------------------------------------------
# Programs of a node: start-stop-daemon(8) is its init system
# ---------------------------------------------------------------------------------------------------------------------------
def plan_programs(cluster, node):
    """{program: command line} of all programs of a node."""
    kind, addresses = cluster.state(), cluster.addresses(node)
    control = programs.plan_control_plane(kind, addresses) if node == CONTROL else {}
    return {**control, **programs.plan_node(kind, node, addresses)}


def start(cluster, node, name):
    """Start a program of a node unless it runs. Its log is /var/log/NAME.log there."""
    if name == "containerd":
        spec = programs.plan_container(json.loads(inside(cluster, node, "ctr", "oci", "spec")))
        (cluster.dir / node / "conf/container.json").write_text(json.dumps(spec))
    inside(cluster, node, "start-stop-daemon", "--start", "--oknodo", "--background", "--make-pidfile", "--pidfile", f"/run/{name}.pid",
           "--output", f"/var/log/{name}.log", "--startas", "/usr/bin/env", "--", *plan_programs(cluster, node)[name])


def stop(cluster, node, name, how="TERM"):
    """End a program of a node by a signal, and wait until it has ended."""
    inside(cluster, node, "start-stop-daemon", "--stop", "--oknodo", "--remove-pidfile", "--pidfile", f"/run/{name}.pid",
           "--retry", f"{how}/30/KILL/5")


def is_started(cluster, node, name):
    """Whether a program of a node runs."""
    return run([*enter(cluster, node), "start-stop-daemon", "--status", "--pidfile", f"/run/{name}.pid"])[0] == 0


# ---------------------------------------------------------------------------------------------------------------------------
# MNCNI and DNS, as an operator installs them
# ---------------------------------------------------------------------------------------------------------------------------
def copy_source(cluster, source):
    """Copy what `kubectl apply -k` needs, and set the addresses of the pods there, as deploy/README.md says."""
    shutil.copytree(source, cluster.source, ignore=shutil.ignore_patterns(".*", "tests", "__pycache__", "build"))
    settings = cluster.source / "deploy/settings.env"
    lines = settings.read_text().splitlines(keepends=True)
    pods = f"MNCNI_CLUSTER_CIDR={','.join(programs.every(cluster.state(), 'pods'))}\n"
    settings.write_text("".join(pods if line.startswith("MNCNI_CLUSTER_CIDR=") else line for line in lines))


def install(cluster):
    """kubectl apply -k, and wait until all nodes are ready."""
    began = time.monotonic()
    cluster.say("kubectl apply -k .")
    kubectl(cluster, "apply", "-k", str(cluster.source))
    patiently(cluster, "wait", "--for=condition=Ready", "nodes", "--all")
    cluster.say(f"all nodes are ready, {time.monotonic() - began:.1f} s after that")
    dns = (HERE / "coredns.yaml").read_text().replace("CLUSTER-IP", programs.every(cluster.state(), "dns")[0])
    kubectl(cluster, "apply", "-f", "-", stdin=dns)
    for what in ("daemonset/mncni-agent", "deployment/mncni-nodeipam", "deployment/coredns"):
        patiently(cluster, "rollout", "status", "-n", "kube-system", what)
        cluster.say(f"{what} is up")


def patiently(cluster, *words):
    """A kubectl command that waits. LabError if that takes too long."""
    return kubectl(cluster, *words, f"--timeout={ROLLOUT_TIMEOUT_S}s", timeout_s=ROLLOUT_TIMEOUT_S + 10)


# ---------------------------------------------------------------------------------------------------------------------------
# Up and down
# ---------------------------------------------------------------------------------------------------------------------------
def check_machine(kind):
    """LabError if something is missing that no package brings, before anything is made."""
    for what, (command, cure) in KERNEL.items():
        if (what != "ipvs" or kind["proxy"] == "ipvs") and run(["unshare", "--net", "sh", "-c", command])[0]:
            raise LabError(f"this kernel has no {what}: {cure}")
    free = shutil.disk_usage(Cluster.home).free >> 30
    if free < NEEDED_GB:
        raise LabError(f"needs {NEEDED_GB} GB of disk for {Cluster.home}, and there are {free}")
    if run(["stat", "-f", "-c", "%T", str(Cluster.home)])[1].strip() == "overlayfs":
        raise LabError(f"{Cluster.home} is an overlay, upon which there cannot be another: mount a file system of the machine there")
    for name in ("kubernetes", "coredns") + (() if kind["containerd"] == "debian" else ("containerd",)):
        if not (CACHE / "bin" / name).exists():
            raise LabError(f"no {name} in {CACHE}/bin: run {HERE}/build.sh cluster")


def create(cluster, kind, source):
    """Write the first state, and make the underlay with the gateways of the nodes on it."""
    rows = {f"node{number}": {"number": number, "boot_id": "", "pid": 0, "start": 0} for number in range(1, NODE_COUNT + 1)}
    underlay = ",".join(programs.FAMILIES[family]["underlay"] for family in kind["families"])
    state = {"name": cluster.name, **kind, "underlay": underlay, "kubernetes": (CACHE / "bin/kubernetes").resolve().name, "nodes": rows}
    labs.write_atomically(cluster.file, json.dumps(state, indent=1))
    labs.make_underlay(cluster)
    for gateway in programs.every(kind, "gateway"):
        must(["ip", "-n", cluster.underlay, "address", "add", gateway, "dev", labs.BRIDGE, "nodad"])
    copy_source(cluster, source)
    make_certificates(cluster)


@contextlib.contextmanager
def made_or_undone(cluster):
    """Make the cluster's directory and run the with block. If that fails or is interrupted, everything is undone, but for the logs."""
    try:
        cluster.dir.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise LabError("the cluster is up; end it with: make cluster-down") from None
    try:
        yield
    except BaseException as error:
        with labs.signals_ignored():
            keep_logs(cluster)
            down(cluster)
        if isinstance(error, LabError):
            raise LabError(f"{error}\nThe logs of the nodes are in {CACHE}/log") from None
        raise


def keep_logs(cluster):
    """Copy the logs of the nodes into the cache."""
    shutil.rmtree(CACHE / "log", ignore_errors=True)
    for path in cluster.dir.glob("*/var/log"):
        shutil.copytree(path, CACHE / "log" / path.parents[1].name, ignore_dangling_symlinks=True)


def up(cluster, kind, source=ROOT):
    """Make the cluster, install MNCNI and DNS on it, and wait until all is ready."""
    check_machine(kind)
    prepare(cluster)
    with made_or_undone(cluster):
        create(cluster, kind, source)
        boot(cluster, CONTROL)
        parallel(lambda node: boot(cluster, node), [node for node in cluster.nodes() if node != CONTROL])
        wait_until(lambda: kubectl(cluster, "get", "nodes", "-o", "name").count("node/") == NODE_COUNT, START_TIMEOUT_S, "all nodes")
        install(cluster)


def down(cluster):
    """Remove the cluster. May be called at any time, also twice."""
    if not cluster.dir.exists():
        return
    nodes = cluster.nodes() if cluster.file.exists() else {}
    parallel(lambda node: labs.reported(cluster, off, node), nodes)
    if Path("/run/netns", cluster.underlay).exists():
        must(["ip", "netns", "del", cluster.underlay])
    shutil.rmtree(cluster.dir)
    cluster.say("down")


def node_root():
    """The directory with the Debian system that all nodes' disks are overlays of."""
    return CACHE / "node"


def prepare(cluster):
    """Make what the cache lacks: the Debian system of the nodes, and the images."""
    tarball = images.debian(NODE_PACKAGES)
    stamp = CACHE / "node.made-of"
    if not (stamp.exists() and stamp.read_text() == tarball.name):
        cluster.say("unpacking the nodes' Debian")
        shutil.rmtree(node_root(), ignore_errors=True)
        node_root().mkdir()
        must(["tar", "--directory", str(node_root()), "--extract", "--gunzip", "--numeric-owner", "--file", str(tarball)], timeout_s=600)
        stamp.write_text(tarball.name)
    images.make_cluster_images(CACHE)


# ---------------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------------
USAGE = """
The cluster is up: {kubernetes}, kube-proxy {proxy}, containerd {containerd}. As root, for example:
  {me} kubectl get pods -A -o wide
  {me} kubectl run shell -it --rm --image python:3-slim -- bash      images: python:3-slim, with ip, nft, wg, curl, dig
  {me} exec node1 -- bash
  make test-cluster     make cluster-down"""


def wanted_kind():
    """What cluster the variables of the environment ask for. LabError if there is none such."""
    kind = {"families": os.environ.get("FAMILIES") or "4", "proxy": os.environ.get("PROXY") or "iptables",
            "containerd": os.environ.get("CONTAINERD") or (CACHE / "bin/containerd").resolve().name.partition("-")[2]}
    if kind["families"] not in ("4", "6", "46") or kind["proxy"] not in PROXIES:
        raise LabError(f"FAMILIES={kind['families']} PROXY={kind['proxy']}: use 4, 6 or 46, and one of {', '.join(PROXIES)}")
    return kind


def command_up(cluster, _options):
    up(cluster, wanted_kind())
    print(USAGE.format(**cluster.state(), me=os.path.relpath(__file__)))


def command_status(cluster, _options):
    rows = [["NODE", "INIT", "ADDRESSES", "RUNS", "DOES NOT RUN"]]
    for node, row in cluster.nodes().items():
        names = plan_programs(cluster, node)
        running = [name for name in names if labs.is_running(row) and is_started(cluster, node, name)]
        rows.append([node, row["pid"] or "off", " ".join(cluster.addresses(node)), " ".join(running) or "-",
                     " ".join(name for name in names if name not in running) or "-"])
    labs.print_table(rows)


def command_exec(cluster, options):
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    outside = options.node == "underlay"
    argv = [*(["nsenter", f"--net=/run/netns/{cluster.underlay}"] if outside else enter(cluster, options.node)), *(words or ["bash"])]
    os.execvp(argv[0], argv)


def command_kubectl(cluster, options):
    cluster.state()
    argv = [*kubectl_argv(cluster), *options.words]
    os.execvp(argv[0], argv)


def command_images(cluster, options):
    parallel(lambda node: import_images(cluster, node, options.archive.resolve()), cluster.nodes())


def command_down(cluster, _options):
    with labs.signals_ignored():
        down(cluster)


NODE, PROGRAM, WORDS = ("node", {}), ("program", {}), ("words", {"nargs": argparse.REMAINDER})
COMMANDS = {                                         # name -> (function, arguments)
    "up": (command_up, []),
    "status": (command_status, []),
    "kubectl": (command_kubectl, [WORDS]),
    "exec": (command_exec, [NODE, WORDS]),
    "off": (lambda cluster, options: off(cluster, options.node), [NODE]),
    "boot": (lambda cluster, options: boot(cluster, options.node), [NODE]),
    "wipe": (lambda cluster, options: wipe(cluster, options.node), [NODE]),
    "stop": (lambda cluster, options: stop(cluster, options.node, options.program), [NODE, PROGRAM]),
    "start": (lambda cluster, options: start(cluster, options.node, options.program), [NODE, PROGRAM]),
    "images": (command_images, [("archive", {"type": Path})]),
    "down": (command_down, []),
}


def parse_options(argv):
    parser = argparse.ArgumentParser(prog="cluster.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (_, arguments) in COMMANDS.items():
        sub = commands.add_parser(command, prefix_chars="\0" if command == "kubectl" else "-")
        for name, how in arguments:
            sub.add_argument(name, **how)
    return parser.parse_args(argv)


def main(argv):
    """Returns the exit status: 0 fine, 1 failed, 2 usage, 128 + signal if interrupted."""
    try:
        if argv[:1] == ["node-init"]:
            node_init(argv[1:])
            return 1
        options = parse_options(argv)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))
        if os.geteuid():
            raise LabError("a cluster is namespaces and mounts, and needs root: run it with sudo")
        COMMANDS[options.command][0](Cluster(), options)
        return 0
    except (LabError, subprocess.SubprocessError) as error:
        print(f"cluster.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cluster.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
