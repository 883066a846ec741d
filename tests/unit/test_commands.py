"""The runner, the one place that starts a process, and what turns commands into errors."""

import subprocess

import pytest

import mncni
from mncni import Command, Reply


@pytest.fixture
def started(mocker):
    """subprocess.run, replaced: it answers exit 0 and remembers."""
    done = subprocess.CompletedProcess([], 0, "out", "err")
    return mocker.patch("subprocess.run", return_value=done)


def test_argv_stdin_and_timeout_go_to_the_process_and_no_shell(started):
    reply = mncni.make_run({"PATH": "/x"}, timeout_s=7)(Command(["ip", "-batch", "-"], "link\n", {"CNI_COMMAND": "DEL"}))
    assert reply == Reply(0, "out", "err")
    arguments, options = started.call_args
    assert arguments == (["ip", "-batch", "-"],)
    assert options["input"] == "link\n" and options["timeout"] == 7
    assert "shell" not in options
    assert options["env"] == {"PATH": "/x:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "CNI_COMMAND": "DEL"}


def test_an_exit_code_is_no_exception(started):
    started.return_value = subprocess.CompletedProcess([], 3, "", "no")
    assert mncni.make_run({})(Command(["ip"])) == Reply(3, "", "no")


def test_the_trace_gets_a_command_before_it_runs(started):
    order = []
    started.side_effect = lambda *arguments, **options: order.append("run") or subprocess.CompletedProcess([], 0, "", "")
    mncni.make_run({}, trace=lambda command: order.append(str(command)))(Command(["ip", "link"]))
    assert order == ["ip link", "run"]


@pytest.mark.parametrize("name, package", [("ip", "iproute2"), ("nft", "nftables"), ("wg", "wireguard-tools"), ("nsenter", "util-linux")])
def test_a_missing_tool_is_code_4_with_its_package(started, name, package):
    started.side_effect = FileNotFoundError()
    with pytest.raises(mncni.CNIError) as raised:
        mncni.make_run({})(Command([name]))
    assert (raised.value.code, raised.value.msg) == (4, f'cannot find the program "{name}": install the package {package}')


def test_a_tool_that_is_missing_behind_nsenter_is_named_as_well(started):
    started.return_value = subprocess.CompletedProcess([], 127, "", "nsenter: failed to execute ip: No such file or directory")
    with pytest.raises(mncni.CNIError) as raised:
        mncni.make_run({})(Command(["nsenter", "--net=/run/netns/x", "ip", "link"]))
    assert raised.value.code == 4 and '"ip"' in raised.value.msg


def test_a_command_that_hangs_is_code_100(started):
    started.side_effect = subprocess.TimeoutExpired("ip", 30)
    with pytest.raises(mncni.CNIError) as raised:
        mncni.make_run({})(Command(["ip", "link"]))
    assert (raised.value.code, raised.value.details) == (100, "ip link")


@pytest.mark.parametrize("value", ["a\nlink delete dev eth0", 'a"b', "a'b", "a\\b", "a#b", "a\rb", "a\x00b"])
def test_a_batch_refuses_what_could_be_more_than_one_word(value):
    with pytest.raises(mncni.CNIError) as raised:
        mncni.ip_batch([f"link set dev {value} up"])
    assert raised.value.code == 4


def test_a_command_reads_as_a_shell_line():
    assert str(Command(["tee", "/proc/a b"], "1\n", {"X": "y z"})) == "X='y z' tee '/proc/a b' <<'E'\n1\nE"


def test_the_failing_line_of_a_batch_stands_in_the_details():
    command = mncni.ip_batch(["link set dev a up", "link set dev b up"])
    error = mncni.command_failed(command, Reply(1, "", 'Cannot find device "b"\nCommand failed -:2\n'))
    assert error.code == 100
    assert error.details.splitlines()[0] == "ip -batch -: link set dev b up"


def test_apply_stops_at_the_first_failure():
    seen = []

    def run(command):
        seen.append(command.argv[0])
        return Reply(len(seen) - 1, "", "")

    with pytest.raises(mncni.CNIError):
        mncni.apply([Command(["a"]), Command(["b"]), Command(["c"])], run)
    assert seen == ["a", "b"]


def test_looking_for_what_is_gone_is_no_error_but_any_other_failure_is():
    reply = Reply(1, '[{"ifname": "lo"}]\n', 'Device "x" does not exist.\nCommand failed -:2\n')
    assert mncni.look_ip(["link show dev lo", "link show dev x"], lambda command: reply) == [{"ifname": "lo"}]
    denied, no_namespace = "RTNETLINK answers: Operation not permitted\n", "nsenter: cannot open /x: No such file or directory\n"
    for stderr, code in ((denied, 100), (no_namespace, 8)):
        with pytest.raises(mncni.CNIError) as raised:
            mncni.look_ip(["link show"], lambda command, stderr=stderr: Reply(1, "", stderr))
        assert raised.value.code == code
