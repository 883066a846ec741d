"""What a call costs under cnisnoop."""

import os
import statistics
import time

import pytest

from tests.integration.conftest import host  # noqa: F401 (a fixture)
from tests.integration.test_snoop import REFERENCE, backend, needs_reference, tracing  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.root, pytest.mark.alone]


@needs_reference
def test_what_a_call_costs_with_and_without(host, backend, figure):  # noqa: F811
    """Of a Go program that does little, and of a Python program that starts others; without and with in turns."""
    static = {"type": "static", "addresses": [{"address": "10.88.0.5/24"}]}
    pod = host.pod("a")

    def reference(container_id):
        conf = {"cniVersion": "0.4.0", "name": "net", "type": "bridge", "ipam": static}
        assert host.cni("DEL", conf, container_id, pod, program=f"{REFERENCE}/bridge", CNI_PATH=REFERENCE)[0] == 0

    def naivewg(container_id):
        host.add(host.conf(), container_id, pod)
        assert host.cni("DEL", host.conf(), container_id, pod)[0] == 0

    calls = {"DEL of bridge and static": reference, "ADD and DEL of naivewg": naivewg}
    times = {(name, is_traced): [] for name in calls for is_traced in (False, True)}

    def measure(is_traced):
        for number in range(10):
            for name, call in calls.items():
                begin = time.monotonic()
                call(f"c{number}")
                times[name, is_traced].append((time.monotonic() - begin) * 1000)

    for _ in range(3):
        measure(False)
        with tracing(backend, "--pid", str(os.getpid())) as running:
            measure(True)
            assert sum(call["netns"] == pod for call in running.finish()) == 30
    for name in calls:
        without, traced = statistics.median(times[name, False]), statistics.median(times[name, True])
        figure(f"cnisnoop with {backend}: {name}: {without:.1f} ms without, {traced:.1f} ms with, ratio {traced / without:.2f}")
        assert traced < without * 30 + 500  # a bound for a machine that does other things as well
