"""Labs for end-to-end tests: up before the first test of a module, gone without a trace after the last."""

import contextlib
import signal

import pytest

from deploy import lab as labs


@contextlib.contextmanager
def lab_up(name, nodes=2, pods=1, families=("ipv4", "ipv6"), underlay="ipv4", control=contextlib.nullcontext, kubeconfig=""):
    """A lab in which every pod has been reached. control(lab): what has to be there before the nodes boot, for the time of the lab;
    kubeconfig: a path with {node} in it, of an API server that agents are to follow."""
    lab = labs.Lab(name, verbose=False)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))  # by default nothing would be cleaned up
    try:
        kind = {"families": list(families), "underlay": underlay, **({"kubeconfig": kubeconfig} if kubeconfig else {})}
        with labs.built_or_undone(lab, nodes, pods, labs.LAB_FILE.parents[1], kind), control(lab):
            labs.boot_all(lab)
            labs.wait_first_pongs(lab, labs.plan_pairs(lab))
            yield lab
    finally:
        with labs.signals_ignored():
            labs.down(lab)
        signal.signal(signal.SIGTERM, before)


def node_sh(lab, node, command):
    """What a shell command prints in a node; it has to work."""
    return labs.must([*labs.node_argv(lab, node), "sh", "-c", command])
