"""What traffic between two pods goes through: a steady stream of numbered UDP packets, of which none should be lost, and beside it a TCP
connection, which should survive. Afterwards it is known how many packets were lost, and how long each of the two was silent.

Run by itself it is one end:  flow.py receive ADDRESS PORT | flow.py send ADDRESS PORT COUNT RATE. The end of stdin ends it.
"""

import contextlib
import itertools
import json
import select
import socket
import subprocess
import sys
import time

PYTHON = "/usr/bin/python3"
PORTS = itertools.count(9000)
CHUNK = bytes(4096)  # of TCP, 50 a second: more than a segment, so that the MTU matters
PATIENCE_S = 90  # TCP waits ever longer between its tries: after a break of 30 s up to 51 s


def is_over():
    return bool(select.select([sys.stdin], [], [], 0)[0])


def send(address, port, count, rate):
    """Send count packets, rate a second, each with its number, and more of them until stdin ends; then print {"sent"} as JSON. A packet
    that cannot be sent is a lost one. Returns when the other end has closed the connection: it has all of it then."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_connection((address, port), 20) as stream, socket.socket(family, socket.SOCK_DGRAM) as sender:
        stream.setblocking(False)
        begin, number = time.monotonic(), 0
        while number < count or not is_over():
            with contextlib.suppress(OSError):  # unreachable, for now
                sender.sendto(number.to_bytes(4, "big"), (address, port))
            if number % max(1, rate // 50) == 0:
                with contextlib.suppress(BlockingIOError):
                    stream.send(CHUNK)
            number += 1
            time.sleep(max(0, begin + number / rate - time.monotonic()))
        print(json.dumps({"sent": number}), flush=True)
        stream.settimeout(PATIENCE_S)
        stream.shutdown(socket.SHUT_WR)
        stream.recv(1)


class Silence:
    """The longest time between two packets, in seconds."""

    def __init__(self):
        self.longest_s, self.last = 0.0, None

    def broken(self):
        now = time.monotonic()
        self.longest_s, self.last = max(self.longest_s, now - (self.last or now)), now


def receive(address, port):
    """Print "up"; "flowing" at the first packet; when stdin and the connection have ended {"received", "silence_s", "stall_s"} as JSON:
    UDP packets, and the longest silence of UDP and of TCP."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family) as server, socket.socket(family, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        receiver.bind((address, port))
        print("up", flush=True)
        server.settimeout(20)
        stream, _ = server.accept()
        numbers, silence, stall, waiting = set(), Silence(), Silence(), [receiver, stream, sys.stdin]
        while len(waiting) > 1 and select.select(waiting, [], [], PATIENCE_S)[0]:
            for ready in select.select(waiting, [], [], 0)[0]:
                if ready is receiver:
                    if not numbers:
                        print("flowing", flush=True)
                    numbers.add(receiver.recv(16))
                    silence.broken()
                elif ready is sys.stdin:  # the last packet has been sent
                    silence.broken()
                    waiting.remove(ready)
                else:
                    stall.broken()
                    if not stream.recv(1 << 20):
                        waiting.remove(ready)
        stream.close()
        while select.select([receiver], [], [], 0.3)[0]:
            numbers.add(receiver.recv(16))
    print(json.dumps({"received": len(numbers), "silence_s": silence.longest_s, "stall_s": stall.longest_s}), flush=True)


class Flow:
    """`with Flow(from_argv, to_argv, address) as flow:` streams while the block runs, and until count packets are sent; afterwards sent,
    lost, silence_s and stall_s are known. AssertionError if the TCP connection did not survive.

    from_argv, to_argv: what puts a command into the pods; count, rate: UDP packets, and how many a second.
    """

    def __init__(self, from_argv, to_argv, address, count=10_000, rate=2_000):
        self.from_argv, self.to_argv, self.address = from_argv, to_argv, address
        self.count, self.rate = count, rate
        self.port = next(PORTS)  # a receiver of a test that failed may still be there, inside its node, until it has waited enough

    def __enter__(self):
        here = [PYTHON, "-c", open(__file__, encoding="utf-8").read()]  # noqa: SIM115 (a pod's node has another root)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.receiver = subprocess.Popen([*self.to_argv, *here, "receive", self.address, str(self.port)], **pipes)
        assert self.receiver.stdout.readline() == "up\n"
        numbers = [self.address, str(self.port), str(self.count), str(self.rate)]
        self.sender = subprocess.Popen([*self.from_argv, *here, "send", *numbers], **pipes)
        assert self.receiver.stdout.readline() == "flowing\n"
        return self

    def __exit__(self, kind, *exc_info):
        try:
            if kind is None:
                self.sender.stdin.close()
                sent = self.sender.stdout.readline()
                self.receiver.stdin.close()
                assert sent and self.sender.wait(timeout=PATIENCE_S + 30) == 0, "the TCP connection broke"
                said = json.loads(self.receiver.stdout.readline())
                self.sent, self.silence_s, self.stall_s = json.loads(sent)["sent"], said["silence_s"], said["stall_s"]
                self.lost = self.sent - said["received"]
        finally:
            for process in (self.sender, self.receiver):
                process.kill()
                process.wait()
                process.stdout.close()
                process.stdin.close()


if __name__ == "__main__":
    if sys.argv[1] == "send":
        send(sys.argv[2], *map(int, sys.argv[3:6]))
    else:
        receive(sys.argv[2], int(sys.argv[3]))
