"""What the way of pods' packets costs where the kernel does the encrypting: `make bench` has the same over wireguard-go."""

import statistics

import pytest

from tests.bench.bench import bench_network

pytestmark = pytest.mark.root


@pytest.mark.kernel("wireguard")
def test_pods_get_a_good_part_of_what_a_bare_wireguard_device_gets(figure):
    middle = {key: statistics.median(values) for key, values in bench_network(2).items()}
    throughput, latency = (middle["pods", unit] / middle["bare", unit] for unit in ("Mbit/s", "ms"))
    shown = ", ".join(f"{who} {middle[who, 'Mbit/s']:.0f} Mbit/s, {middle[who, 'ms']:.2f} ms" for who in ("pods", "bare"))
    figure(f"kernel WireGuard: {shown}: pods have {throughput:.2f} of the throughput, {latency:.2f} times the latency")
    assert throughput > 0.3 and latency < 3
