"""What somebody with a little access to a node or to the cluster can do to all: local users at the HTTP port, holders of a node's tokens.

Each attack has a positive control, which shows that it was one.
"""

import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kube

ROOT = Path(kube.__file__).parent
THREADS = 3  # the loop's, the HTTP server's, and the watchdog's, which is made anew with each turn
PATIENCE_S = 2  # what the program below gives a client
# A program whose loop turns as fast as it can, with the page of a cluster of some thousand nodes; it prints how often it turned.
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
import kube
kube.PATIENCE_S = 2
class Loop:
    reason, turns, clock = "", 0, staticmethod(time.monotonic)
    def turn(self):
        self.turns += 1
        time.sleep(0.001)
loop = Loop()
figures = {("mncni_build_info", (("node", f"n{number}"),)): number for number in range(20000)}
look = lambda loop: {**figures, ("turns", ()): loop.turns}
kube.run_loop(loop, loop.turn, ("127.0.0.1", int(sys.argv[2])), look, {"turns": ("counter", "")})
"""


class Program:
    """The running program, and how it does."""

    def __init__(self, *argv):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(ROOT), str(self.port), *argv], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 20
        while self.health() != 200:
            assert time.monotonic() < deadline

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def get(self, path):
        """(HTTP status, text), or (0, "") if there was no answer."""
        with contextlib.suppress(OSError), self.connect() as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
            return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2].decode()
        return 0, ""

    def health(self):
        return self.get("/healthz")[0]

    def turns(self):
        return int(re.search(r"^turns (\S+)", self.get("/metrics")[1], re.MULTILINE).group(1).partition("e")[0])

    def usage(self):
        """(threads, descriptors, MB of memory)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        threads, memory = (int(re.search(rf"{key}:\s+(\d+)", status).group(1)) for key in ("Threads", "VmRSS"))
        return threads, len(os.listdir(f"/proc/{self.process.pid}/fd")), memory / 1024

    def stop(self):
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def program():
    program = Program()
    yield program
    program.stop()


# ---- clients of the HTTP port -----------------------------------------------------------------------------------------------

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
SENT = {  # what each client of an attack sends, and never reads an answer
    "silent": b"",
    "half a request": b"GET /met",
    "never reading": REQUEST,
    "pipelined": REQUEST * 100,
    "huge headers": b"GET /metrics HTTP/1.1\r\n" + b"X: " + b"x" * 60000 + b"\r\n\r\n",
    "HTTP/0.9": b"GET /metrics\r\n",
    "HTTP/1.0": b"GET /metrics HTTP/1.0\r\n\r\n",
    "no HTTP": os.urandom(3000),
    "a body without end": b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 60000,
}


@pytest.mark.parametrize("what", SENT)
def test_hundreds_of_bad_clients_cost_nothing_lasting(program, what, figure):
    program.get("/metrics")
    _, descriptors, memory = program.usage()
    clients = []
    for _ in range(500):
        clients.append(program.connect())
        clients[-1].settimeout(1)
        with contextlib.suppress(OSError):
            clients[-1].sendall(SENT[what])
    assert program.usage()[1] > descriptors + 8, "the clients are there"
    before = time.monotonic()
    assert program.health() == 200
    took = time.monotonic() - before
    most = program.usage()
    costs = f"{most[0]} threads, {most[1]} descriptors, +{most[2] - memory:.0f} MB"
    figure(f"500 clients, {what}: {costs}; /healthz after {took * 1000:.0f} ms")
    assert took < 5
    assert most[0] <= THREADS and most[1] <= descriptors + kube.CLIENTS + 2 and most[2] < memory + 150
    for client in clients:
        client.close()
    deadline = time.monotonic() + PATIENCE_S + 5
    while program.usage()[1] > descriptors:
        assert time.monotonic() < deadline, program.usage()
        time.sleep(0.1)
    assert program.health() == 200


def test_a_client_that_stays_is_closed_in_the_end_and_one_that_dies_at_once(program):
    with program.connect() as client:
        client.settimeout(0.5)
        before, heard = time.monotonic(), None
        while heard is None:
            with contextlib.suppress(socket.timeout):
                try:
                    client.send(b"z")  # a byte now and then gives it no more time
                    heard = client.recv(1)
                except ConnectionError:
                    heard = b""
        assert heard == b""
        assert PATIENCE_S - 1 < time.monotonic() - before < PATIENCE_S + 5
    descriptors = program.usage()[1]
    client = program.connect()
    client.sendall(REQUEST)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
    client.close()
    deadline = time.monotonic() + 5
    while program.usage()[1] != descriptors:
        assert time.monotonic() < deadline
        time.sleep(0.05)


FLOOD = """
import socket, sys
while True:
    try:
        client = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=1)
        client.sendall(b"GET /metrics HTTP/1.1\\r\\n\\r\\n")
        client.close()
    except OSError:
        pass
"""


@pytest.mark.alone
def test_a_flood_of_clients_neither_starves_health_nor_stops_the_loop(program, figure):
    quiet = program.turns()
    time.sleep(2)
    quiet = (program.turns() - quiet) / 2
    floods = [subprocess.Popen([sys.executable, "-c", FLOOD, str(program.port)]) for _ in range(3)]
    try:
        time.sleep(1)
        waits, first, begin = [], program.turns(), time.monotonic()
        while time.monotonic() < begin + 5:
            before = time.monotonic()
            assert program.health() == 200
            waits.append(time.monotonic() - before)
        rate = (program.turns() - first) / (time.monotonic() - begin)
        usage = program.usage()
    finally:
        for flood in floods:
            flood.kill()
            flood.wait()
    figure(f"three floods of clients: /healthz within {max(waits):.2f} s; the loop turned {rate:.0f} times a second, {quiet:.0f} without")
    assert max(waits) < 8 and rate > quiet / 20 and usage[0] <= THREADS
    assert program.health() == 200


def test_a_loop_that_hangs_ends_the_process_and_says_where_and_nobody_can_keep_it_alive():
    """No probe of kubelet has to get through for that."""
    hang = PROGRAM.replace("time.sleep(0.001)", "time.sleep(0.001 if self.turns < 50 else 999)").replace("PATIENCE_S = 2", "STUCK_S = 1")
    process = subprocess.Popen([sys.executable, "-c", hang, str(ROOT), "0"], stderr=subprocess.PIPE, text=True)
    assert process.wait(30) == 1
    assert re.search(r'File "<string>", line \d+ in turn', process.stderr.read())


def test_a_user_who_takes_the_port_first_gets_the_pages_and_nothing_else():
    """Whatever the squatter answers, the loop turns, and the pages are back when the port is free."""
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        port = squatter.getsockname()[1]
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(ROOT), str(port)], stderr=subprocess.PIPE, text=True)
        try:
            assert "trying again every 5 s" in process.stderr.readline(), "it came too late"
            squatter.close()
            with contextlib.ExitStack() as stack:
                stack.callback(process.kill)
                deadline = time.monotonic() + 20
                program = Program.__new__(Program)
                program.port = port
                while program.health() != 200:
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.1)
                assert program.turns() > 1000
        finally:
            process.kill()
            process.wait(10)
