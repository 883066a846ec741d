#!/usr/bin/python3
"""cnisnoop: see every CNI call on this node as it happens, and what else tells why a pod has no network.

    sudo ./cnisnoop.py trace                 each call: command, plugin, container, stdin, stdout, exit code, duration, delegates
    sudo ./cnisnoop.py trace --changes       the same, and what each call changed on the host and in the pod
    ./cnisnoop.py view FILE                  a recording (trace --out FILE) again
    sudo ./cnisnoop.py cache                 the results that libcni keeps in /var/lib/cni/results, stale ones marked
    sudo ./cnisnoop.py doctor                which conflist is in use, and what is wrong: exit status 0 nothing, 1 findings

How a call is found: a CNI call is a program that is started with CNI_COMMAND in its environment. The backend, bpftrace or strace,
reports each such start, what the process and its children read from its standard input and write to its standard output and error,
and its end. A program that a plugin starts from a directory of CNI_PATH, or from its own, is a delegate, nested below its caller;
any other is a command that the plugin ran.

    bpftrace   >= 0.17, tracepoints alone: no kprobes and no kernel structs, so that no kernel version matters. Sees the whole machine.
    strace     where there is no bpftrace: attaches to the container runtimes and follows what they start, which slows them down.

Both give the same small events, which are tuples (kind, time in ns, pid, ...):

    ("begin", ts, pid, owner, parent, comm)    the process wants to execute; owner: nearest process above it that was reported, or 0
    ("path" | "arg", ts, pid, text)            what it executes, and one argument each
    ("env", ts, pid, part, text)               a CNI_* variable, in parts: 8 * number + part
    ("exec", ts, pid, in, out, err)            it did; streams behind its descriptors 0, 1, 2: 8 * owning pid + 1, 2 or 3, + 4 for
                                               what was put there after the owner's first program
    ("noexec", ts, pid, errno)                 it could not
    ("size", ts, pid, stream, n), ("data", ts, stream, bytes)    n bytes went through a stream, and their contents in pieces
    ("exit", ts, pid, code)                    256 + exit status, or the signal; 0: not known
    ("lost", 0, n)                             the backend could not keep up

Reading order: the backends' program and parsers; `Calls`, which makes calls of events; how they are printed; changes; cache; doctor;
the command line. All but the last four sections is pure: tests feed recorded output of the backends.
"""
import argparse
import base64
import contextlib
import errno
import json
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from datetime import datetime

LIMIT = 65536          # bytes kept of each stream of a call
DESCRIPTORS = 13       # followed per process: 0 to 12; bash puts saved ones from 10 on
CHUNK = 160            # bytes of a string or buffer in one event: bpftrace 0.17 takes up to 200, but a probe has 512 bytes of stack
CANARY = "cnisnoop"    # CNI_COMMAND of a process of our own, which shows that the probes are there
RUNTIMES = ("containerd", "crio", "podman", "conmon", "kubelet", "cri-dockerd", "dockerd", "buildkitd", "nomad", "multus-daemon")
# Programs that start another one in their place or below them: never a plugin themselves.
WRAPPERS = ("env", "nsenter", "setpriv", "unshare", "sudo", "su", "runuser", "chroot", "timeout", "nice", "ionice", "stdbuf", "strace", "ip",
            "flock", "setsid", "sh", "bash", "dash")
PACKAGES = {"bpftrace": "bpftrace", "strace": "strace", "ip": "iproute2", "tc": "iproute2", "nft": "nftables", "nsenter": "util-linux",
            "wg": "wireguard-tools", "unshare": "util-linux", "python3": "python3"}


class SnoopError(Exception):
    """What went wrong, in words for the user, with the way out."""


# ---------------------------------------------------------------------------------------------------------------------
# bpftrace: the program and its output
# ---------------------------------------------------------------------------------------------------------------------
# Maps: @parent[task] its parent; @in[task] nearest process that was reported, itself included; @fd[process, descriptor] stream;
# @code[process] how it is going to end; @sent[stream] bytes. Loop counters are the only variables that the kernel's verifier
# has to follow: whatever else a loop changes is in a map, else it runs out of patience.

PROCESSES = """
tracepoint:sched:sched_process_fork {
  @parent[args->child_pid] = pid;
  if (@in[pid]) {
    @in[args->child_pid] = @in[pid];
    $i = 0;
    while ($i < %(descriptors)d) {
      $s = @fd[pid, $i];
      if ($s) { @fd[args->child_pid, $i] = $s; }
      $i++;
    }
  }
}
tracepoint:sched:sched_process_exec /@try[args->old_pid]/ {
  delete(@try[args->old_pid]);
  delete(@code[pid]);
  $i = 0;
  while ($i < %(descriptors)d) {
    if ($i > 2) { delete(@fd[pid, $i]); }
    else { if (!@fd[pid, $i]) { @fd[pid, $i] = pid * 8 + $i + 1 + (@in[pid] == pid ? 4 : 0); } }
    $i++;
  }
  @in[pid] = pid;
  printf("exec|%%llu|%%d|%%d|%%d|%%d", nsecs, pid, @fd[pid, 0], @fd[pid, 1], @fd[pid, 2]);
}
tracepoint:signal:signal_deliver /@in[pid] && args->sa_handler == 0 && !@code[pid]/ {
  $s = args->sig;
  if ($s < 17 || ($s > 23 && $s < 28) || $s > 28) { @code[pid] = $s; }
}
tracepoint:syscalls:sys_enter_exit_group /@in[pid]/ {
  if (!@code[pid]) { @code[pid] = 256 + (args->error_code & 255); }
}
tracepoint:syscalls:sys_enter_close /@in[pid]/ { delete(@fd[pid, args->fd]); }
"""

# The loop looks for CNI_COMMAND and notes every CNI_* variable. Long values come in parts, for a string holds 199 characters;
# what a part shows behind the end of the value is thrown away by the reader.
EXECUTE = """
tracepoint:syscalls:sys_enter_%(call)s {
  $p = (uint64)args->envp; $i = 0;
  while ($i < 512) {
    $v = *(uint64*)uptr($p + 8 * $i);
    if ($v == 0) { break; }
    if (*(uint32*)uptr($v) == %(CNI_)d) {
      if (*(uint64*)uptr($v) == %(CNI_COMM)d) { @cni[tid] = 1; }
      @env[tid, @envs[tid]] = $v;
      @envs[tid]++;
    }
    $i++;
  }
  $cni = @cni[tid];
  if ($cni || @in[pid]) {
    @try[tid] = 1;
    printf("begin|%%llu|%%d|%%d|%%d|%%s", nsecs, pid, @in[pid], @parent[pid], comm);
    printf("path|%%llu|%%d|%%s", nsecs, pid, str(uptr(args->filename)));
    $p = (uint64)args->argv; $i = 0;
    while ($i < 32) {
      $v = *(uint64*)uptr($p + 8 * $i);
      if ($v == 0) { break; }
      printf("arg|%%llu|%%d|%%s", nsecs, pid, str(uptr($v)));
      $i++;
    }
  }
  delete(@cni[tid]); delete(@envs[tid]);
  $k = 0;
  while ($k < 16) {
    $v = @env[tid, $k];
    if ($v == 0) { break; }
    delete(@env[tid, $k]);
    $w = *(uint64*)uptr($v);
    $i = $w == %(CNI_ARGS)d || $w == %(CNI_PATH)d || $w == %(CNI_CONT)d || $w == %(CNI_NETN)d ? 0 : 4;
    $part = 0;
    while ($cni && $i < 5) {
      printf("env|%%llu|%%d|%%d|%%s", nsecs, pid, $k * 8 + $part, str(uptr($v + $part * %(step)d)));
      $i++; $part++;
    }
    $k++;
  }
}
tracepoint:syscalls:sys_exit_%(call)s /@try[tid]/ {
  delete(@try[tid]);
  printf("noexec|%%llu|%%d|%%d", nsecs, pid, args->ret);
}
"""

# Contents are read when the call returns: then they are there, and their length is known. Whole chunks first, for a loop whose
# length varies is too much for the verifier.
TRANSFER = """
tracepoint:syscalls:sys_enter_%(call)s /@in[pid]/ {
  $s = @fd[pid, args->fd];
  if ($s) { @stream[tid] = $s; @buffer[tid] = (uint64)args->%(buffer)s; }
}
tracepoint:syscalls:sys_exit_%(call)s /@stream[tid]/ {
  $s = @stream[tid]; $p = @buffer[tid]; $n = args->ret; $o = 0;
  if ($n > 0 && ($s & 3) %(direction)s) {
    printf("size|%%llu|%%d|%%d|%%d", nsecs, @in[pid], $s, $n);
    $room = %(limit)d - @sent[$s];
    @sent[$s] = @sent[$s] + $n;
    %(piece)s
  }
  if (!@left[tid]) { delete(@stream[tid]); delete(@buffer[tid]); }
}
"""
PIECE = """$n = $n > $room ? $room : $n;
    $i = 0;
    while ($i < %(chunks)d) {
      if ($o + %(chunk)d > $n) { break; }
      printf("data|%%llu|%%d|%%rx", nsecs, $s, buf(uptr($p + $o), %(chunk)d));
      $o = $o + %(chunk)d;
      $i++;
    }
    if ($n > $o) { printf("data|%%llu|%%d|%%rx", nsecs, $s, buf(uptr($p + $o), $n - $o)); }"""
# readv and writev: the same over several buffers, {address, size} each, in a probe of its own, for the stack of one holds 512 bytes.
PIECES = """
tracepoint:syscalls:sys_exit_%(call)s /@left[tid]/ {
  $i = 0;
  while ($i < %(chunks)d) {
    $p = @buffer[tid];
    $s = *(uint64*)uptr($p + 8) - @offset[tid];
    if ($s > @left[tid]) { $s = @left[tid]; }
    if ($s > 0) { printf("data|%%llu|%%d|%%rx", nsecs, @stream[tid], buf(uptr(*(uint64*)uptr($p) + @offset[tid]), $s)); }
    if ($s > %(chunk)d) { $s = %(chunk)d; }
    @left[tid] = @left[tid] - $s;
    @offset[tid] = @offset[tid] + $s;
    if (@left[tid] == 0) { break; }
    if (@offset[tid] >= *(uint64*)uptr($p + 8)) { @buffer[tid] = $p + 16; delete(@offset[tid]); }
    $i++;
  }
  delete(@left[tid]); delete(@stream[tid]); delete(@buffer[tid]); delete(@offset[tid]);
}
"""
DUPLICATE_TO = """
tracepoint:syscalls:sys_enter_%(call)s /@in[pid]/ {
  $s = @fd[pid, args->oldfd];
  if ($s) { @fd[pid, args->newfd] = $s; } else { delete(@fd[pid, args->newfd]); }
}
"""
DUPLICATE = """
tracepoint:syscalls:sys_enter_%(call)s /@in[pid]%(condition)s/ {
  $s = @fd[pid, args->%(field)s];
  if ($s) { @copied[tid] = $s; }
}
"""
OPEN = """
tracepoint:syscalls:sys_enter_%(call)s /@in[pid]/ {
  $f = str(args->filename, 16);
  $s = (uint64)0;
  if ($f == "/dev/stdin" || $f == "/dev/fd/0" || $f == "/proc/self/fd/0") { $s = @fd[pid, 0]; }
  if ($f == "/dev/stdout" || $f == "/dev/fd/1" || $f == "/proc/self/fd/1") { $s = @fd[pid, 1]; }
  if ($f == "/dev/stderr" || $f == "/dev/fd/2" || $f == "/proc/self/fd/2") { $s = @fd[pid, 2]; }
  if ($s) { @copied[tid] = $s; }
}
"""
COPIED = """
tracepoint:syscalls:sys_exit_%(call)s /@copied[tid]/ {
  if (args->ret >= 0 && args->ret < %(descriptors)d) { @fd[pid, args->ret] = @copied[tid]; }
  delete(@copied[tid]);
}
"""
END_OF_PROCESS = """
tracepoint:sched:sched_process_exit {
  delete(@parent[tid]);
  if (@in[tid]) {
    if (@in[tid] == tid && pid == tid) {
      printf("exit|%%llu|%%d|%%d", nsecs, pid, @code[pid]);
      $i = 0;
      while ($i < 8) { delete(@sent[pid * 8 + $i]); $i++; }
    }
    delete(@in[tid]); delete(@code[tid]);
    $i = 0;
    while ($i < %(descriptors)d) { delete(@fd[tid, $i]); $i++; }
  }
}
END { clear(@parent); clear(@in); clear(@fd); clear(@code); clear(@sent); clear(@try); clear(@stream); clear(@left);
  clear(@offset); clear(@buffer); clear(@copied); clear(@env); clear(@envs); clear(@cni); }
"""


def bpftrace_program(syscalls):
    """The text of the bpftrace program. syscalls: names that this kernel has tracepoints for; `open` and `dup2` are not everywhere."""
    values = {"descriptors": DESCRIPTORS, "step": CHUNK - 1, "chunk": CHUNK, "limit": LIMIT, "chunks": LIMIT // CHUNK + 1}
    for name in ("CNI_", "CNI_COMM", "CNI_ARGS", "CNI_PATH", "CNI_CONT", "CNI_NETN"):
        values[name] = int.from_bytes(name.encode(), sys.byteorder)
    parts = [(PROCESSES, {})]
    for call, buffer, direction in (("read", "buf", "== 1"), ("write", "buf", "> 1"), ("readv", "vec", "== 1"), ("writev", "vec", "> 1")):
        piece = PIECE % values if buffer == "buf" else "if ($room > 0) { @left[tid] = $n > $room ? $room : $n; }"
        parts.append((TRANSFER + PIECES * (buffer == "vec"), {"call": call, "buffer": buffer, "direction": direction, "piece": piece}))
    parts += [(DUPLICATE_TO, {"call": call}) for call in ("dup2", "dup3")]
    parts += [(DUPLICATE + COPIED, {"call": "dup", "field": "fildes", "condition": ""}),
              (DUPLICATE + COPIED, {"call": "fcntl", "field": "fd", "condition": " && (args->cmd == 0 || args->cmd == 1030)"})]
    parts += [(OPEN + COPIED, {"call": call}) for call in ("openat", "open")]
    parts += [(EXECUTE, {"call": call}) for call in ("execveat", "execve")] + [(END_OF_PROCESS, {})]
    return "".join(text % {**values, **more} for text, more in parts if more.get("call", "execve") in syscalls)


EVENT_FIELDS = {"begin": 4, "path": 2, "arg": 2, "env": 3, "exec": 5, "noexec": 3, "size": 4, "data": 2, "exit": 3}  # before the text
TEXT_LAST = ("begin", "path", "arg", "env", "data")


def parse_bpftrace(line):
    """An event of one line (bytes) of `bpftrace -f json`, or None. Text is str with one character for each byte (Latin-1)."""
    # bpftrace 0.17 writes a byte above 127 as \uffffffXX, which is no JSON; newer ones write it as it is.
    text = re.sub(r"\\uffffff([89a-f][0-9a-f])", r"\\u00\1", line.decode("latin-1"))
    try:
        message = json.loads(text, strict=False)
    except ValueError:
        return None
    if message.get("type") == "lost_events":
        return ("lost", 0, message["data"]["events"])
    kind, _, rest = str(message.get("data")).partition("|")
    if message.get("type") != "printf" or kind not in EVENT_FIELDS:
        return None
    has_text = kind in TEXT_LAST
    fields = rest.split("|", EVENT_FIELDS[kind]) if has_text else rest.split("|")
    if len(fields) != EVENT_FIELDS[kind] + has_text:
        return None
    numbers = tuple(int(field) for field in (fields[:-1] if has_text else fields))
    if kind == "data":
        return (kind, *numbers, bytes.fromhex(fields[-1].replace("\\x", "").strip()))
    return (kind, *numbers, fields[-1]) if has_text else (kind, *numbers)


# ---------------------------------------------------------------------------------------------------------------------
# strace: its output
# ---------------------------------------------------------------------------------------------------------------------
# "?": not on every machine. Exit codes come without a system call. -xx writes every string in hexadecimal, so no quote or bracket in
# it can be taken for one of strace's own.
STRACE = ("strace", "-f", "-q", "-ttt", "-v", "-xx", "-s", str(LIMIT), "-e", "trace=execve,?execveat,clone,?clone3,"
          "?fork,?vfork,read,readv,write,writev,close,dup,?dup2,dup3,fcntl,?open,openat")
STRACE_LINE = re.compile(r"(\d+) +(\d+)\.(\d{6}) (.*)", re.DOTALL)
HEX_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
OWN_STREAMS = {f"{path}{number}": fd for fd, name in enumerate(("stdin", "stdout", "stderr"))
               for path, number in (("/dev/", name), ("/dev/fd/", fd), ("/proc/self/fd/", fd))}


def unhex(text):
    """The bytes of a string as strace -xx writes it, without the quotes."""
    return bytes.fromhex(text.replace("\\x", ""))


class Strace:
    """Makes events of lines. feed(line) -> events; one process's lines wait until its parent's clone() has returned.

    process_of: {thread ID: process ID} of what strace attached to.
    """

    def __init__(self, process_of):
        self.process_of = dict(process_of)
        self.parent, self.waiting, self.begun = {}, {}, {}
        self.inside, self.streams, self.sent = {}, {}, Counter()  # as @in, @fd and @sent in the bpftrace program

    def feed(self, line):
        match = STRACE_LINE.match(line)
        if not match:
            return []
        task, ts, text = int(match[1]), int(match[2]) * 10**9 + int(match[3]) * 1000, match[4]
        if task not in self.process_of:
            self.waiting.setdefault(task, []).append(line)
            return []
        if text.startswith("<... "):
            text = self.begun.pop(task, "") + text.partition(" resumed>")[2]
        elif text.endswith("<unfinished ...>"):
            self.begun[task] = text[:-len("<unfinished ...>")]
            # A program is there to be seen before its first instruction; execve() itself is reported when it returns.
            return []
        if text.startswith(("+++ exited", "+++ killed")):
            return self.ended(ts, task, text)
        name, _, rest = text.partition("(")
        arguments, _, value = rest.rpartition(" = ")
        handler = self.HANDLERS.get(name)
        failed = value.startswith(("-1", "?"))
        if not handler or (failed and handler is not Strace.execve):
            return []
        return handler(self, ts, task, name, arguments, value)

    def ended(self, ts, task, text):
        events = []
        pid = self.process_of.pop(task)
        if self.inside.get(pid) == pid == task:
            word = text.split()[3] if "exited" in text else text.split()[3]
            code = 256 + int(word) if "exited" in text else int(getattr(signal, word, 0))
            events = [("exit", ts, pid, code)]
        if pid == task:
            for known in (self.inside, self.streams, self.parent):
                known.pop(pid, None)
        return events

    def clone(self, ts, task, name, arguments, value):
        child, pid = int(value.split()[0]), self.process_of[task]
        if "CLONE_THREAD" in arguments:
            self.process_of[child] = pid
        else:
            self.process_of[child], self.parent[child] = child, pid
            if pid in self.inside:
                self.inside[child], self.streams[child] = self.inside[pid], dict(self.streams[pid])
        return [event for line in self.waiting.pop(child, []) for event in self.feed(line)]

    def execve(self, ts, task, name, arguments, value):
        pid = self.process_of[task]
        path, argv, env = re.match(r'[^"]*("[^"]*"), \[(.*?)\], \[(.*?)\]|', arguments, re.DOTALL).groups() or (None, None, None)
        variables = [text for text in HEX_STRING.findall(env or "") if text.startswith("\\x43\\x4e\\x49\\x5f")]
        variables = [unhex(text).decode("latin-1") for text in variables]
        if path is None or (pid not in self.inside and not any(text.startswith("CNI_COMMAND=") for text in variables)):
            return []
        latin = [unhex(text).decode("latin-1") for text in HEX_STRING.findall(path + argv)]
        events = [("begin", ts, pid, self.inside.get(pid, 0), self.parent.get(pid, 0), ""), ("path", ts, pid, latin[0])]
        events += [("arg", ts, pid, text) for text in latin[1:]]
        events += [("env", ts, pid, 8 * number, text) for number, text in enumerate(variables)]
        if value.startswith("-1"):
            return [*events, ("noexec", ts, pid, -getattr(errno, value.split()[1], 0))]
        above = self.streams.get(pid, {})
        again = 4 * (self.inside.get(pid) == pid)
        self.streams[pid] = {fd: above.get(fd, pid * 8 + fd + 1 + again) for fd in range(3)}
        self.inside[pid] = pid
        return [*events, ("exec", ts, pid, *self.streams[pid].values())]

    def transfer(self, ts, task, name, arguments, value):
        pid = self.process_of[task]
        number = arguments.partition(",")[0]
        stream, size = self.streams.get(pid, {}).get(int(number) if number.isdigit() else -1, 0), int(value.split()[0])
        if not stream or size <= 0 or (stream & 3 == 1) != name.startswith("read"):
            return []
        data = b"".join(unhex(text) for text in HEX_STRING.findall(arguments))[:max(0, LIMIT - self.sent[stream])]
        self.sent[stream] += size
        return [("size", ts, self.inside[pid], stream, size), ("data", ts, stream, data)]

    def descriptor(self, ts, task, name, arguments, value):
        """close, dup*, fcntl, open*: which descriptor stands for which stream. -1: for none."""
        streams = self.streams.get(self.process_of[task])
        if streams is None:
            return []
        words = arguments.split(", ")
        source = int(words[0]) if words[0].isdigit() else -1
        if name.startswith("open"):
            path = HEX_STRING.search(arguments)
            source = OWN_STREAMS.get(unhex(path[1]).decode("latin-1") if path else "", -1)
        if name == "close":
            streams.pop(source, None)
        elif name != "fcntl" or words[1].startswith("F_DUPFD"):
            target = int(value.split()[0])
            stream = streams.get(source)
            streams.pop(target, None)
            if stream:
                streams[target] = stream
        return []

    HANDLERS = {**dict.fromkeys(("clone", "clone3", "fork", "vfork"), clone), **dict.fromkeys(("execve", "execveat"), execve),
                **dict.fromkeys(("read", "readv", "write", "writev"), transfer),
                **dict.fromkeys(("close", "dup", "dup2", "dup3", "fcntl", "open", "openat"), descriptor)}


# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------


class Ordered:
    """Events in the order of time: each processor's come in order, but those of several one batch after another."""

    def __init__(self):
        self.events, self.number = [], 0

    def add(self, event):
        self.number += 1
        self.events.append((event[1], self.number, event))

    def take(self, before=None):
        """All events, or those older than a time in ns."""
        self.events.sort(key=lambda entry: entry[:2])
        count = len(self.events)
        if before is not None:
            count = sum(entry[0] < before for entry in self.events)
        taken, self.events = self.events[:count], self.events[count:]
        return [event for _, _, event in taken]


def text_of(latin):
    """A string of events (a character per byte) as text; what is not UTF-8 as \\xNN."""
    return latin.encode("latin-1", "replace").decode("utf-8", "backslashreplace")


def join_parts(parts):
    """{8 * number + part: text} as {name: value}: a part that does not fill its event is a variable's last."""
    joined = {}
    for number in sorted({index // 8 for index in parts}):
        text = ""
        for part in range(8):
            piece = parts.get(8 * number + part, "")
            text += piece
            if len(piece) < CHUNK - 1:
                break
        name, _, value = text_of(text).partition("=")
        joined[name] = value
    return joined


class Process:
    """One that was reported. above: the nearest reported one above it. is_call: it is a CNI call, as far as is known."""

    def __init__(self, pid, attempt, above, streams):
        self.pid, self.above, self.attempt = pid, above, attempt
        self.start, self.path, self.env = attempt["ts"], attempt["path"], attempt["env"]
        self.is_call = False
        self.delegates, self.commands = [], []
        self.take(streams)

    def take(self, streams):
        """Begin with new streams: what another program in the same process read is not this one's."""
        self.streams, self.contents, self.sizes = streams, {}, Counter()

    def caller(self):
        """The process of the CNI call that this one belongs to, or None."""
        above = self.above
        while above and not above.is_call:
            above = above.above
        return above


def is_in_cni_path(path, env):
    return os.path.dirname(path) in [os.path.normpath(part) for part in env.get("CNI_PATH", "").split(":") if part]


class Calls:
    """Makes calls of events. feed(event) -> a call that has ended and that no other contains, or None.

    A call is a dict: time (seconds since 1970), command, plugin, path, argv, env (CNI_*), container_id, netns, ifname, network, pid,
    parent {pid, comm, ...}, stdin, stdout, stderr (text; `NAME_base64` where it is no UTF-8) and stdin_size ..., exit (None: not known),
    signal (a name, or ""), error (why it could not be executed, or ""), duration_ms, chain (its place in the runtime's chain of
    plugins, from 1), incomplete (events were lost), running, delegates (calls), commands ([{argv, exit, signal, duration_ms, stdin,
    stderr}]). look_parent: process ID -> {comm, ...} of a process, {} if it is gone. epoch: ns to add to times.
    """

    def __init__(self, look_parent=lambda pid: {}, epoch=0):
        self.look_parent, self.epoch = look_parent, epoch
        self.attempts, self.processes, self.chains, self.movers = {}, {}, {}, {}
        self.lost = 0
        self.on = {"begin": self.begin, "path": self.word, "arg": self.word, "env": self.variable, "exec": self.execute,
                   "noexec": self.refused, "size": self.size, "data": self.data, "exit": self.end}

    def feed(self, event):
        if event[0] == "lost":
            self.lost += event[2]
            return None
        return self.on[event[0]](*event[1:])

    def begin(self, ts, pid, owner, parent, comm):
        self.attempts[pid] = {"ts": ts, "path": "", "argv": [], "parts": {}, "owner": owner, "lost": self.lost,
                              "parent": {"pid": parent, "comm": text_of(comm)}}

    def word(self, ts, pid, text):
        attempt = self.attempts.get(pid)
        if attempt and not attempt["path"]:
            attempt["path"] = text_of(text)
        elif attempt:
            attempt["argv"].append(text_of(text) + ("..." if len(text) == CHUNK - 1 else ""))

    def variable(self, ts, pid, part, text):
        if pid in self.attempts:
            self.attempts[pid]["parts"][part] = text

    def settle(self, pid):
        """What pid wanted to execute, with its variables; None if the beginning was lost."""
        attempt = self.attempts.pop(pid, None)
        if attempt:
            attempt["env"] = join_parts(attempt["parts"])
        return attempt

    def refused(self, ts, pid, number):
        attempt = self.settle(pid)
        known = self.processes.get(pid)
        if not attempt or (known and known.is_call) or not is_in_cni_path(attempt["path"], attempt["env"]):
            return None  # a shell that looks for a command along PATH fails often
        process = Process(pid, attempt, known.above if known else self.processes.get(attempt["owner"]), ())
        process.is_call = True
        return self.hand_over(process, {**self.call(process, ts, 0), "error": os.strerror(-number)})

    def execute(self, ts, pid, *streams):
        attempt = self.settle(pid)
        process = self.processes.get(pid)
        if not attempt:
            return
        if not process or not attempt["owner"]:  # a known process without an owner: another one's number, whose end was lost
            process = Process(pid, attempt, self.processes.get(attempt["owner"]), streams)
            self.processes[pid] = process
        if not process.is_call:
            process.take(streams)
        if process.is_call or os.path.basename(attempt["path"]) in WRAPPERS or not attempt["env"].get("CNI_COMMAND"):
            return  # an interpreter in the plugin's place, or nothing that could be a plugin
        caller, directory = process.caller(), os.path.dirname(attempt["path"])
        if is_in_cni_path(attempt["path"], attempt["env"]) or not caller or directory == os.path.dirname(caller.path):
            process.is_call = True
            process.attempt, process.path, process.env, process.start = attempt, attempt["path"], attempt["env"], attempt["ts"]
        if not caller and process.is_call:
            attempt["parent"].update(self.look_parent(attempt["parent"]["pid"]))

    def size(self, ts, pid, stream, count):
        self.movers[stream] = pid
        for process in self.sharers(pid, stream):
            process.sizes[stream & 3] += count

    def data(self, ts, stream, data):
        for process in self.sharers(self.movers.get(stream), stream):
            content = process.contents.setdefault(stream & 3, bytearray())
            content += data[:LIMIT - len(content)]

    def sharers(self, pid, stream):
        """The processes from the one that reads or writes up to the one whose stream it is, as far as it is theirs."""
        process, found = self.processes.get(pid), []
        while process:
            if stream in process.streams:
                found.append(process)
            process = process.above if process.pid != stream >> 3 else None
        return found

    def end(self, ts, pid, code):
        process = self.processes.pop(pid, None)
        self.attempts.pop(pid, None)
        if not process:
            return None
        for number in range(8):
            self.movers.pop(pid * 8 + number, None)
        if process.is_call and not self.is_plugin(process):
            process.is_call = False
        if process.is_call:
            return self.hand_over(process, self.call(process, ts, code))
        caller = process.caller()
        if caller:
            caller.commands.append(self.command(process, ts, code))
        return None

    def command(self, process, ts, code):
        """What a plugin ran that is no plugin. Its stdin is shown where it is not the plugin's own."""
        stdin = process.contents.get(1, b"") if process.pid == process.streams[0] >> 3 else b""
        return {"time": self.wall(process.start), "argv": process.attempt["argv"], **self.outcome(process, ts, code),
                "stdin": bytes(stdin).decode("utf-8", "backslashreplace"),
                "stderr": bytes(process.contents.get(3, b"")).decode("utf-8", "backslashreplace")}

    def is_plugin(self, process):
        """Whether what is outside CNI_PATH spoke the protocol: a shell with CNI_COMMAND in its environment starts other things, too."""
        speaks = any(bytes(content).lstrip()[:1] == b"{" for kind, content in process.contents.items() if kind < 3)
        return speaks or process.delegates or process.caller() or is_in_cni_path(process.path, process.env)

    def wall(self, ts):
        return (ts + self.epoch) / 1e9

    def outcome(self, process, ts, code):
        name = signal.Signals(code).name if 0 < code < 65 and code in set(signal.Signals) else f"signal {code}" if 0 < code < 256 else ""
        return {"exit": code - 256 if code >= 256 else None, "signal": name, "duration_ms": round((ts - process.start) / 1e6, 3)}

    def call(self, process, ts, code):
        """What is known of a call, as the class describes it."""
        env, attempt = process.env, process.attempt
        call = {"time": self.wall(process.start), "command": env.get("CNI_COMMAND", ""), "plugin": os.path.basename(process.path),
                "path": process.path, "argv": attempt["argv"], "env": env, "container_id": env.get("CNI_CONTAINERID", ""),
                "netns": env.get("CNI_NETNS", ""), "ifname": env.get("CNI_IFNAME", ""), "network": "", "pid": process.pid,
                "parent": attempt["parent"], **self.outcome(process, ts, code), "error": "", "running": False,
                "incomplete": self.lost > attempt["lost"]}
        for kind, name in enumerate(("stdin", "stdout", "stderr"), 1):
            content = bytes(process.contents.get(kind, b""))
            whole = process.sizes[kind] <= len(content)
            call[name] = content.decode("utf-8", "backslashreplace" if whole else "replace")
            if whole and call[name].encode("utf-8", "surrogateescape") != content:
                call[f"{name}_base64"] = base64.b64encode(content).decode()
            call[f"{name}_size"] = process.sizes[kind]
        conf = parse_object(call["stdin"])
        call["network"] = str(conf.get("name", ""))
        call["chain"] = 0 if process.caller() else self.place(call, conf)
        call["delegates"] = sorted(process.delegates, key=lambda entry: entry["time"])
        call["commands"] = sorted(process.commands, key=lambda entry: entry["time"])
        return call

    def place(self, call, conf):
        """Which plugin of the runtime's chain this is: an ADD without prevResult, or a plugin for the second time, begins a new one."""
        key = (call["parent"]["pid"], call["command"], call["network"], call["container_id"], call["ifname"])
        chain = self.chains.setdefault(key, [])
        if (call["command"] == "ADD" and "prevResult" not in conf) or call["path"] in chain:
            chain.clear()
        chain.append(call["path"])
        while len(self.chains) > 1000:
            del self.chains[next(iter(self.chains))]
        return len(chain)

    def hand_over(self, process, call):
        caller = process.caller()
        if not caller:
            return call
        caller.delegates.append(call)
        return None

    def unfinished(self, ts):
        """Calls that have not ended at a time, outermost first, each with what it has done so far."""
        found = []
        for process in sorted(self.processes.values(), key=lambda process: -process.start):  # delegates before their callers
            if process.is_call and self.is_plugin(process):
                call = self.hand_over(process, {**self.call(process, ts, 0), "running": True})
                found += [call] if call else []
        return found[::-1]


def parse_object(text):
    """The JSON object that text is, else {}."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# Printing
# ---------------------------------------------------------------------------------------------------------------------
SECRET = r"passw|secret|token|credential|private.?key|preshared|psk|api.?key|access.?key|client.?key|authorization"
SECRET_NAME = re.compile(SECRET, re.IGNORECASE)
SECRET_VALUE = re.compile(rf"""([\w.-]*(?:{SECRET})[\w.-]*["']?\s*[=:]\s*)("(?:[^"\\]|\\.)*"?|[^\s;,"]+)""", re.IGNORECASE)
HIDDEN = "***"
STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
WIDTH = 110  # of a line of JSON


def mask(value, is_secret=False):
    """A JSON value without what secrets' names stand for."""
    if isinstance(value, dict):
        return {key: mask(entry, is_secret or bool(SECRET_NAME.search(key))) for key, entry in value.items()}
    if isinstance(value, list):
        return [mask(entry, is_secret) for entry in value]
    return HIDDEN if is_secret and isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


def mask_text(text):
    """The same for text that may be JSON, or lines and words NAME=VALUE. What holds no secret stays as it is, to the byte."""
    try:
        value = json.loads(text)
        masked = mask(value)
    except (ValueError, RecursionError):
        return SECRET_VALUE.sub(rf"\g<1>{HIDDEN}", text)
    return text if masked == value else json.dumps(masked, ensure_ascii=False)


def mask_call(call):
    """A call without secrets. `masked` says whether there were any."""
    masked = {**call, "env": {name: mask_text(value) for name, value in call["env"].items()},
              "delegates": [mask_call(entry) for entry in call["delegates"]],
              "argv": [mask_text(word) for word in call["argv"]],
              "commands": [{**entry, "argv": [mask_text(word) for word in entry["argv"]], "stdin": mask_text(entry["stdin"]),
                            "stderr": mask_text(entry["stderr"])} for entry in call["commands"]]}
    for name in ("stdin", "stdout", "stderr"):
        masked[name] = mask_text(call[name])
        if masked[name] != call[name]:
            masked.pop(f"{name}_base64", None)
    masked["masked"] = masked != call
    return masked


def quote(word):
    """A word for a shell that a terminal can be shown, too: control characters as $'\\033'."""
    if all(char.isprintable() or char in "\n\t" for char in word):
        return shlex.quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(char if char.isprintable() else "".join(f"\\{byte:03o}" for byte in char.encode()) for char in plain) + "'"


def replay_line(call):
    """A shell line that repeats the call: the same variables, arguments and bytes; behind # what is in the way of that."""
    words = ["env", *(f"{name}={value}" for name, value in call["env"].items()), call["path"], *call["argv"][1:]]
    if call["parent"].get("elsewhere"):
        words[:0] = ["nsenter", f"--target={call['parent']['pid']}", "--mount", "--net"]
    line = " ".join(quote(word) for word in words)
    if call.get("stdin_base64"):
        line = f"echo {call['stdin_base64']} | base64 -d | {line}"
    else:
        line = f"printf %s {quote(call['stdin'])} | {line}" if call["stdin"] else f"{line} </dev/null"
    if call["stdin_size"] > LIMIT:
        line = f"# not whole, {call['stdin_size']} bytes of stdin, of which {LIMIT} are known: {line}"
    return line + "  # secrets are hidden: trace --show-secrets" * bool(call.get("masked"))


def is_failed(call):
    return bool(call["error"] or call["signal"] or call["exit"]) or any(is_failed(entry) for entry in call["delegates"])


def printable(text):
    """Text that a terminal can be given: a plugin's output may hold anything."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def pretty(value, room, is_full):
    """Lines of JSON: what fits stays on one line; unless is_full, long lists and strings are cut, and it is said how much is left out."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= room:
        return [line]
    if isinstance(value, str):
        return [line if is_full or len(line) <= 300 else f"{line[:room]}... ({len(value)} characters)"]
    if not isinstance(value, (dict, list)):
        return [line]
    is_object = isinstance(value, dict)
    entries = [(json.dumps(key, ensure_ascii=False) + ": ", entry) for key, entry in value.items()] if is_object else []
    entries = entries or [("", entry) for entry in value]
    shown = entries if is_full or is_object or len(entries) <= 6 else entries[:5]
    lines = []
    for number, (key, entry) in enumerate(shown, 1):
        part = pretty(entry, max(room - 2 - len(key), 20), is_full)
        part[-1] += "," * (number < len(entries))
        lines += [f"  {key}{part[0]}", *(f"  {more}" for more in part[1:])]
    lines += [f"  ... {len(entries) - len(shown)} more"] * (len(shown) < len(entries))
    return ["{" if is_object else "[", *lines, "}" if is_object else "]"]


def content_lines(text, size, is_full):
    """Lines that show what went through a stream."""
    if not size:
        return []
    try:
        conf = json.loads(text)
        if not is_full and isinstance(conf, dict) and isinstance(conf.get("prevResult"), dict):
            ips = [str(ip.get("address")) for ip in conf["prevResult"].get("ips") or [] if isinstance(ip, dict)]
            conf = {**conf, "prevResult": f"... {', '.join(ips)}"}
        lines = pretty(conf, WIDTH, is_full)
    except (ValueError, RecursionError):
        lines = text.splitlines()
        if not is_full:
            left_out = [f"... {len(lines) - 20} more lines"] * (len(lines) > 20)
            lines = [line if len(line) <= 200 else f"{line[:200]}... ({len(line)} characters)" for line in lines[:20]] + left_out
    return [printable(line) for line in lines] + [f"... {size} bytes in all, the first {LIMIT} are kept"] * (size > LIMIT)


def verdict(call):
    """How a call or command ended, in words."""
    if call.get("error"):
        return f"could not be started: {call['error']}"
    if call.get("running"):
        return "still running"
    if call["signal"]:
        return f"killed by {call['signal']}"
    if call["exit"] is None:
        return "ended, exit status not known"
    reply = parse_object(call.get("stdout", ""))
    reason = f": error {reply['code']}, {reply.get('msg', '')}" if call["exit"] and "code" in reply else ""
    return f"exit {call['exit']}{reason}" if call["exit"] else "ok"


def pod_of(call):
    """namespace/name of the pod from CNI_ARGS, or ""."""
    args = dict(pair.split("=", 1) for pair in call["env"].get("CNI_ARGS", "").split(";") if "=" in pair)
    return f"{args.get('K8S_POD_NAMESPACE', '')}/{args['K8S_POD_NAME']}" if args.get("K8S_POD_NAME") else ""


def no_style(text, *_names):
    return text


def terminal_style(text, *names):
    return f"\033[{';'.join(STYLES[name] for name in names)}m{text}\033[0m"


def format_call(call, is_full=False, replay="error", style=no_style, caller=None):
    """The lines of a call for people, those of its delegates indented below it. style: no_style or terminal_style."""
    kind = parse_object(call["stdin"]).get("plugin")
    what = f"{call['command']} {call['plugin']}" + (f" ({'+'.join(kind) if isinstance(kind, list) else kind})" if kind else "")
    who = " ".join(filter(None, (pod_of(call), call["container_id"][:13], call["ifname"]))) if not caller else ""
    chain = f"network {call['network']}" + f", plugin {call['chain']}" * (call["chain"] > 1) if call["network"] and not caller else ""
    parent = f"by {call['parent']['comm'] or '?'}[{call['parent']['pid']}]" if not caller else ""
    times = datetime.fromtimestamp(call["time"]).strftime("%H:%M:%S.%f")[:-3]
    colour = ("red", "bold") if is_failed({**call, "delegates": []}) else ("yellow",) if call["running"] else ("green",)
    head = [style(times, "dim"), style(printable(what), "bold"), *map(printable, filter(None, (who, chain, parent)))]
    duration = f"{call['duration_ms']:.0f} ms" if call["duration_ms"] >= 10 else f"{call['duration_ms']:.1f} ms"
    lines = ["  ".join([*head, duration, style(printable(verdict(call)), *colour)])]
    body = [("incomplete", ["events were lost: the backend could not keep up"])] * call["incomplete"]
    body += [("netns", [printable(call["netns"])])] if call["netns"] and not caller else []
    for name in ("stdin", "stdout", "stderr"):
        same = caller and name == "stdin" and call["stdin"] == caller["stdin"] and call["stdin"]
        body.append((name, ["as its caller's"] if same and not is_full else content_lines(call[name], call[f"{name}_size"], is_full)))
    for entry in call["commands"]:
        if is_full or (is_failed(call) and (entry["exit"] or entry["signal"])):
            shown = [printable(f"{shlex.join(entry['argv'])}  {entry['duration_ms']:.1f} ms  {verdict(entry)}")]
            body.append(("ran", shown + [f"  {printable(line)}" for line in (entry["stdin"] + entry["stderr"]).splitlines()]))
    body += [("changed", [printable(call["changes"])])] if call.get("changes") else []
    for name, shown in body:
        lines += [f"  {style(f'{name if number == 0 else str():<8}', 'dim')} {line}" for number, line in enumerate(shown)]
    for entry in call["delegates"]:
        lines += [f"    {line}" for line in format_call(entry, is_full, replay, style, call)]
    if replay == "always" or (replay == "error" and is_failed({**call, "delegates": []})):
        lines.append(f"  {style('replay  ', 'dim')} {replay_line(call)}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Running commands
# ---------------------------------------------------------------------------------------------------------------------


def run(argv, stdin="", environ=None, timeout_s=10):
    """(exit status, stdout, stderr) of a command; 127 if there is no such command, 124 if it takes too long. Never raises."""
    try:
        done = subprocess.run(argv, input=stdin, env={**os.environ, **(environ or {})}, capture_output=True, text=True, errors="replace",
                              timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return 124, "", f"no end after {timeout_s} s"
    except OSError as error:
        return 127, "", os.strerror(error.errno)
    return done.returncode, done.stdout, done.stderr


def find_tool(name):
    """The path of a program; sbin is not on everybody's PATH."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")


def need_root(what):
    if os.geteuid():
        raise SnoopError(f"{what} needs root: sudo {shlex.join([sys.argv[0], *sys.argv[1:]])}")


def look_parent(pid):
    """{comm, elsewhere} of a process: elsewhere if it sees other files or another network than we do. {} when it is gone."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="backslashreplace") as file:
            comm = file.read().strip()
        spaces = [os.readlink(f"/proc/{where}/ns/{kind}") for where in (pid, "self") for kind in ("mnt", "net")]
    except OSError:
        return {}
    return {"comm": comm, "elsewhere": spaces[:2] != spaces[2:]}


# ---------------------------------------------------------------------------------------------------------------------
# Changes
# ---------------------------------------------------------------------------------------------------------------------
# Of the host the monitors tell. They know no process, and none tells of other namespaces without mixing up names, so what a call did
# is what came while it ran; of the pod's namespace what is there before and after is compared.
MONITORS = (("ip", "-ts", "-d", "-o", "monitor", "link", "address", "route"), ("tc", "-ts", "monitor"), ("nft", "monitor"))
POD_SCRIPT = "ip -json address; ip -json route; ip -json -6 route; tc -json qdisc"
MONITOR_LINES = {
    "ip": (("link", r"\d+: (?P<name>[^:@\s]+).* qdisc .*"), ("address", r"\d+: \S+ +inet6? (?!fe80:)(?P<name>\S+) .*"),
           ("route", r"(?:unicast )?(?!.* table local |ff00:|fe80:)(?P<name>default|[\da-f.:]+(?:/\d+)?) .*")),
    "tc": (("qdisc", r"qdisc (?P<name>\w+) .* dev \S+.*"),),
    "nft": (("nft", r"(?P<name>element|rule|chain|set|map|table) (?P<rest>.*)"),),
}


def parse_monitor(tool, line):
    """(sign, kind, name) of what a monitor says has come (1) or gone (-1), None of anything else."""
    match = re.fullmatch(r"(Deleted |deleted |delete |add )?(.*?) *", line)
    sign, rest = (-1 if (match[1] or "").lower().startswith("delete") else 1), match[2]
    for kind, pattern in MONITOR_LINES[tool]:
        found = re.fullmatch(pattern, rest)
        if found and (kind, found["name"]) not in (("qdisc", "noqueue"), ("address", "::1/128")):
            word = re.search(r"maxmtu \d+[^\\]*\\\s+(\w+)", rest) if kind == "link" else None
            return sign, word[1] if word else kind, found["name"]
    return None


def parse_pod(text):
    """{(kind, name, interface)} of what POD_SCRIPT prints: documents one after another. Without what every namespace has."""
    items, decoder, place = set(), json.JSONDecoder(), 0
    text = text.strip()
    while place < len(text):
        rows, place = decoder.raw_decode(text, place)
        place += len(text[place:]) - len(text[place:].lstrip())
        for row in rows:
            name = row.get("ifname") or row.get("dev", "")
            if "kind" in row:
                items.add(("qdisc", row["kind"], name))
            elif "dst" in row:
                items.add(("route", f"{row['dst']} {row.get('gateway', '')}", name))
            elif "addr_info" in row:
                items.add(("link", name, name))
                items |= {("address", f"{entry['local']}/{entry['prefixlen']}", name) for entry in row["addr_info"] if "local" in entry}
    return {item for item in items if item[1] != "noqueue" and not item[1].startswith(("fe80:", "ff00:"))}


def describe(items):
    """Words for [(kind, name)]: names of what has names, numbers of the rest."""
    words = [name if kind == "address" else f"{kind} {name}" for kind, name in items if kind not in ("route", "nft")]
    counts = Counter("route" if kind == "route" else f"nft {name}" for kind, name in items if kind in ("route", "nft"))
    return ", ".join(words + [f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items()])


def describe_changes(balance):
    """"veth mn12, 2 routes; gone: ..." of {(kind, name, ...): how often it came, less how often it went}."""
    come = describe([item[:2] for item, count in balance.items() for _ in range(count)])
    gone = describe([item[:2] for item, count in balance.items() for _ in range(-count)])
    return "; ".join(filter(None, (come, gone and f"gone: {gone}")))


class Changes:
    """What calls change. early(event) is told of every event at once, of(call) is asked when a call has ended."""

    def __init__(self, epoch):
        self.epoch = epoch
        for tool in ("ip", "tc", "nft", "nsenter"):
            if not find_tool(tool):
                raise SnoopError(f"--changes needs {tool}: apt-get install {PACKAGES[tool]}")
        self.links = set(os.listdir("/sys/class/net"))
        self.lines = deque(maxlen=100_000)
        self.begun, self.pods, self.last, self.starts = {}, {}, {}, deque(maxlen=1000)
        self.monitors = [subprocess.Popen([*WITH_PARENT, find_tool(argv[0]), *argv[1:]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                          stdin=subprocess.DEVNULL, text=True, errors="replace", start_new_session=True) for argv in MONITORS]
        for argv, monitor in zip(MONITORS, self.monitors):
            threading.Thread(target=self.read, args=(argv[0], monitor.stdout), daemon=True).start()

    def read(self, tool, lines):
        for line in lines:
            stamp, _, rest = line.rstrip("\n").partition("] ") if line.startswith("[") else ("", "", line.rstrip("\n"))
            when = datetime.fromisoformat(stamp[1:]).timestamp() if stamp else time.time()
            item = parse_monitor(tool, rest)
            if not item:
                continue
            sign, kind, name = item
            is_link = kind not in ("address", "route", "qdisc", "nft")
            if is_link and (sign > 0) == (name in self.links):
                continue  # a link is told of whenever something about it changes
            if is_link:
                (self.links.add if sign > 0 else self.links.discard)(name)
            self.lines.append((when, item))

    def close(self):
        for monitor in self.monitors:
            monitor.kill()
            monitor.wait()

    def early(self, event):
        kind, ts, pid = event[:3]
        if kind == "begin" and not event[3] and pid not in self.pods:  # what a plugin starts is not looked at
            self.begun[pid] = (event[4], {})
        elif kind == "env" and pid in self.begun:
            self.begun[pid][1][event[3]] = event[4]
        elif kind == "exec" and pid in self.begun:
            parent, parts = self.begun.pop(pid)
            self.starts.append((ts + self.epoch) / 1e9)
            netns = join_parts(parts).get("CNI_NETNS", "")
            for path in (f"/proc/{parent}/root{netns}", netns) if netns.startswith("/") else ():
                with contextlib.suppress(OSError):
                    handle = os.open(path, os.O_RDONLY)  # keeps the namespace until the call is shown, also if it is deleted
                    self.pods[pid] = [handle, self.look_pod(handle)]
                    break
        elif kind == "exit" and pid in self.pods:
            self.pods[pid].append(self.look_pod(self.pods[pid][0]))

    def look_pod(self, handle):
        code, stdout, _ = run(["nsenter", f"--net=/proc/{os.getpid()}/fd/{handle}", "sh", "-c", POD_SCRIPT])
        try:
            return parse_pod(stdout) if code == 0 else set()
        except ValueError:
            return set()

    def of(self, call):
        """What a call changed, in words; "" for nothing."""
        end = call["time"] + call["duration_ms"] / 1000
        # What a monitor tells of comes a little late; what comes after another call's begin is that one's.
        end = min([end + 0.05, *(start for start in self.starts if start > end)])
        host = Counter()
        for when, (sign, kind, name) in list(self.lines):
            if call["time"] <= when <= end:
                host[(kind, name)] += sign if kind == "nft" or host[(kind, name)] != sign else 0
        words = describe_changes(host)
        if len(self.pods.get(call["pid"], ())) == 3:
            handle, before, after = self.pods.pop(call["pid"])
            key = os.fstat(handle).st_ino
            os.close(handle)
            before = self.last.get(key, before)
            if call["command"] == "ADD" and "prevResult" not in parse_object(call["stdin"]):
                before = {item for item in before if item[2] != call["ifname"]}  # we may have looked late; an ADD finds nothing there
            self.last[key] = after
            pod = describe_changes({**dict.fromkeys(sorted(after - before), 1), **dict.fromkeys(sorted(before - after), -1)})
            words = "; ".join(filter(None, (words and f"host: {words}", pod and f"pod: {pod}")))
        return words


# ---------------------------------------------------------------------------------------------------------------------
# trace
# ---------------------------------------------------------------------------------------------------------------------
WITH_PARENT = ("setpriv", "--pdeathsig", "INT")  # a backend ends with us, whatever ends us
CLOCKS = {"bpftrace": time.CLOCK_BOOTTIME, "strace": time.CLOCK_REALTIME}
TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


def plan_tracefs(argv):
    """The command with a tracefs of its own, where the machine has none mounted."""
    if any(os.path.isdir(f"{path}/events") for path in TRACEFS):
        return argv
    script = f'mount -t tracefs tracefs {TRACEFS[0]} && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *argv]


def bpftrace_backend(_options):
    """(argv, environment, parse(line) -> events) of bpftrace. SnoopError if it cannot be used here, with the reason."""
    program = find_tool("bpftrace")
    if not program:
        raise SnoopError("bpftrace is not installed: apt-get install bpftrace")
    version = re.search(r"(\d+)\.(\d+)", run([program, "--version"])[1])
    if not version or (int(version[1]), int(version[2])) < (0, 17):
        raise SnoopError(f"bpftrace {version[0] if version else '?'} is too old, 0.17 is needed")
    code, listed, stderr = run(plan_tracefs([program, "-l", "tracepoint:syscalls:sys_enter_*"]), timeout_s=60)
    syscalls = re.findall(r"sys_enter_(\w+)", listed)
    if code or "execve" not in syscalls:
        reason = (stderr.strip().splitlines() or ["no tracepoint syscalls:sys_enter_execve"])[-1]
        raise SnoopError(f"this kernel has no tracepoints for system calls that could be used ({reason})")
    environ = {"BPFTRACE_MAP_KEYS_MAX": "65536", "BPFTRACE_PERF_RB_PAGES": "1024"}
    environ.update(dict.fromkeys(("BPFTRACE_STRLEN", "BPFTRACE_MAX_STRLEN"), str(CHUNK)))
    argv = [*WITH_PARENT, *plan_tracefs([program, "--no-warnings", "-f", "json", "-e", bpftrace_program(syscalls)])]
    return argv, environ, lambda line: filter(None, [parse_bpftrace(line)])


def look_runtimes():
    """Process IDs of the container runtimes that run here."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            if file.read().strip() in RUNTIMES:
                found.append(int(pid))
    return found


def strace_backend(options):
    """The same of strace."""
    program = find_tool("strace")
    if not program:
        raise SnoopError("strace is not installed: apt-get install strace")
    pids = options.pid or look_runtimes()
    if not pids:
        raise SnoopError(f"no container runtime runs here (looked for {', '.join(RUNTIMES)}); name its process: --pid PID")
    process_of = {}
    for pid in pids:
        try:
            process_of.update({int(task): pid for task in os.listdir(f"/proc/{pid}/task")})
        except OSError:
            raise SnoopError(f"--pid {pid}: there is no such process") from None
    parser = Strace(process_of)
    argv = [*WITH_PARENT, program, *STRACE[1:], "-o", "/dev/stdout", *(word for pid in pids for word in ("-p", str(pid)))]
    return argv, {}, lambda line: parser.feed(line.decode("latin-1"))


def choose_backend(options):
    """(name, argv, environment, parse) of the backend: the one asked for, else the first that can be used."""
    need_root("trace")
    reasons = []
    for name, backend in (("bpftrace", bpftrace_backend), ("strace", strace_backend)):
        if options.backend in (None, name):
            try:
                return (name, *backend(options))
            except SnoopError as error:
                reasons.append(str(error))
    raise SnoopError("; ".join(reasons))


class Tracer:
    """A running backend. events() yields each event in order of time, and None whenever there is time to look at other things."""

    def __init__(self, name, argv, environ, parse, early):
        self.name, self.parse, self.early = name, parse, early
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the backend
        # In a session of its own: Ctrl-C is for us, and we end it.
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.stderr, start_new_session=True,
                                        env={**os.environ, **environ})
        self.is_ready, self.ended, self.canaries = False, 0, set()
        self.deadline = time.monotonic() + 60

    def now(self):
        return time.clock_gettime_ns(CLOCKS[self.name])

    def stop(self):
        """Ask it to end, once; what it has still to say comes yet."""
        if not self.ended:
            self.ended = time.monotonic()
            self.process.send_signal(signal.SIGINT)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def events(self):
        ordered, rest = Ordered(), b""
        os.set_blocking(self.process.stdout.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                is_idle = not selector.select(0.1)
                data = None if is_idle else os.read(self.process.stdout.fileno(), 1 << 20)
                if data:
                    *lines, rest = (rest + data).split(b"\n")
                    for event in (event for line in lines for event in self.parse(line)):
                        self.look(event)
                        ordered.add(event)
                # Idle: it has told all it knows. Else what is two seconds old, for then every processor's events are here.
                yield from ordered.take(None if is_idle or data == b"" else self.now() - 2 * 10**9)
                yield None
                if data == b"" or (self.ended and time.monotonic() - self.ended > 10):
                    return
                self.get_ready()

    def look(self, event):
        """Events as they come, not yet in order."""
        if event[0] == "env" and event[4] == f"CNI_COMMAND={CANARY}":
            self.canaries.add(event[2])
        elif event[0] == "exit" and event[2] in self.canaries and not self.is_ready:
            self.is_ready = True
        elif event[0] != "lost":
            self.early(event)

    def get_ready(self):
        """Show that the backend works, before anybody waits for calls."""
        if self.is_ready or self.ended:
            return
        if self.name == "strace":
            self.is_ready = all("TracerPid:\t0" not in text for text in map(read_text, self.traced_status()))
        else:
            subprocess.run(["true"], env={**os.environ, "CNI_COMMAND": CANARY}, check=False)
        if time.monotonic() > self.deadline:
            raise SnoopError(f"{self.name} shows nothing, not even a process of our own: {self.said() or 'and does not say why'}")

    def traced_status(self):
        return [f"/proc/{word}/status" for before, word in zip(self.process.args, self.process.args[1:]) if before == "-p"]

    def said(self):
        """The last lines of what it wrote to stderr, without what is of no interest."""
        self.stderr.seek(0)
        lines = [line for line in self.stderr.read().decode(errors="replace").splitlines() if line.strip() and "RLIMIT_MEMLOCK" not in line]
        return " | ".join(lines[-4:])[-600:]


def read_text(path):
    """The contents of a small file, "" if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def is_wanted(call, options):
    """Whether a call passes the filters; one that a wanted delegate belongs to does, too."""
    conf = parse_object(call["stdin"])
    names = (call["plugin"], conf.get("plugin"), conf.get("type"))
    own = ((not options.plugin or options.plugin in names)
           and (not options.command or options.command.upper() == call["command"])
           and (not options.container or call["container_id"].startswith(options.container) or pod_of(call).endswith(options.container))
           and (not options.failed or is_failed(call)))
    return own or any(is_wanted(entry, options) for entry in call["delegates"])


class Printer:
    """Shows calls as the options say, and keeps them in a file."""

    def __init__(self, options, out=sys.stdout):
        self.options, self.out = options, out
        self.count, self.failures = 0, 0
        self.style = terminal_style if out.isatty() and "NO_COLOR" not in os.environ else no_style
        self.file = open_recording(options.out) if getattr(options, "out", None) else None

    def show(self, call):
        if not is_wanted(call, self.options):
            return
        if not self.options.show_secrets:
            call = mask_call(call)
        self.count += 1
        self.failures += is_failed(call)
        line = json.dumps(call, ensure_ascii=True)
        if self.file:
            self.file.write(line + "\n")
            self.file.flush()
        text = line if self.options.json else "\n".join(format_call(call, self.options.full, self.options.replay, self.style)) + "\n"
        print(text, file=self.out, flush=True)


def open_recording(path):
    """The file to append calls to, readable for its owner alone."""
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8")
    except OSError as error:
        raise SnoopError(f"--out {path}: {error.strerror}") from None


def tell(text):
    print(f"cnisnoop: {text}", file=sys.stderr, flush=True)


def trace(options):
    """Show calls until Ctrl-C. Returns the exit status."""
    name, argv, environ, parse = choose_backend(options)
    printer = Printer(options)
    epoch = time.time_ns() - time.clock_gettime_ns(CLOCKS[name])
    changes = Changes(epoch) if options.changes else None
    tracer = Tracer(name, argv, environ, parse, changes.early if changes else lambda event: None)
    calls = Calls(look_parent, epoch)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: tracer.stop())
    is_told, slow, lost = False, set(), 0
    try:
        for event in tracer.events():
            call = calls.feed(event) if event else None
            if call and changes:
                call["changes"] = changes.of(call)
            if call:
                printer.show(call)
            if event is None and tracer.is_ready and not is_told:
                is_told = True
                tell(f"watching with {name}; Ctrl-C ends it")
            if event is None:
                tell_slow(calls, slow, tracer.now())
            if calls.lost > lost:
                lost = calls.lost
                tell(f"{lost} events lost: {name} cannot keep up, some calls are not complete")
        for call in calls.unfinished(tracer.now()):
            printer.show(call)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, else the interpreter complains when it flushes
    finally:
        tracer.stop()
        for opened in filter(None, (tracer, changes)):
            opened.close()
    if not is_told:
        raise SnoopError(f"{name} ended: {tracer.said()}" if tracer.process.returncode else "ended before the probes were there")
    tell(f"{printer.count} calls, {printer.failures} failed" + f", {lost} events lost" * bool(lost))
    return 0


def tell_slow(calls, slow, now):
    """Say once of each call that it runs for more than five seconds: one that hangs never ends, and so is never shown."""
    for pid, process in calls.processes.items():
        if process.is_call and not process.caller() and now - process.start > 5 * 10**9 and (pid, process.start) not in slow:
            slow.add((pid, process.start))
            words = (process.env.get("CNI_COMMAND", ""), process.path, process.env.get("CNI_CONTAINERID", "")[:13], f"process {pid}")
            tell(f"running for 5 s: {printable(' '.join(words))}")


def view(options):
    """Show a recording."""
    printer = Printer(options)
    try:
        with open(options.file, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                call = parse_object(line)
                if "command" not in call or "delegates" not in call:
                    raise SnoopError(f"{options.file}, line {number}: no call as `trace --out` writes it")
                printer.show(call)
    except OSError as error:
        raise SnoopError(f"{options.file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SnoopError(f"{options.file}: not a recording, it is no text") from None
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# cache
# ---------------------------------------------------------------------------------------------------------------------


def look_netns(path):
    """"there", "gone", or "not known" without a path. A file that is left where a namespace was mounted is no namespace."""
    if not path:
        return "not known"
    try:
        return "there" if os.stat(path).st_dev == os.stat("/proc/self/ns/net").st_dev else "gone"
    except OSError:
        return "gone"


def parse_cached(name, text):
    """{network, container_id, ifname, netns, addresses, problem} of one of libcni's files."""
    value = parse_object(text)
    result = value.get("result") if isinstance(value.get("result"), dict) else {}
    interfaces, ips = ([entry for entry in result.get(key) or [] if isinstance(entry, dict)] for key in ("interfaces", "ips"))
    netns = value.get("netns") or next((entry["sandbox"] for entry in interfaces if entry.get("sandbox")), "")
    return {"file": name, "network": value.get("networkName", ""), "container_id": value.get("containerId", ""), "netns": netns,
            "ifname": value.get("ifName", ""), "addresses": [str(ip.get("address")) for ip in ips],
            "problem": "" if value.get("kind") == "cniCacheV1" else "not readable as a result that libcni keeps"}


def look_cache(directory):
    """The rows of `cache`: what parse_cached returns, with age_s and state: "in use", "stale: ..." or "not known"."""
    rows = []
    for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else []:
        path = os.path.join(directory, name)
        row = parse_cached(name, read_text(path))
        row["age_s"] = int(time.time() - os.stat(path).st_mtime)
        states = {"there": "in use", "gone": "stale: its namespace is gone", "not known": "not known"}
        row["state"] = row["problem"] or states[look_netns(row["netns"])]
        rows.append(row)
    return rows


def print_table(rows):
    """Rows of words, the first one as a head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip())


def duration_words(seconds):
    return next(f"{seconds // size}{unit}" for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")) if seconds >= size or size == 1)


def cache(options):
    """Print what libcni keeps."""
    need_readable(options.cache_dir)
    rows = look_cache(options.cache_dir)
    if options.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"nothing in {options.cache_dir}: no attachment, or a runtime that keeps its results elsewhere")
    else:
        print_table([("NETWORK", "CONTAINER", "INTERFACE", "ADDRESSES", "AGE", "STATE", "NAMESPACE"),
                     *((printable(row["network"] or row["file"]), printable(row["container_id"][:13]), printable(row["ifname"]),
                        printable(" ".join(row["addresses"])), duration_words(row["age_s"]), row["state"], printable(row["netns"])) for row in rows)])
    return 0


def need_readable(directory):
    if os.path.isdir(directory) and not os.access(directory, os.R_OK | os.X_OK):
        need_root("reading " + directory)


# ---------------------------------------------------------------------------------------------------------------------
# doctor
# ---------------------------------------------------------------------------------------------------------------------
# What a plugin type needs: commands, and kernel features by how to try them in a namespace that is gone afterwards.
BRIDGING = (("ip", "nsenter"), ("bridge", "veth"))
NEEDS = {"mncni": BRIDGING, "naivewg": BRIDGING, "bridge": ((), ("bridge", "veth")), "ptp": ((), ("veth",)), "lat": (("tc",), ("netem",)),
         "bandwidth": (("tc",), ("ifb", "tbf")), "portmap": (("nft",), ("nft",)), "quickack": (("ip",), ())}
FEATURES = {
    "bridge": "ip link add probe type bridge", "veth": "ip link add probe type veth", "ifb": "ip link add probe type ifb",
    "tbf": "tc qdisc add dev lo root tbf rate 1mbit burst 10k latency 1s", "netem": "tc qdisc add dev lo root netem delay 1ms",
    "nft": "nft add table inet probe", "WireGuard": "ip link add probe type wireguard",
}


def position(path, text, error):
    """path:line:column: what is wrong with JSON text."""
    return f"{path}:{error.lineno}:{error.colno}: {error.msg}" + " (the file is empty)" * (not text.strip())


def judge_network(path, text):
    """(network configuration list, problem) of a file as libcni reads it; {} if there is a problem."""
    try:
        conf = json.loads(text)
    except ValueError as error:
        return {}, position(path, text, error) if isinstance(error, json.JSONDecodeError) else f"{path}: {error}"
    except RecursionError:
        return {}, f"{path}: nested beyond reason"
    if not isinstance(conf, dict):
        return {}, f"{path}: not a JSON object"
    if not path.endswith(".conflist"):
        if "plugins" in conf:
            return {}, f'{path}: has "plugins", so its name has to end in .conflist'
        conf = {"name": conf.get("name"), "cniVersion": conf.get("cniVersion"), "plugins": [conf]}
    plugins = conf.get("plugins")
    if not isinstance(conf.get("name"), str) or not conf["name"]:
        return {}, f'{path}: has no "name"'
    if not isinstance(plugins, list) or not plugins:
        return {}, f'{path}: has no "plugins"'
    if not all(isinstance(plugin, dict) and isinstance(plugin.get("type"), str) for plugin in plugins):
        return {}, f'{path}: an entry of "plugins" has no "type"'
    return conf, ""


def judge_networks(texts):
    """(rows, findings, network) of {path: text of a file in the configuration directory}, as containerd reads them.

    rows: [(path, verdict)]. It takes the first file in alphabetic order, and if that one is broken none at all.
    """
    rows, findings, network, first = [], [], None, ""
    for path in sorted(texts):
        if not path.endswith((".conflist", ".conf", ".json")):
            rows.append((path, "ignored: its name ends in neither .conflist nor .conf nor .json"))
            continue
        conf, problem = judge_network(path, texts[path])
        if problem:
            way_out = "containerd uses no network at all until it is put right" if not first else f"it would not work in place of {first}"
            findings.append((problem, way_out))
        rows.append((path, f"{'broken' if problem else 'ignored'}: {first} comes first in the alphabet" if first else
                     "broken, and first in the alphabet" if problem else f'in use: network "{conf["name"]}"'))
        if not first:
            first, network = path, conf or None
    if not first:
        findings.append(("no network configuration: nodes stay NotReady", "write a .conflist, or start what should write it"))
    return rows, findings, network


def plugin_types(network):
    """[(type, network configuration)] of the plugins of a list and of their IPAM plugins, as a runtime hands them out."""
    found = []
    versions = [str(version) for version in [network.get("cniVersion", "0.1.0"), *(network.get("cniVersions") or [])]]
    common = {"name": network["name"], "cniVersion": max(versions, key=lambda text: [int(part) for part in re.findall(r"\d+", text)])}
    for plugin in network["plugins"]:
        conf = {**plugin, **common}
        ipam = plugin.get("ipam") if isinstance(plugin.get("ipam"), dict) else {}
        found.append((plugin["type"], conf))
        if isinstance(ipam.get("type"), str) and ipam["type"] not in ("mncni", "mncni.py"):
            found.append((ipam["type"], conf))
    return found


def look_plugin(kind, conf, bin_dirs):
    """Findings about one plugin: is it there, does it speak the version, what does it say to STATUS."""
    path = next((path for path in (os.path.join(directory, kind) for directory in bin_dirs) if os.path.isfile(path)), None)
    if not path:
        return [(f'plugin "{kind}" is missing: not in {" ".join(bin_dirs)}', "every pod fails until it is installed")]
    if not os.access(path, os.X_OK):
        return [(f"{path} is not executable", f"chmod +x {path}")]
    environ = {"CNI_COMMAND": "VERSION", "CNI_PATH": ":".join(bin_dirs), "CNI_CONTAINERID": "", "CNI_NETNS": "", "CNI_IFNAME": "", "CNI_ARGS": ""}
    version = conf["cniVersion"]
    code, stdout, stderr = run([path], json.dumps({"cniVersion": version}), environ)
    supported = parse_object(stdout).get("supportedVersions")
    if code or not isinstance(supported, list):
        said = (stderr or stdout).strip().splitlines()
        return [(f"{path} does not answer VERSION: exit status {code}, {printable(said[-1]) if said else 'and says nothing'}", "replace it")]
    if version not in supported:
        return [(f"{path} does not speak version {version} of its configuration, only {', '.join(map(str, supported))}",
                 'change "cniVersion", or update the plugin')]
    if version != "1.1.0":
        return []  # STATUS came with 1.1.0
    code, stdout, stderr = run([path], json.dumps(conf), {**environ, "CNI_COMMAND": "STATUS"})
    error = parse_object(stdout)
    said = f"error {error['code']}, {error.get('msg', '')}" if "code" in error else (stderr or stdout).strip() or f"exit status {code}"
    return [(f"{path} says that it cannot work now: {printable(said)}", "see what it waits for")] if code else []


def look_needs(types, network):
    """Findings about commands and kernel features that plugins need."""
    tools = {"python3"} if {"mncni", "naivewg"} & types else set()
    features = set()
    for kind in types:
        more, tried = NEEDS.get(kind, ((), ()))
        tools.update(more)
        features.update(tried)
    if any(plugin.get("ready") for plugin in network["plugins"]) and not find_tool("wireguard-go"):
        features.add("WireGuard")
    findings = [(f"{tool} is missing", f"apt-get install {PACKAGES[tool]}") for tool in sorted(tools) if not find_tool(tool)]
    for name in sorted(features) if not os.geteuid() else []:
        code, _, stderr = run(["unshare", "--net", *FEATURES[name].split()])
        if code and find_tool(FEATURES[name].split()[0]):
            findings.append((f"the kernel has no {name}: {stderr.strip()}", "load or install its module: modprobe, linux-modules-extra"))
    return findings


def look_leases(directories, rows):
    """Findings about leases whose attachment libcni does not know, or whose namespace is gone. directories: one per network."""
    known = {(row["container_id"], row["ifname"]): row["state"] for row in rows}
    boot_id, findings = read_text("/proc/sys/kernel/random/boot_id").strip(), []
    for directory in directories:
        for name in sorted(os.listdir(directory)):
            words = read_text(os.path.join(directory, name)).split()
            if not re.fullmatch(r"[\da-f.:]{3,}", name) or len(words) < 2 or (len(words) > 2 and words[2] != boot_id):
                continue  # a lease of an earlier boot counts as free
            state = known.get((words[0], words[1]), "stale: libcni knows no such attachment")
            if state.startswith("stale"):
                findings.append((f"lease {directory}/{name} of {printable(words[0][:13])} {printable(words[1])} is {state}",
                                 f"if no such container runs: rm {directory}/{name}"))
    return findings


def look_host():
    """Findings about forwarding."""
    findings = []
    if read_text("/proc/sys/net/ipv4/ip_forward").strip() == "0":
        findings.append(("the node does not forward: net.ipv4.ip_forward is 0", "sysctl -w net.ipv4.ip_forward=1"))
    code, stdout, _ = run(["nft", "-json", "list", "chains"])
    for entry in parse_object(stdout).get("nftables", []) if code == 0 else []:
        chain = entry.get("chain", {})
        if chain.get("hook") == "forward" and chain.get("policy") == "drop":
            what = f"{chain['family']} {chain['table']} {chain['name']}"
            findings.append((f"chain {what} drops what is forwarded, unless one of its rules accepts it",
                             f"is it Docker's or a firewall's? Accept pods there: nft insert rule {what} ip saddr POD-CIDR accept"))
    if "-P FORWARD DROP" in run(["iptables-legacy", "-S", "FORWARD"])[1]:
        findings.append(("iptables-legacy drops what is forwarded: -P FORWARD DROP", "iptables-legacy -P FORWARD ACCEPT, or accept pods there"))
    return findings


def look_containerd():
    """(conf_dir, [bin_dir]) that containerd's configuration names, else the defaults."""
    text = read_text("/etc/containerd/config.toml")
    conf_dir = re.search(r"""^\s*conf_dir\s*=\s*["']([^"']+)""", text, re.MULTILINE)
    bin_dirs = re.search(r"""^\s*bin_dirs?\s*=\s*(.+)""", text, re.MULTILINE)
    return conf_dir[1] if conf_dir else "/etc/cni/net.d", re.findall(r"""["']([^"']+)""", bin_dirs[1])[::2] if bin_dirs else ["/opt/cni/bin"]


def doctor(options):
    """Print what is in use and what is wrong. Exit status 1 if there are findings."""
    conf_dir, bin_dirs = look_containerd()
    conf_dir, bin_dirs = options.conf_dir or conf_dir, options.bin_dir or bin_dirs
    for directory in (conf_dir, options.cache_dir):
        need_readable(directory)
    names = sorted(os.listdir(conf_dir)) if os.path.isdir(conf_dir) else []
    paths = [path for path in (os.path.join(conf_dir, name) for name in names) if os.path.isfile(path)]
    rows, findings, network = judge_networks({path: read_text(path) for path in paths})
    types = plugin_types(network) if network else []
    for kind, conf in types:
        findings += look_plugin(kind, conf, bin_dirs)
    if network:
        kinds = {kind for kind, _ in types} | {str(kind) for _, conf in types for kind in as_list(conf.get("plugin"))}
        findings += look_needs(kinds, network)
    if not any(os.path.isfile(os.path.join(directory, "loopback")) for directory in bin_dirs):
        findings.append((f'plugin "loopback" is missing from {" ".join(bin_dirs)}', "containerd starts no pod without it, unless it is set to use its own"))
    cached = look_cache(options.cache_dir)
    findings += [(f"cached result {row['file']}: {row['state']}", f"if no such container runs: rm {shlex.quote(options.cache_dir)}/{row['file']}")
                 for row in cached if row["state"] not in ("in use", "not known")]
    data_dirs = options.data_dir or ["/var/lib/cni/mncni", "/var/lib/cni/networks"]
    networks = [path for data_dir in data_dirs if os.path.isdir(data_dir)
                for path in (os.path.join(data_dir, name) for name in sorted(os.listdir(data_dir))) if os.path.isdir(path)]
    findings += look_leases(networks, cached) + look_host()
    print_diagnosis(conf_dir, rows, types, findings, options.json)
    return 1 if findings else 0


def as_list(value):
    return value if isinstance(value, list) else [value] if value else []


def print_diagnosis(conf_dir, rows, types, findings, as_json):
    if as_json:
        print(json.dumps({"configurations": [{"path": path, "verdict": verdict} for path, verdict in rows],
                          "plugins": [kind for kind, _ in types],
                          "findings": [{"what": what, "do": way_out} for what, way_out in findings]}, indent=2))
        return
    print(f"configurations in {conf_dir}:" + " none" * (not rows))
    for path, words in rows:
        print(f"  {printable(os.path.basename(path))}: {printable(words)}")
    if types:
        print(f"plugins: {', '.join(printable(kind) for kind, _ in types)}")
    for what, way_out in findings:
        print(f"FINDING: {printable(what)}\n         {printable(way_out)}")
    print(f"{len(findings)} findings" if findings else "nothing wrong was found"
          + " (without root, the firewall and kernel features are not looked at)" * bool(os.geteuid()))


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_options(argv):
    parser = argparse.ArgumentParser(prog="cnisnoop.py", description=__doc__.partition("\n\n")[0],
                                     epilog="Exit status: 0 fine, 1 failed or findings, 2 usage.")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    shown = argparse.ArgumentParser(add_help=False)
    shown.add_argument("--json", action="store_true", help="one JSON object per call and line")
    shown.add_argument("--full", action="store_true", help="whole JSON, every command that a plugin ran")
    shown.add_argument("--replay", choices=("error", "always", "never"), default="error", help="a shell line that repeats the call (error)")
    shown.add_argument("--show-secrets", action="store_true", help="do not hide the values of keys such as password, token, psk")
    shown.add_argument("--plugin", metavar="NAME", help="only calls of this plugin")
    shown.add_argument("--container", metavar="ID", help="only calls for this container ID, or its beginning, or pod name")
    shown.add_argument("--command", metavar="WORD", help="only ADD, DEL, CHECK, GC, STATUS or VERSION")
    shown.add_argument("--failed", action="store_true", help="only calls that failed")
    traced = commands.add_parser("trace", parents=[shown], help="show each CNI call as it happens (root)")
    traced.add_argument("--backend", choices=("bpftrace", "strace"), help="default: bpftrace if it can be used, else strace")
    traced.add_argument("--pid", type=int, action="append", help="strace: a process whose children are followed (the container runtimes)")
    traced.add_argument("--changes", action="store_true", help="also what each call changed on the host and in the pod")
    traced.add_argument("--out", metavar="FILE", help="also append each call to FILE, for `view`")
    viewed = commands.add_parser("view", parents=[shown], help="show a recording again")
    viewed.add_argument("file", metavar="FILE")
    kept = argparse.ArgumentParser(add_help=False)
    kept.add_argument("--cache-dir", metavar="DIR", default="/var/lib/cni/results", help="libcni's results (/var/lib/cni/results)")
    kept.add_argument("--json", action="store_true")
    commands.add_parser("cache", parents=[kept], help="what libcni keeps of each attachment, stale ones marked")
    checked = commands.add_parser("doctor", parents=[kept], help="which configuration is in use, and what is wrong")
    checked.add_argument("--conf-dir", metavar="DIR", help="default: containerd's, else /etc/cni/net.d")
    checked.add_argument("--bin-dir", metavar="DIR", action="append", help="default: containerd's, else /opt/cni/bin")
    checked.add_argument("--data-dir", metavar="DIR", action="append", help="leases (/var/lib/cni/mncni and /var/lib/cni/networks)")
    return parser.parse_args(argv)


COMMANDS = {"trace": trace, "view": view, "cache": cache, "doctor": doctor}


def main(argv):
    options = parse_options(argv)
    try:
        return COMMANDS[options.name](options)
    except SnoopError as error:
        tell(error)
        return 1
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
