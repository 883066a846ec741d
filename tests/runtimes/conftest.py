"""Two nodes with the real agent; containerd runs on node1, podman on node2. A runtime that cannot run here is skipped, aloud."""

import contextlib
import json
import os
import shutil

import pytest

from deploy import lab as labs
from tests.e2e.conftest import lab_up
from tests.runtimes.runtimes import Containerd, Cri, Ctr, Node, Podman, make_images, remove_cgroups

PACKAGES = {"containerd": "containerd", "ctr": "containerd", "runc": "runc", "podman": "podman", "conmon": "conmon"}
PACKAGES.update({"busybox": "busybox-static", "protoc": "protobuf-compiler"})


def need(*tools):
    for tool in tools:
        if not shutil.which(tool, path=labs.PATH):
            pytest.skip(f"needs {tool}: package {PACKAGES[tool]}")


@contextlib.contextmanager
def skipping(what):
    """Where a runtime cannot even run a container without a network, its tests have nothing to say about ours."""
    try:
        yield
    except labs.LabError as error:
        pytest.skip(f"{what} cannot run here: {error}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    name = f"mncni-rt-{os.getpid()}"
    try:
        with lab_up(name, pods=0) as made:
            yield made
    finally:
        remove_cgroups(name, tmp_path_factory.mktemp("cgroup"))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    need("busybox")
    path = tmp_path_factory.mktemp("images") / "images.tar"
    make_images(path)
    return path


@pytest.fixture(scope="session")
def containerd(lab, images):
    need("containerd", "ctr", "runc")
    with skipping("containerd"):
        return Containerd(Node(lab, "node1"), images)


@pytest.fixture(scope="session")
def ctr(containerd):
    return Ctr(containerd.node)


@pytest.fixture(scope="session")
def cri_client(containerd, tmp_path_factory):
    need("protoc")
    if labs.run([labs.PYTHON, "-c", "import grpc, google.protobuf"])[0]:
        pytest.skip(f"needs gRPC for {labs.PYTHON}: packages python3-grpcio, python3-protobuf")
    client = Cri(containerd.node, tmp_path_factory.mktemp("cri"))
    yield client
    client.close()


@pytest.fixture(scope="session")
def podman_installed(lab, images):
    need("podman", "conmon", "runc")
    with skipping("podman"):
        made = Podman(Node(lab, "node2"), images)
    backend = json.loads(made.node.run(["podman", "info", "--format", "json"]))["host"].get("networkBackend", "cni")
    if backend != "cni":  # before podman 4 there was no other
        pytest.skip(f"this podman has no CNI backend, only {backend}")
    return made


@contextlib.contextmanager
def cleaned(runtime):
    """A runtime for one test; pods that the test left are removed."""
    yield runtime
    for pod in list(runtime.pods):
        pod.remove()


@pytest.fixture
def cri(cri_client):
    with cleaned(cri_client):
        yield cri_client


@pytest.fixture
def podman(podman_installed):
    with cleaned(podman_installed):
        yield podman_installed


@pytest.fixture(params=["ctr", "cri_client", "podman_installed"])
def runtime(request):
    """Each of the three."""
    with cleaned(request.getfixturevalue(request.param)) as made:
        yield made
