"""Any command of an ADD may fail, before it did its work or after: nothing of the attachment stays, and the next ADD works."""

import json

import pytest

import mncni

pytestmark = pytest.mark.root


class Faulty:
    """A `run` for the host's namespace in which command number `point` fails: instead of running, or after it ran."""

    def __init__(self, host, point, after):
        self.host, self.point, self.after, self.count = host, point, after, 0
        self.run = mncni.make_run({"PATH": "/usr/sbin:/usr/bin"})

    def __call__(self, command):
        self.count += 1
        argv = ["nsenter", f"--net=/run/netns/{self.host.netns}", *command.argv]
        inside = mncni.Command(argv, command.stdin, command.why, command.environ)
        if self.count != self.point:
            return self.run(inside)
        if self.after:
            self.run(inside)
        return mncni.Reply(1, "", "the test made this fail\n")


def test_no_failing_command_leaves_anything_behind(host, figure):
    pod = host.pod("a")
    ranges = [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00:88::/64"}]]
    conf = host.conf(ipMasq=True, ipam={"dataDir": f"{host.tmp}/data", "ranges": ranges})
    environ = {**host.environ("ADD", "c1", pod, "eth0")}
    warm = Faulty(host, point=0, after=False)
    assert mncni.answer(environ, json.dumps(conf), warm)[0] == 0
    assert mncni.answer({**environ, "CNI_COMMAND": "DEL"}, json.dumps(conf), warm)[0] == 0
    host.sh("nft flush ruleset; ip link delete mncni0")
    points = 0
    for after in (False, True):
        for bridge_exists in (False, True):
            point = 1
            while fault_is_undone(host, environ, conf, point, after, bridge_exists):
                points, point = points + 1, point + 1
    figure(f"{points} points at which a command of an ADD failed, each undone")
    assert points > 30


def fault_is_undone(host, environ, conf, point, after, bridge_exists):
    """Whether there was a command number `point`; asserts that its failure left nothing of the attachment."""
    host.sh("ip link delete mncni0 2>/dev/null; nft flush ruleset", check=False)
    if bridge_exists:
        prepare(host, environ, conf)
    run = Faulty(host, point, after)
    exit_code, stdout = mncni.answer(environ, json.dumps(conf), run)
    if run.count < point:
        assert exit_code == 0, stdout
        assert mncni.answer({**environ, "CNI_COMMAND": "DEL"}, json.dumps(conf), Faulty(host, 0, False))[0] == 0
        return False
    assert exit_code == 1, f"command {point} failed and nobody noticed"
    assert json.loads(stdout)["code"] in (8, 100), stdout
    assert host.files() == [], f"command {point}"
    assert "mn" not in host.ip("-brief link show type veth"), f"command {point}"
    assert host.ip("-brief link", netns=environ["CNI_NETNS"]).split()[0] == "lo"
    return True


def prepare(host, environ, conf):
    """Have an ADD and a DEL of another container make the bridge."""
    other = {**environ, "CNI_CONTAINERID": "before"}
    for command in ("ADD", "DEL"):
        exit_code, stdout = mncni.answer({**other, "CNI_COMMAND": command}, json.dumps(conf), Faulty(host, 0, False))
        assert exit_code == 0, stdout
