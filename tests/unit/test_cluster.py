"""deploy/cluster: the plans agree with each other, archives of images are whole, and what is missing is said before anything is made."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile

import pytest

from deploy.cluster import images, programs
from tests.manifests import ROOT

KINDS = [{"families": families, "proxy": "nftables", "containerd": containerd}
         for families, containerd in itertools.product(("4", "6", "46"), ("debian", "2.1.4"))]
ADDRESSES = ["192.0.2.1", "2001:db8::1"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_file_that_a_program_is_given_is_made(kind):
    nodes = ["node1", "node2"]
    made = {f"{programs.CONF}/{name}" for name in [*programs.plan_files(kind, "node2"), "container.json", "hook"]}
    for name, authority, _, _ in programs.plan_certificates(kind, nodes, ADDRESSES):
        assert not authority or f"{programs.PKI}/{authority}.crt" in made, "an authority comes before what it signs"
        made |= {f"{programs.PKI}/{name}.{end}" for end in ("crt", "key", "kubeconfig")}
    lines = {**programs.plan_control_plane(kind, ADDRESSES), **programs.plan_node(kind, "node2", ADDRESSES)}
    text = str([*lines.values(), *programs.plan_files(kind, "node2").values(), programs.plan_container({})])
    assert set(re.findall(rf"(?:{programs.PKI}|{programs.CONF})/[\w.-]+", text)) <= made


def test_both_families_are_everywhere():
    kind = KINDS[-1]
    for text in (str(programs.plan_apiserver(kind, ADDRESSES)), json.dumps(programs.plan_proxy(kind, "node1"))):
        assert all(part in text for part in programs.every(kind, "services" if "apiserver" in text else "pods"))
    assert "--node-ip=192.0.2.1,2001:db8::1" in programs.plan_node(kind, "node1", ADDRESSES)["kubelet"]


def test_an_archive_of_images_is_whole(tmp_path):
    layer = tmp_path / "layer.tar"
    with tarfile.open(layer, "w") as tar:
        tar.add(__file__, "file")
    digest = hashlib.sha256(layer.read_bytes()).hexdigest()
    rows = [{"names": [name], "layers": [layer], "entrypoint": None, "command": ["sh"]} for name in ("one:1", "two:1")]
    images.write_archive(tmp_path / "images.tar", rows, "recipe")
    with tarfile.open(tmp_path / "images.tar") as tar:
        assert tar.getnames().count(f"{digest}.tar") == 1
        for entry in json.load(tar.extractfile("manifest.json")):
            config = tar.extractfile(entry["Config"]).read()
            assert entry["Config"] == f"{hashlib.sha256(config).hexdigest()}.json"
            assert json.loads(config)["rootfs"]["diff_ids"] == [f"sha256:{digest}"]
    assert images.is_made(tmp_path / "images.tar", "recipe") and not images.is_made(tmp_path / "images.tar", "other")


def test_a_layer_puts_a_program_where_the_path_leads_to_it(tmp_path):
    (tmp_path / "layers").mkdir()
    for directory, name in (("", "program"), ("usr/bin/", "usr/bin/program")):
        (tmp_path / "program").write_text("program")
        with tarfile.open(images.file_layer(tmp_path, "one", tmp_path / "program", directory=directory)) as tar:
            assert tar.getnames() == [name]


def test_images_of_registries_that_ask_who_one_is_are_left_out():
    listed = ["registry.k8s.io/pause:3.10", "gcr.io/authenticated-image-pulling/pause:3", "docker.io/library/busybox:1.36"]
    assert images.called(listed, "pause") == ["registry.k8s.io/pause:3.10"]


def build(tmp_path, path=None, **variables):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "GOPROXY": "off", "GOMODCACHE": str(tmp_path / "modules"), **variables}
    done = subprocess.run([ROOT / "deploy/cluster/build.sh", "apiserver"], env={**environment, "PATH": path or os.environ["PATH"]},
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done
    return done.stderr.splitlines()[-1]


@pytest.mark.skipif(os.path.exists("/usr/bin/go"), reason="there is a Go among the tools")
def test_no_go(tmp_path):
    assert "needs go >= 1.21" in build(tmp_path, path="/usr/bin:/bin")


def go_is_here():
    return subprocess.run(["sh", "-c", "command -v go"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("version, says", [("1", "no version"), ("v1.34.4", "no version"), ("1.34.4/../x", "no version"),
                                           ("1.34.99", "has no version 1.34.99"), ("1.99", "has no version 1.99")])
def test_a_version_that_there_is_not(tmp_path, version, says):
    if "has" in says and not go_is_here():
        pytest.skip("needs go")
    assert says in build(tmp_path, KUBERNETES_VERSION=version)
    assert not list(tmp_path.glob("mncni-cluster/*/*"))


@pytest.mark.root
@pytest.mark.parametrize("variables", [{"FAMILIES": "5"}, {"PROXY": "none"}])
def test_a_cluster_that_there_is_not(tmp_path, variables):
    argv, environment = [sys.executable, ROOT / "deploy/cluster/cluster.py", "up"], {**os.environ, "HOME": str(tmp_path), **variables}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "use 4, 6 or 46" in done.stderr
    assert not list(tmp_path.iterdir())
