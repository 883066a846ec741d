"""What the way of pods' packets costs where the kernel does the encrypting: `make bench` has the same over wireguard-go."""

import statistics

import pytest

from tests.bench import network

pytestmark = pytest.mark.root


@pytest.mark.kernel("wireguard")
def test_pods_get_a_good_part_of_what_a_bare_wireguard_device_gets(figure):
    names = network.possible_ways()
    middle = {key: statistics.median(values) for key, values in network.bench_network(3, names).items()}
    for who in names:
        shown = ", ".join(f"{middle[who, unit]:.2f} {unit}" for unit in network.UNITS if (who, unit) in middle)
        figure(f"kernel WireGuard, {who}: {shown}; {middle[who, 'Mbit/s'] / middle['bare', 'Mbit/s']:.2f} of bare's throughput")
    throughput, latency = (middle["ours", unit] / middle["bare", unit] for unit in ("Mbit/s", "ms"))
    assert throughput > 0.6 and latency < 2.5
