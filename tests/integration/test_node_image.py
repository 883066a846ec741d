"""deploy/node-image in a minimal Debian, each time in a copy that comes and goes: bake it, then be its container runtime.

The Debian is the one that tests/matrix.sh has made and kept. `make test` downloads none.
"""

import base64
import gzip
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

import mncni

pytestmark = pytest.mark.root

REPO = Path(mncni.__file__).parent
BAKE, CLOUD_INIT = REPO / "deploy/node-image/bake.sh", REPO / "deploy/node-image/cloud-init.sh"
CONFLIST = REPO / "conf/naivewg.conflist"
LAYERS = "mkdir $1 $1/upper $1/work $1/root && mount -t overlay -o lowerdir=base,upperdir=$1/upper,workdir=$1/work overlay $1/root"
MOUNTS = "mount --bind /dev $1/root/dev && mount -t proc proc $1/root/proc && mount -t tmpfs tmpfs $1/root/run"
READ_YAML = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)"


def hold(argv):
    """A process that keeps namespaces alive: argv makes them, and what it mounts there is gone with it."""
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """A function name -> Node: a Debian 12 of its own. They share the unpacked system, which is on a tmpfs that only they see."""
    done = subprocess.run([REPO / "tests/debian-root.sh", "--cached", "bookworm"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a minimal Debian, which `make test-matrix` makes and keeps; {done.stderr.strip()}")
    directory = tmp_path_factory.mktemp("debian")
    unpack = "cd $1 && mount -t tmpfs tmpfs . && cd $PWD && mkdir base && tar -C base -xzf $2 && echo ready && read end"
    holders = [hold(["unshare", "--mount", "sh", "-c", unpack, "sh", directory, done.stdout.strip()])]

    def make(name):
        enter = ["nsenter", f"--mount=/proc/{holders[0].pid}/ns/mnt", f"--wd={directory}", "unshare", "--mount", "--net"]
        holders.append(hold([*enter, "sh", "-c", f"cd {directory} && {LAYERS} && {MOUNTS} && echo ready && read end", "sh", name]))
        return Node(holders[-1].pid, directory / name)

    yield make
    for holder in reversed(holders):
        holder.communicate()  # the end of its stdin, so of it; if this process is killed, too


class Node:
    """A system in mount and network namespaces of its own. Only what was written to it is in its upper layer."""

    def __init__(self, pid, directory):
        self.pid, self.directory, self.root = pid, directory, directory / "root"

    def path(self, name):
        """Where this process finds a file of the node."""
        return Path(f"/proc/{self.pid}/root{self.root}/{name}")

    def outside(self, *argv, stdin=""):
        """Run a program of this machine beside the node: the same namespaces, this machine's files. Returns the finished process."""
        enter = ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", f"--net=/proc/{self.pid}/ns/net"]
        return subprocess.run([*enter, *argv], input=stdin, capture_output=True, text=True, timeout=60)

    def run(self, *argv, stdin="", **environ):
        """Run a program of the node, with this environment and no other. Returns the finished process."""
        environ = [f"{name}={value}" for name, value in {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environ}.items()]
        return self.outside("chroot", self.root, "/usr/bin/env", "-i", *environ, *argv, stdin=stdin)

    def bake(self, conflist=CONFLIST):
        return self.outside(BAKE, self.root, conflist)

    def files(self):
        """{path: (mode, content)} of every file that the node has besides, or instead of, those of its Debian."""
        upper = Path(f"/proc/{self.pid}/root{self.directory}/upper")
        paths = [path for path in upper.rglob("*") if not path.is_dir()]
        return {str(path.relative_to(upper)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in paths}

    def cni(self, command, conf, ifname="eth0"):
        """What the baked plugin answers a runtime, as an object or None; it has to succeed."""
        names = {"CNI_COMMAND": command, "CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/pod", "CNI_IFNAME": ifname}
        done = self.run("/opt/cni/bin/mncni", stdin=json.dumps(conf), CNI_PATH="/opt/cni/bin", **names)
        assert (done.returncode, done.stderr) == (0, ""), done
        return json.loads(done.stdout) if done.stdout else None

    def serve_a_pod(self):
        """ADD by the baked configuration, a ping of the gateway from the pod, CHECK, DEL."""
        conflist = json.loads(self.path("etc/cni/net.d/10-mncni.conflist").read_text())
        conf = {**conflist["plugins"][0], "name": conflist["name"], "cniVersion": "1.1.0"}
        assert self.run("ip", "netns", "add", "pod").returncode == 0
        result = self.cni("ADD", conf)
        done = self.outside("nsenter", f"--net={self.root}/run/netns/pod", "ping", "-c1", "-W2", result["ips"][0]["gateway"])
        assert done.returncode == 0, done
        self.cni("CHECK", {**conf, "prevResult": result})
        self.cni("DEL", {**conf, "prevResult": result})
        assert self.run("ip", "netns", "delete", "pod").returncode == 0


@pytest.fixture(scope="module")
def baked(debian):
    node = debian("baked")
    done = node.bake()
    assert done.returncode == 0, done
    return node


def test_a_baked_node_serves_pods_with_nothing_but_what_was_baked(baked):
    before = baked.files()
    assert sorted(before) == [
        "etc/cni/net.d/10-mncni.conflist",
        "opt/cni/bin/__pycache__/mncni.cpython-311.pyc",
        "opt/cni/bin/loopback",
        "opt/cni/bin/mncni",
        "opt/cni/bin/mncni.py",
    ]
    assert before["etc/cni/net.d/10-mncni.conflist"][1] == CONFLIST.read_bytes()
    baked.serve_a_pod()
    after = baked.files()
    assert {path: after[path] for path in after if not path.startswith("var/lib/cni/")} == before


def test_the_nodes_own_python_compiled_the_plugin_and_uses_that(baked):
    compiled = "opt/cni/bin/__pycache__/mncni.cpython-311.pyc"
    magic = baked.run("/usr/bin/python3", "-c", "import importlib.util as u; print(u.MAGIC_NUMBER.hex())").stdout.strip()
    assert baked.files()[compiled][1][:4].hex() == magic
    done = baked.run("/usr/bin/python3", "-v", "-IS", "/opt/cni/bin/mncni", CNI_COMMAND="VERSION", stdin='{"cniVersion": "1.1.0"}')
    assert f"# code object from '/{compiled}'" in done.stderr


def test_a_baked_node_works_with_read_only_plugins(baked):
    plugins = f"{baked.root}/opt/cni/bin"
    assert baked.outside("sh", "-c", f"mount --bind {plugins} {plugins} && mount -o remount,bind,ro {plugins}").returncode == 0
    try:
        assert baked.run("touch", "/opt/cni/bin/x").returncode == 1
        baked.serve_a_pod()
    finally:
        baked.outside("umount", plugins)


def test_baking_again_changes_nothing(debian):
    node = debian("again")
    assert node.bake().returncode == 0
    before = node.files()
    assert node.bake().returncode == 0
    assert node.files() == before


def test_missing_packages_are_named_and_nothing_is_baked(debian):
    node = debian("bare")
    assert node.run("rm", "/usr/sbin/nft", "/usr/bin/nsenter").returncode == 0
    before = node.files()
    done = node.bake()
    assert done.returncode == 1 and done.stderr.endswith(": util-linux nftables\n"), done
    assert node.files() == before


def test_a_conflist_without_masquerade_needs_no_nft(debian, tmp_path):
    conflist = tmp_path / "plain.conflist"
    conflist.write_text(CONFLIST.read_text().replace('"ipMasq": true', '"ipMasq": false'))
    node = debian("no-nft")
    assert node.run("rm", "/usr/sbin/nft").returncode == 0
    assert node.bake(conflist).returncode == 0
    node.serve_a_pod()


def test_a_configuration_that_would_go_first_is_refused_and_one_that_goes_behind_is_named(debian):
    node = debian("others")
    assert node.run("mkdir", "-p", "/etc/cni/net.d").returncode == 0
    node.path("etc/cni/net.d/87-podman.conflist").write_text("{}")
    node.path("etc/cni/net.d/05-cilium.conf").write_text("{}")
    before = node.files()
    done = node.bake()
    assert done.returncode == 1 and "/05-cilium.conf, which sorts before" in done.stderr, done
    assert node.files() == before
    node.path("etc/cni/net.d/05-cilium.conf").unlink()
    done = node.bake()
    assert done.returncode == 0 and "/87-podman.conflist, which a runtime then no longer uses" in done.stderr, done


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("10.88.0.0/24", "10.88.0.1/24", "subnet"),
        ('"type": "mncni"', '"type": "calico"', 'a plugin "calico"'),
        ('"plugins"', '"Plugins"', "no list of plugins"),
        ("}", "", "does not work"),
    ],
)
def test_a_conflist_that_cannot_work_is_not_baked(debian, tmp_path, old, new, word):
    conflist = tmp_path / "bad.conflist"
    conflist.write_text(CONFLIST.read_text().replace(old, new))
    node = debian(tmp_path.name)
    done = node.bake(conflist)
    assert done.returncode == 1 and word in done.stderr, done
    assert node.files() == {}


# ---------------------------------------------------------------------------------------------------------------------
# cloud-init
# ---------------------------------------------------------------------------------------------------------------------


def print_cloud_init(conflist=CONFLIST):
    return subprocess.run([CLOUD_INIT, conflist], capture_output=True, text=True, timeout=60)


def read_cloud_init():
    """The document as an object. YAML is not in the standard library, and not worth a package from PyPI."""
    done = subprocess.run(["/usr/bin/python3", "-c", READ_YAML], input=print_cloud_init().stdout, capture_output=True, text=True)
    if "No module named 'yaml'" in done.stderr:
        pytest.skip("needs a reader of YAML: apt-get install python3-yaml")
    return json.loads(done.stdout)


def first_boot(node, document):
    """What cloud-init does with write_files and runcmd: files in the order of the list, then the commands."""
    for entry in document["write_files"]:
        assert entry.get("encoding", "text/plain") in ("gz+b64", "text/plain")
        path = node.path(entry["path"].lstrip("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        is_packed, content = "encoding" in entry, entry["content"]
        path.write_bytes(gzip.decompress(base64.b64decode(content)) if is_packed else content.encode())
    for argv in document["runcmd"]:
        done = node.run(*argv)
        assert done.returncode == 0, done


def test_cloud_init_leaves_the_same_node_as_baking(debian, baked):
    node = debian("cloud")
    first_boot(node, read_cloud_init())
    same = {path: entry for path, entry in baked.files().items() if not path.startswith("var/lib/cni/")}
    assert node.files() == same
    node.serve_a_pod()


def test_cloud_init_accepts_the_document(tmp_path):
    if not shutil.which("cloud-init"):
        pytest.skip("needs cloud-init, to check the document by its schema: apt-get install cloud-init")
    path = tmp_path / "user-data"
    path.write_text(print_cloud_init().stdout)
    done = subprocess.run(["cloud-init", "schema", "--config-file", path], capture_output=True, text=True)
    assert done.returncode == 0, done


def test_cloud_init_refuses_what_is_too_large_for_azure(tmp_path):
    conflist = tmp_path / "large.conflist"
    noise = random.Random(1).randbytes(40_000).hex()
    conflist.write_text(CONFLIST.read_text().replace('"bridge"', f'"args": {{"note": "{noise}"}}, "bridge"'))
    done = print_cloud_init(conflist)
    assert (done.returncode, done.stdout) == (1, "") and "Azure takes 65535" in done.stderr
    assert len(print_cloud_init().stdout) < 65_536
