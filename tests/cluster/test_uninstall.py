"""deploy/uninstall.yaml, as its own first lines say it, and back again."""

import re
import shlex

from deploy.cluster import cluster as clusters
from tests.cluster import objects

LOOK = """ls -d /sys/class/net/mncni* /etc/cni/net.d/*mncni* /run/netns/mncni* /run/mncni/ready /var/lib/mncni/key 2>/dev/null
nft list tables | grep mncni; ip route show table all proto 201; true"""


def guide(driver):
    """The commands at the top of deploy/uninstall.yaml, as words."""
    text = (driver.cluster.source / "deploy/uninstall.yaml").read_text()
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"^#   (kubectl .*)$", text, re.MULTILINE)]


def test_uninstall_and_install_again(driver, figure):
    # Nodes with pods on the network refuse.
    driver.kubectl("delete", "namespace", objects.NAMESPACE, "--ignore-not-found", timeout_s=300)
    driver.kubectl("delete", "deployment", "-n", "kube-system", "coredns")
    driver.kubectl("wait", "--for=delete", "pods", "-n", "kube-system", "-l", "k8s-app=kube-dns", "--timeout=60s")
    assert any(driver.inside(node, "sh", "-c", LOOK) for node in driver.nodes)
    for words in guide(driver):
        # Relative paths are of the checkout.
        words = [word.replace("=deploy/", f"={driver.cluster.source}/deploy/") for word in words]
        words = [re.sub(r"^(--from-file=)?([a-z]+\.py|deploy/.*|\.)$", rf"\1{driver.cluster.source}/\2", word) for word in words]
        driver.kubectl(*words, timeout_s=300)
    left = {node: driver.inside(node, "sh", "-c", LOOK) for node in driver.nodes}
    figure(f"after uninstall ({driver.name}): {sum(map(bool, left.values()))} of {len(left)} nodes with something of MNCNI")
    assert not any(left.values()), left
    clusters.install(driver.cluster)
