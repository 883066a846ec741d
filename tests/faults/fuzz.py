"""Hostile input, from a seed and a number: values, texts, mutations of good inputs; how it is fed in, and made small where it fails.

An input is {name: text or None}: the parts that a program gets (variables, files, replies). fuzz() makes inputs, feeds each to a check
that raises AssertionError, and shows the first that fails, as small as it gets.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time

INPUT_S = 10  # far more than any input takes: one that takes longer hangs

SPLICES = (
    *("\0", "\n", "\r", "\t", "\x1b[2J", "\u202e", "\u0301", "\ud800", "\udcff", "\ufeff", " ", "é", "１", "²", "٣"),
    *(
        ";",
        "'",
        '"',
        "\\",
        "#",
        "{",
        "}",
        "[",
        "]",
        "*",
        "%",
        "|",
        "&",
        "`",
        "$(id)",
        "$HOME",
        "{0}",
        "%s",
        "=",
        ",",
        ":",
        "/",
        "../",
        "./",
    ),
    *("-", "--", "\nroute flush table main", "; flush ruleset", "}; add table inet x {", " metric 1", "%eth0", "\n[Peer]\n"),
)
STRINGS = (
    *("", " ", "-", "--", "-x", "--help", "-batch", ".", "..", "../../etc/passwd", "/", "/etc/passwd", "/proc/self/environ", "a/b", "x\ny"),
    *(
        "a\0b",
        "\ud800",
        "\udcff",
        "ü",
        "x" * 16,
        "x" * 300,
        "x" * 70_000,
        "0",
        "-1",
        "1e400",
        "NaN",
        "null",
        "true",
        "all",
        "default",
        "lo",
    ),
    *(
        "type",
        "dev",
        "10.0.0.0/8",
        "0.0.0.0/0",
        "::/0",
        "::1",
        "10.88.0.1",
        "10.88.0.0/24",
        "10.244.1.0/24\n",
        "fd00::%x;y/64",
        "10.0.0.010",
    ),
    *("fd00:244:1::%x\n/64", "::ffff:10.0.0.1", "fe80::1%eth0", "255.255.255.255/32", "127.0.0.1", "1.1.0", "1.0.0", "0.1.0", "$(reboot)"),
    *("9" * 5000, "naivewg", "portmap", "mncni", "lat", "eth0", "c1", "net", "50ms", "02:00:00:00:00:01", "2024-01-01T00:00:00Z", "²"),
)


class Raw(str):
    """JSON text that stands for itself, also what no JSON encoder writes."""


class Twice(str):
    """A key that equals another one of its object in the text, but not in the dict."""

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other


RAWS = [Raw(text) for text in ("1e400", "-1e400", "NaN", "-Infinity", "9" * 4000, "9" * 5000, "-0", "1E-400", "0x10", "01", "[" * 300, "")]
RAWS += [Raw("[" * depth + "]" * depth) for depth in (40, 500, 990, 3000, 60_000)] + [Raw('{"a":' * 900 + "1" + "}" * 900)]
VALUES = (None, True, False, 0, -1, 1, 2, 65536, 2**31, 2**32, 2**63, 2**64, 10**400, 1.5, -0.0, 1e300, [], {}, [[]], [None], {"": None})


def dumps(value):
    """JSON text of a value that may hold Raw and Twice."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


def places(value, path=()):
    """The paths of all that is in a value, itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def get(value, path):
    for key in path:
        value = value[key]
    return value


def changed(value, path, act):
    """A copy of value in which act(container, key) was done at path; what is not on the path is shared."""
    box = [value]
    at, keys = box, [0, *path]
    for key in keys[:-1]:
        at[key] = dict(at[key]) if isinstance(at[key], dict) else list(at[key])
        at = at[key]
    act(at, keys[-1])
    return box[0] if box else None


class Fuzz(random.Random):
    """Chance, from a name, a seed and a number."""

    def hostile_text(self):
        kind = self.randrange(8)
        if kind == 0:
            return "".join(map(chr, self.choices(range(0x250), k=self.randrange(40))))
        if kind == 1:
            return self.choice(SPLICES) * self.choice((1, 2, 1000))
        return self.choice(STRINGS)

    def hostile_value(self):
        kind = self.randrange(4)
        if kind == 0:
            return self.choice(RAWS)
        if kind == 1:
            return self.choice(VALUES)
        return self.hostile_text()

    def spliced(self, text):
        """A text with something put in, taken out, or otherwise."""
        place, kind = self.randrange(len(text) + 1), self.randrange(5)
        if kind == 0:
            return text[:place] + text[place + self.randrange(1, 8) :]
        if kind == 1:
            return text[:place]
        if kind == 2:
            return text[:place] + chr(self.randrange(0x180)) + text[place + 1 :]
        return text[:place] + self.choice(SPLICES) + text[place:]

    def otherwise(self, value):
        """Something else of much the same kind."""
        if isinstance(value, bool) or value is None:
            return self.hostile_value()
        if isinstance(value, (int, float)):
            return self.choice(
                (
                    -value,
                    value + 1,
                    value - 1,
                    value * 2**40,
                    value / 3 if abs(value) < 1e9 else 0.5,
                    str(value)[:9],
                    [value],
                    value * 10**300,
                )
            )
        if isinstance(value, str):
            return self.choice((self.spliced(value), self.hostile_text(), [value], {value: value}, value.upper(), value * 300))
        if isinstance(value, list):
            return self.choice((value * 2, value * 40, value[::-1], [value], value[0] if value else None, {"0": value}, [*value, None]))
        return self.choice(([value], list(value), list(value.values()), {}, {**value, self.hostile_text(): self.hostile_value()}))

    def mutated(self, value):
        """A JSON value with one to three things wrong."""
        for _ in range(self.choice((1, 1, 1, 2, 3))):
            path = self.choice(list(places(value)))
            kind = self.randrange(6)
            if kind == 0:
                value = changed(value, path, lambda at, key: at.pop(key)) if path else self.hostile_value()
            elif kind in (1, 2):
                new = self.hostile_value()
                value = changed(value, path, lambda at, key, new=new: at.__setitem__(key, new))
            elif kind == 3 and path and isinstance(path[-1], str):
                key, item = self.choice((Twice(path[-1]), path[-1].swapcase(), self.hostile_text())), self.hostile_value()
                owner = get(value, path[:-1])
                value = changed(value, path[:-1], lambda at, place, new={**owner, key: item}: at.__setitem__(place, new))
            elif kind == 4:
                other = get(value, self.choice(list(places(value))))
                value = changed(value, path, lambda at, key, other=other: at.__setitem__(key, other))
            else:
                new = self.otherwise(get(value, path))
                value = changed(value, path, lambda at, key, new=new: at.__setitem__(key, new))
            if not isinstance(value, (dict, list)) or len(dumps(value)) > 300_000:
                break
        return value

    def mutated_json(self, text):
        """A JSON text with something wrong: mostly in what it says, now and then in how it is written; or no JSON at all."""
        kind = self.randrange(20)
        if kind == 0:
            return self.mutated_text(text)
        if kind == 1:
            return self.choice(
                ("", " ", "null", "[]", "{}", "0", '""', "{" * 100_000, "\ufeff" + text, text * 2, "\0" * 300, self.hostile_text())
            )
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return self.mutated_text(text)
        return dumps(self.mutated(value))

    def mutated_reply(self, text):
        """What a command printed, a line of JSON or several, with something wrong in one of them."""
        lines = text.split("\n")
        place = self.randrange(len(lines))
        lines[place] = self.mutated_json(lines[place])
        return "\n".join(lines)

    def mutated_text(self, text):
        """A text with something wrong, line or character."""
        kind = self.randrange(4)
        if kind == 0 and "\n" in text:
            lines = text.split("\n")
            lines.insert(self.randrange(len(lines)), self.choice([*lines, self.hostile_text()]))
            return "\n".join(lines)
        if kind == 1 and text.split():
            words = text.split(" " if " " in text else "\t" if "\t" in text else "\n")
            words[self.randrange(len(words))] = self.hostile_text()
            return ("\t" if "\t" in text else " ").join(words)
        for _ in range(self.randrange(1, 4)):
            text = self.spliced(text)
        return text


# ---- feeding ----


class Hang(BaseException):
    """An input took longer than INPUT_S. No Exception: nothing is to catch it on the way."""


@contextlib.contextmanager
def deadline(seconds):
    def stop(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def why_it_fails(check, parts):
    """What is wrong with how an input is taken, None if nothing is."""
    try:
        with deadline(INPUT_S):
            check(parts)
    except Hang:
        return f"no end after {INPUT_S} s"
    except RecursionError:
        return "RecursionError"
    except AssertionError as error:
        return str(error) or "AssertionError"
    except Exception as error:
        import traceback

        return "".join(traceback.format_exception(type(error), error, error.__traceback__)[-6:])
    return None


def fuzz(name, seed, make, check, count=20_000):
    """Feed `count` inputs make(Fuzz) -> parts to check(parts). AssertionError with the smallest input found that fails. Returns seconds."""
    begin = time.monotonic()
    for number in range(count):
        parts = make(Fuzz(f"{name} {seed} {number}"))
        why = why_it_fails(check, parts)
        if why:
            small = shrunk(parts, lambda parts: why_it_fails(check, parts))
            shown = "\n".join(f"  {key} = {value!a}" for key, value in small.items())
            raise AssertionError(f"{name}, input {number} of MNCNI_SEED={seed}:\n{why_it_fails(check, small) or why}\n{shown[:6000]}")
    return time.monotonic() - begin


def shrunk(parts, fails, patience_s=20):
    """A smaller input that fails as well: parts away, members of JSON away, halves of texts away, as long as something helps."""
    end = time.monotonic() + patience_s
    again = True
    while again and time.monotonic() < end:
        again = False
        for smaller in smaller_ones(parts):
            if time.monotonic() > end:
                break
            if fails(smaller):
                parts, again = smaller, True
                break
    return parts


def smaller_ones(parts):
    for key, text in parts.items():
        if text is None:
            continue
        yield {**parts, key: None}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        for path in sorted(places(value), key=len)[1:] if isinstance(value, (dict, list)) else ():
            yield {**parts, key: json.dumps(changed(value, path, lambda at, key: at.pop(key)))}
        size = len(text) // 2
        while size:
            for start in range(0, len(text), size):
                yield {**parts, key: text[:start] + text[start + size :]}
            size //= 2


# ---- a fence around what runs in process ----


class Fence:
    """While it is up, nothing is started, no connection made, and nothing written but below its directories. The rest is refused with
    an OSError, and noted unless `configured(path)` says that the input itself names that place."""

    WRITES = (
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.chmod",
        "os.chown",
        "os.link",
        "os.symlink",
        "os.truncate",
        "shutil.rmtree",
    )
    STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind", "socket.sendto")
    current = None
    is_hooked = False

    def __init__(self, *directories):
        self.directories = tuple(os.path.realpath(directory) + "/" for directory in directories)
        self.breaches, self.configured = [], lambda path: False

    def __enter__(self):
        if not Fence.is_hooked:  # a hook stays as long as the process
            sys.addaudithook(lambda event, arguments: Fence.current and Fence.current.look(event, arguments))
            Fence.is_hooked = True
        self.before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        Fence.current = self
        return self

    def __exit__(self, *exc_info):
        Fence.current, sys.dont_write_bytecode = None, self.before

    def look(self, event, arguments):
        paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[1:2] if event == "os.symlink" else arguments[:1]
        if event == "open":
            is_write = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if (
                not is_write
                and str(arguments[0]).startswith(("/dev/", "/proc/kmsg"))
                and not str(arguments[0]).startswith(("/dev/shm/", "/dev/urandom"))
            ):
                raise PermissionError(13, "the fence", arguments[0])  # some have no end
            if not is_write:
                return
        elif event in self.STARTS:
            self.breaches.append(f"{event} {arguments[:2]!r}"[:300])
            raise PermissionError(13, "the fence")
        elif event not in self.WRITES or (event != "os.rename" and isinstance(arguments[-1], int) and arguments[-1] >= 0):
            return  # below an open directory: what shutil.rmtree does
        for path in map(os.fsdecode, (path for path in paths if isinstance(path, (str, bytes, os.PathLike)))):
            Fence.current = None  # what follows is our own
            place = (
                os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path)) if "\0" not in path else path
            )
            Fence.current = self
            if not (place + "/").startswith(self.directories) and place not in ("/dev/null",):
                if not self.configured(os.path.abspath(path)):
                    self.breaches.append(f"{event} {path!r}"[:300])
                raise PermissionError(13, "the fence", path)
