"""Container images made here, since nodes reach no registry: docker archives, as `ctr images import` takes them.

An image is {"names": [...], "layers": [files], "entrypoint": [...] or None, "command": [...]}. A layer is an uncompressed tar. All images
have the same first layer, a Debian system with Python and what the agent's image (deploy/image) and Kubernetes' own tests need.
"""
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

from deploy.lab import must

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
IMAGE_PACKAGES = ("bind9-dnsutils", "busybox-static", "curl", "iperf", "iperf3", "iputils-ping", "netcat-openbsd", "procps", "socat",
                  "wget", "wireguard-go", "wireguard-tools")
E2E_SYSTEMS = ("busybox", "jessie-dnsutils", "glibc-dns-testing", "nonroot", "perl", "ipc-utils",
               "distroless-iptables")                # tests run commands there
REGRESSION = "regression-issue-74839"
BUILD_TIMEOUT_S = 1800


def debian(packages):
    """The tarball of a Debian system with these packages, whatever its age; made if there is none."""
    script = ["sh", "-c", '"$0" --cached "$@" 2>/dev/null || "$0" "$@"', str(ROOT / "tests/debian-root.sh"), SUITE, *packages]
    return Path(must(script, timeout_s=BUILD_TIMEOUT_S).strip())


def make_cluster_images(cache):
    """Write images.tar, what every node starts with, unless it is there already."""
    tarball, coredns = debian(IMAGE_PACKAGES), (cache / "bin/coredns").resolve()
    if is_made(cache / "images.tar", f"{tarball.name} {coredns.name}"):
        return
    base = base_layer(cache, tarball)
    pause = ["sleep", "infinity"]                    # containerd ends a sandbox by SIGKILL
    write_archive(cache / "images.tar", [
        {"names": ["python:3-slim"], "layers": [base], "entrypoint": None, "command": ["python3"]},
        {"names": ["pause:local"], "layers": [base], "entrypoint": pause, "command": None},
        {"names": ["coredns:local"], "layers": [base, file_layer(cache, coredns.name, coredns / "coredns")],
         "entrypoint": ["/coredns"], "command": None},
    ], f"{tarball.name} {coredns.name}")


def make_e2e_images(cache, version):
    """Write images.tar beside e2e.test, with the names that it asks for, unless it is there already. Returns its path."""
    tarball, programs = debian(IMAGE_PACKAGES), cache / "bin" / version
    archive, recipe = programs / "images.tar", f"{tarball.name} {' '.join(E2E_SYSTEMS)}"
    if is_made(archive, recipe):
        return archive
    base = base_layer(cache, tarball)
    servers = (programs / "agnhost", cache / "bin/coredns/coredns", *certificate(cache))
    agnhost = [base, file_layer(cache, f"{programs.name}-agnhost", *servers)]
    regression = file_layer(cache, f"{programs.name}-{REGRESSION}", programs / REGRESSION)
    listed = must([str(programs / "e2e.test"), "--list-images"]).split()
    write_archive(archive, [
        {"names": called(listed, *E2E_SYSTEMS), "layers": [base], "entrypoint": None, "command": ["sh"]},
        {"names": called(listed, "pause"), "layers": agnhost, "entrypoint": ["/agnhost", "pause"], "command": None},
        {"names": called(listed, "agnhost"), "layers": agnhost, "entrypoint": ["/agnhost"], "command": ["pause"]},
        {"names": called(listed, REGRESSION), "layers": [base, regression], "entrypoint": [f"/{REGRESSION}"], "command": None},
    ], recipe)
    return archive


def make_policy_image(cache):
    """Write images.tar beside the engine of deploy/network-policy, under the name that its manifest gives it. Returns its path."""
    tarball, program = debian(IMAGE_PACKAGES), cache / "bin/policy/netpol"
    archive = program.resolve().with_name("images.tar")
    if not is_made(archive, tarball.name):
        layers = [base_layer(cache, tarball), file_layer(cache, archive.parent.name, program, directory="usr/bin/")]
        name = re.search(r"image: (\S*kube-network-policies\S*)", (ROOT / "deploy/network-policy/daemonset.yaml").read_text()).group(1)
        write_archive(archive, [{"names": [name], "layers": layers, "entrypoint": None, "command": ["/bin/netpol"]}], tarball.name)
    return archive


def called(listed, *names):
    """Of the images that e2e.test lists, those whose last part has one of these names; not those of registries that ask who one is."""
    return [image for image in listed if image.rpartition(":")[0].rpartition("/")[2] in names and "auth" not in image]


def certificate(cache):
    """The certificate and the key of agnhost's TLS servers, which nobody verifies."""
    files = [cache / "layers" / name for name in ("localhost.crt", "localhost.key")]
    must(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650", "-subj", "/CN=localhost", "-out", str(files[0]),
          "-keyout", str(files[1])])
    return files


def is_made(archive, recipe):
    stamp = archive.with_suffix(".made-of")
    return archive.exists() and stamp.exists() and stamp.read_text() == recipe


def base_layer(cache, tarball):
    """The system as an uncompressed tar."""
    layer = cache / "layers" / tarball.with_suffix("").name
    if not layer.exists():
        layer.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(tarball) as packed, open(f"{layer}.new", "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
        os.replace(f"{layer}.new", layer)
    return layer


def file_layer(cache, name, *files, directory=""):
    """A layer that adds files to a directory, which is the root's or ends in a slash."""
    layer = cache / "layers" / f"{name}.tar"
    with tarfile.open(f"{layer}.new", "w") as tar:
        for file in files:
            tar.add(file, f"{directory}{file.name}")
    os.replace(f"{layer}.new", layer)
    return layer


def digest(path):
    with open(path, "rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def plan_config(image, digests):
    """The configuration of an image, as its archive has it."""
    return {"architecture": "amd64" if os.uname().machine == "x86_64" else "arm64", "os": "linux",
            "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Labels": {"name": image["names"][0]},
                       "Entrypoint": image["entrypoint"], "Cmd": image["command"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{each}" for each in digests]}}


def write_archive(path, images, recipe):
    """Write a docker archive: manifest.json, a configuration for each image, each layer once. The recipe is kept beside it, for is_made."""
    digests = {layer: digest(layer) for image in images for layer in image["layers"]}
    manifest = []
    with tarfile.open(f"{path}.new", "w") as tar:
        def put(name, text):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))

        for image in images:
            of_this = [digests[layer] for layer in image["layers"]]
            config = json.dumps(plan_config(image, of_this)).encode()
            name = f"{hashlib.sha256(config).hexdigest()}.json"
            put(name, config)
            manifest.append({"Config": name, "RepoTags": image["names"], "Layers": [f"{each}.tar" for each in of_this]})
        for layer, name in digests.items():
            tar.add(layer, f"{name}.tar")
        put("manifest.json", json.dumps(manifest).encode())
    os.replace(f"{path}.new", path)
    path.with_suffix(".made-of").write_text(recipe)
