"""deploy/lat.yaml, bandwidth.yaml, quickack.yaml: their container's script as it stands, in a root directory of its own, while another
network writes its conflist again and again."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

import mncni

pytestmark = pytest.mark.root

DEPLOY = Path(mncni.__file__).parent / "deploy"
NAMES = ("lat", "bandwidth", "quickack")
THEIRS = json.dumps({"cniVersion": "0.3.1", "name": "cbr0", "plugins": [{"type": "flannel"}, {"type": "portmap"}]}, indent=2)


def script(name):
    """What the container runs, its indentation taken off."""
    text = (DEPLOY / f"{name}.yaml").read_text()
    block = re.search(r"- \|\n((?: {14}.*\n)+)", text).group(1)
    return "".join(line[14:] + "\n" for line in block.splitlines())


class Container:
    """The script in a root directory that has the machine's /usr and the volumes of the manifest."""

    def __init__(self, root, name, remove=""):
        self.root = root
        for path in ("usr", "proc", "dev", "tmp", "mncni", "etc/cni/net.d", "opt/cni/bin", "var/lib/mncni/backup"):
            (root / path).mkdir(parents=True, exist_ok=True)
        for link in ("bin", "sbin", "lib", "lib64"):
            if not (root / link).is_symlink():
                (root / link).symlink_to(f"usr/{link}")
        (root / "mncni/mncni.py").write_text(Path(mncni.__file__).read_text())
        mounts = f"mount --rbind /usr {root}/usr && mount -t proc proc {root}/proc && mount --rbind /dev {root}/dev"
        argv = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec chroot {root} env -i PATH=/usr/bin REMOVE={remove} sh -c "$1"', "sh"]
        self.process = subprocess.Popen([*argv, script(name)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def stop(self):
        """What it said."""
        self.process.terminate()
        return self.process.communicate(timeout=30)[0]


@pytest.fixture
def container(tmp_path):
    made = []

    def start(name, **options):
        made.append(Container(tmp_path / "root", name, **options))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.stop()


def plugins(path):
    """The plugins of the conflist; a half-written file would be no JSON, and a failure."""
    return [plugin.get("plugin", plugin["type"]) for plugin in json.loads(path.read_text())["plugins"]]


def wait_for(path, wanted, timeout_s=15):
    """Seconds until the conflist has these plugins, looked at without pause."""
    begin = time.monotonic()
    while plugins(path) != wanted:
        assert time.monotonic() - begin < timeout_s, plugins(path)
        time.sleep(0.001)
    return time.monotonic() - begin


def put(path, text):
    """Write it as other networks do."""
    (path.parent / ".theirs").write_text(text)
    os.rename(path.parent / ".theirs", path)


@pytest.mark.parametrize("name", NAMES)
def test_the_plugin_is_in_the_conflist_and_comes_back_within_ten_seconds(container, tmp_path, figure, name):
    path = tmp_path / "root/etc/cni/net.d/10-theirs.conflist"
    path.parent.mkdir(parents=True)
    put(path, THEIRS)
    running = container(name)
    wait_for(path, ["flannel", "portmap", name])
    put(path, THEIRS.replace("cbr0", "cbr1"))
    back_s = wait_for(path, ["flannel", "portmap", name])
    figure(f"deploy/{name}.yaml: back in a conflist that was written anew after {back_s:.1f} s")
    assert back_s < 10
    assert os.access(tmp_path / "root/opt/cni/bin/mncni", os.X_OK)
    assert [path.name for path in (tmp_path / "root/etc/cni/net.d").iterdir()] == ["10-theirs.conflist"]
    assert "added" in running.stop()


def test_it_is_taken_out_again_and_the_programs_stay(container, tmp_path):
    path = tmp_path / "root/etc/cni/net.d/10-theirs.conflist"
    path.parent.mkdir(parents=True)
    put(path, THEIRS)
    running = container("lat")
    wait_for(path, ["flannel", "portmap", "lat"])
    running.stop()
    container("lat", remove="--remove")
    wait_for(path, ["flannel", "portmap"])
    assert json.loads(path.read_text()) == json.loads(THEIRS)
    assert (tmp_path / "root/opt/cni/bin/mncni.py").exists()


def test_what_is_wrong_is_said_once_and_it_goes_on(container, tmp_path):
    running = container("lat")
    path = tmp_path / "root/etc/cni/net.d/10-theirs.conflist"
    deadline = time.monotonic() + 15
    while not (tmp_path / "root/tmp/said.before").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    put(path, THEIRS)
    wait_for(path, ["flannel", "portmap", "lat"])
    said = running.stop()
    assert said.count("there is no network in /etc/cni/net.d yet") == 1
