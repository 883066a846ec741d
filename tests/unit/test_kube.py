"""What kube.py serves over HTTP: health, readiness, figures, to whom; and the flag that says where."""

import argparse
import http.client
import socket
import subprocess
import threading
import time

import pytest

import kube


@pytest.fixture
def server():
    """A function (path, host) -> (status, text) that asks a server of these pages."""

    def broken():
        raise ValueError("nonsense")

    pages = {"/healthz": lambda: (200, "ok\n"), "/metrics": lambda: (200, "figures\n"), "/broken": broken}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threading.Thread(target=kube.serve_http, args=(("127.0.0.1", port), pages), daemon=True).start()
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ask(path, method="GET"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    return ask


def test_pages_are_served_and_others_are_named(server):
    assert server("/healthz") == (200, "ok\n")
    assert server("/metrics?name=x") == (200, "figures\n")
    assert server("/") == (404, "there are: /healthz, /metrics, /broken\n")
    assert server("/healthz", method="POST")[0] == 501


def test_a_server_at_all_addresses_serves_both_families():
    listener = kube.open_listener(("::", 0))
    socket.create_connection(("127.0.0.1", listener.getsockname()[1])).close()
    socket.create_connection(("::1", listener.getsockname()[1])).close()
    listener.close()


def test_a_page_that_fails_says_so_and_the_next_is_served(server):
    assert server("/broken") == (500, "ValueError: nonsense\n")
    assert server("/healthz") == (200, "ok\n")


OTHER = [
    ("192.0.2.7", "/healthz", 404),
    ("192.0.2.7", "/metrics", 200),
    ("::ffff:192.0.2.7", "/readyz", 404),
    ("fe80::1%eth0", "/healthz", 404),
]
OWN = [("127.0.0.1", "/healthz", 200), ("::ffff:127.0.0.1", "/healthz", 200), ("::1", "/healthz", 200)]


@pytest.mark.parametrize("client, path, code", OTHER + OWN)
def test_other_hosts_get_metrics_only(client, path, code):
    assert kube.http_page({"/healthz": lambda: (200, ""), "/metrics": lambda: (200, "")}, path, client)[0] == code


class FakeLoop:
    def __init__(self):
        self.now, self.beat, self.reason = 1000.0, 1000.0, ""

    def clock(self):
        return self.now


def test_health_is_that_the_loop_comes_round_and_readiness_that_the_loop_has_no_reason_against_it():
    fake = FakeLoop()
    pages = kube.pages(fake, None, {})
    assert pages["/healthz"]() == pages["/readyz"]() == (200, "ok\n")
    fake.reason = "no default route"
    assert pages["/readyz"]() == (503, "no default route\n")
    fake.now += kube.STUCK_S
    assert pages["/healthz"]() == (503, "the loop has not come round for 120 s\n")


@pytest.mark.parametrize("text", ["28386", "localhost:1", "1.2.3.4", "1.2.3.4:x", "1.2.3.4:99999", ":1", "[::1:5"])
def test_a_bad_listen_address_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="like 127.0.0.1:28386"):
        kube.listen_address(text)


def test_listen_addresses_of_both_families():
    assert kube.listen_address("0.0.0.0:1") == ("0.0.0.0", 1)
    assert kube.listen_address("[::]:28386") == ("::", 28386)


def test_a_process_that_is_being_started_stops_no_answer(server):
    """Between fork and exec it has copies of all descriptors, so what the server closes stays open for a moment."""
    ended = threading.Event()

    def start_processes():
        while not ended.is_set():
            subprocess.run(["/bin/true"], preexec_fn=lambda: time.sleep(0.02), check=True)

    starter = threading.Thread(target=start_processes)
    starter.start()
    try:
        assert [server("/healthz") for _ in range(300)] == [(200, "ok\n")] * 300
    finally:
        ended.set()
        starter.join()
