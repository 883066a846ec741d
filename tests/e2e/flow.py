"""A steady stream of numbered UDP packets between two pods, and what became of it: how many were lost, and the longest silence.

Run by itself it is one end of the stream:  flow.py receive ADDRESS PORT | flow.py send ADDRESS PORT COUNT RATE
"""

import itertools
import json
import socket
import subprocess
import sys
import time

PYTHON = "/usr/bin/python3"
PORTS = itertools.count(9000)


def send(address, port, count, rate):
    """Send count packets, rate a second, each with its number. A packet that cannot be sent is a lost one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        begin = time.monotonic()
        for number in range(count):
            try:
                sender.sendto(number.to_bytes(4, "big"), (address, port))
            except OSError:
                pass  # unreachable, for now
            time.sleep(max(0, begin + number / rate - time.monotonic()))
        for _ in range(20):  # the end, more than once: it may get lost as well
            sender.sendto(b"end", (address, port))
            time.sleep(0.02)


def receive(address, port):
    """Print "up"; "flowing" at the first packet; after the end of the stream or 20 s of silence, {"received", "silence_s"} as JSON."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        receiver.bind((address, port))
        receiver.settimeout(20)
        print("up", flush=True)
        numbers, silence_s, last = set(), 0.0, None
        try:
            while True:
                packet = receiver.recv(16)
                now = time.monotonic()
                if packet == b"end":
                    break
                if last is None:
                    print("flowing", flush=True)
                silence_s, last = max(silence_s, now - (last or now)), now
                numbers.add(packet)
        except socket.timeout:
            silence_s = max(silence_s, 20.0)
    print(json.dumps({"received": len(numbers), "silence_s": silence_s}), flush=True)


class Flow:
    """`with Flow(from_argv, to_argv, address) as flow:` streams while the block runs; afterwards lost, count and silence_s are known.

    from_argv, to_argv: what puts a command into the pods. The block should leave time: the stream takes count / rate seconds.
    """

    def __init__(self, from_argv, to_argv, address, count=10_000, rate=2_000):
        self.from_argv, self.to_argv, self.address = from_argv, to_argv, address
        self.count, self.rate = count, rate
        self.port = next(PORTS)  # a receiver of a test that failed may still be there, inside its node, until it has waited enough

    def __enter__(self):
        here = [PYTHON, "-c", open(__file__, encoding="utf-8").read()]  # noqa: SIM115 (a pod's node has another root)
        self.receiver = subprocess.Popen([*self.to_argv, *here, "receive", self.address, str(self.port)], stdout=subprocess.PIPE, text=True)
        assert self.receiver.stdout.readline() == "up\n"
        numbers = [self.address, str(self.port), str(self.count), str(self.rate)]
        self.sender = subprocess.Popen([*self.from_argv, *here, "send", *numbers])
        assert self.receiver.stdout.readline() == "flowing\n"
        return self

    def __exit__(self, kind, *exc_info):
        try:
            if kind is None:
                self.sender.wait(timeout=60)
                said = json.loads(self.receiver.stdout.readline())
                self.lost, self.silence_s = self.count - said["received"], said["silence_s"]
        finally:
            for process in (self.sender, self.receiver):
                process.kill()
                process.wait()
            self.receiver.stdout.close()


if __name__ == "__main__":
    if sys.argv[1] == "send":
        send(sys.argv[2], *map(int, sys.argv[3:6]))
    else:
        receive(sys.argv[2], int(sys.argv[3]))
