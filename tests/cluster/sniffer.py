"""Watches the underlay for packets of pods and Services that are not inside the tunnel:  python3 -m tests.cluster.sniffer CIDR...

It prints a line for each of them as it comes, and at the end, when stdin ends, {"frames", "wireguard", "dropped": unseen for lack of time}.
"""
import ipaddress
import json
import select
import sys
import time

from deploy import lab


def main(cidrs):
    networks = [ipaddress.ip_network(cidr) for cidr in cidrs]
    capture, counts = lab.open_sniffer(), {"frames": 0, "wireguard": 0}
    print("ready", flush=True)
    while True:
        ready = select.select([capture, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            break
        frame, (interface, *_) = capture.recvfrom(256)
        if interface in (lab.BRIDGE, "lo"):          # a frame that was seen at its port
            continue
        counts["frames"] += 1
        counts["wireguard"] += lab.classify(frame) == "wireguard"
        if is_clear(frame, networks):
            print(time.strftime("%H:%M:%S"), lab.describe(frame), ports(frame), flush=True)
    counts["dropped"] = int.from_bytes(capture.getsockopt(263, 6, 8)[4:], sys.byteorder)  # SOL_PACKET, PACKET_STATISTICS
    print(json.dumps(counts), flush=True)


def is_clear(frame, networks):
    """Whether a frame has an address of a pod or a Service on its outside."""
    try:
        ip = lab.parse_frame(frame)
    except (IndexError, ValueError):
        return False
    addresses = [ipaddress.ip_address(ip[end]) for end in ("src", "dst")]
    return any(address in network for address in addresses for network in networks)


def ports(frame):
    payload = lab.parse_frame(frame)["payload"]
    return f"{payload[0] << 8 | payload[1]} > {payload[2] << 8 | payload[3]}"


if __name__ == "__main__":
    main(sys.argv[1:])
