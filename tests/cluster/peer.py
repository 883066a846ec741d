"""Runs in pods and on nodes, alone: no file of the project is there. All ports are for TCP and UDP, all families.

    peer.py serve PORT NAME      answer whoever asks with {"name": NAME, "peer": the asker's address}, and with as many bytes as asked for
    peer.py ask                  stdin: [[protocol, host, port, bytes], ...]; stdout: the answers in that order, or {"error": ...};
                                 the protocol "connect" is TCP, with nothing asked
    peer.py hello HOST PORT      ask by UDP until somebody answers; then the time of day in seconds
    peer.py stream PROTOCOL HOST PORT       ask every 10 ms until stdin ends; then {"sent", "lost", "gap_s": the longest silence, "broken"}

bytes: of question and answer; "mtu" for the largest that fits into one packet, which may then not be fragmented.
"""
import json
import select
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

TIMEOUT_S = 5
EVERY_S = 0.01
# Family -> level, option, bytes of headers.
MTU_DISCOVER = {socket.AF_INET: (socket.IPPROTO_IP, 10, 28), socket.AF_INET6: (socket.IPPROTO_IPV6, 23, 48)}
HTTP = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{}"


def listen(kind, port):
    """A socket for both families."""
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("::", port))
    return sock


def answer_to(name, peer, size=0):
    peer = peer[0].replace("::ffff:", "")
    return json.dumps({"name": name, "peer": peer}).ljust(size).encode()


def serve(port, name):
    udp, tcp = listen(socket.SOCK_DGRAM, port), listen(socket.SOCK_STREAM, port)
    threading.Thread(target=serve_udp, args=(udp, name), daemon=True).start()
    tcp.listen(512)
    print(f"{name} serves {port}", flush=True)
    while True:
        connection, peer = tcp.accept()
        threading.Thread(target=serve_tcp, args=(connection, peer, name), daemon=True).start()


def serve_udp(sock, name):
    """It answers from the address that was asked: of several that a node has, the kernel would take another one."""
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    while True:
        question, ancillary, _, peer = sock.recvmsg(65536, socket.CMSG_SPACE(20))
        asked = [(level, kind, data[:16] + bytes(4)) for level, kind, data in ancillary]  # the address, and any interface
        # What a stream sends is a number, which it wants back.
        reply = question if question.startswith(b"#") else answer_to(name, peer, len(question))
        try:
            sock.sendmsg([reply], asked, 0, peer)
        except OSError as error:
            print(error, flush=True)


def serve_tcp(connection, peer, name):
    try:
        with connection, connection.makefile("rwb") as file:
            for line in file:
                if line.startswith(b"GET "):
                    text = answer_to(name, peer).decode()
                    file.write(HTTP.format(len(text), text).encode())
                    file.flush()
                    return
                file.write(line if line.startswith(b"#") else answer_to(name, peer, len(line) - 1) + b"\n")
                file.flush()
    except OSError:
        pass


def open_to(protocol, host, port):
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind)
    sock.settimeout(TIMEOUT_S)
    sock.connect(address)
    return sock


def device_mtu():
    """The MTU of a pod's device."""
    with open("/sys/class/net/eth0/mtu") as file:
        return int(file.read())


def ask(protocol, host, port, size=0):
    try:
        with open_to(protocol, host, port) as sock:
            if protocol == "connect":
                return {}
            if size == "mtu":
                level, option, headers = MTU_DISCOVER[sock.family]
                sock.setsockopt(level, option, 2)
                size = device_mtu() - headers
            if protocol == "udp":
                sock.send(b"?".ljust(size))
                reply = sock.recv(65536)
            else:
                sock.sendall(b"?".ljust(size) + b"\n")
                reply = sock.makefile("rb").readline()
            assert len(reply) >= size, f"{len(reply)} bytes"
            return json.loads(reply)
    except (OSError, ValueError, AssertionError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def ask_all(questions):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda question: ask(*question), questions))


def hello(host, port):
    sock = open_to("udp", host, port)
    sock.settimeout(0.01)
    while True:
        try:
            sock.send(b"?")
            sock.recv(65536)
            return time.time()
        except OSError:                              # no answer, or no way yet
            time.sleep(0.001)


def stream(protocol, host, port):
    """Send numbers and count those that come back."""
    sock = open_to(protocol, host, port)
    sock.settimeout(0)
    sent, seen, gap, broken, rest = 0, set(), 0.0, "", b""
    began = last = due = time.monotonic()
    ending = 0
    print("streaming", file=sys.stderr, flush=True)
    while not broken and not (ending and time.monotonic() > ending):
        wait = max(0, due - time.monotonic())
        ready = select.select([sock] if ending else [sock, sys.stdin], [], [], wait)[0]
        try:
            if sock in ready:
                data = sock.recv(65536)
                if protocol == "tcp" and not data:
                    broken = "closed"
                rest += data + (b"\n" if protocol == "udp" else b"")
                *lines, rest = rest.split(b"\n")
                seen.update(line for line in lines if line)
                gap, last = max(gap, time.monotonic() - last), time.monotonic()
            if sys.stdin in ready:
                ending = time.monotonic() + 2        # for what is on its way
                gap = max(gap, time.monotonic() - last)
            if not ending and time.monotonic() >= due:
                sent, due = sent + 1, due + EVERY_S
                sock.send(b"#%d" % sent + (b"\n" if protocol == "tcp" else b""))
        except (BlockingIOError, ConnectionRefusedError):
            pass                                     # a lost packet, or one that nobody took
        except OSError as error:
            broken = str(error)
    return {"sent": sent, "lost": sent - len(seen), "gap_s": round(gap, 2), "broken": broken, "seconds": round(time.monotonic() - began, 1)}


def main(verb, *words):
    if verb == "serve":
        serve(int(words[0]), words[1])
    elif verb == "ask":
        print(json.dumps(ask_all(json.load(sys.stdin))))
    elif verb == "hello":
        print(hello(words[0], int(words[1])))
    elif verb == "stream":
        print(json.dumps(stream(words[0], words[1], int(words[2]))))


if __name__ == "__main__":
    main(*sys.argv[1:])
