"""The runner, the one place that starts a process, and what turns commands into errors."""

import json
import os

import pytest

import mncni
from mncni import Command, Reply


def program(tmp_path, name, script):
    """A directory for PATH with a shell script of that name."""
    (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / name).chmod(0o755)
    return {"PATH": str(tmp_path)}


def test_argv_stdin_and_environment_go_to_the_process_and_no_shell(tmp_path):
    environ = program(tmp_path, "ip", 'echo "$CNI_COMMAND $LC_ALL $PATH"; printf "%s|" "$@"; cat; echo err >&2')
    reply = mncni.make_run(environ)(Command(["ip", "a b", "$PATH;"], "link\n", environ={"CNI_COMMAND": "DEL"}))
    assert reply == Reply(0, f"DEL C {tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin\na b|$PATH;|link\n", "err\n")


def test_an_exit_code_or_a_signal_is_no_exception(tmp_path):
    assert mncni.make_run(program(tmp_path, "ip", "echo no >&2; exit 3"))(Command(["ip"])) == Reply(3, "", "no\n")
    assert mncni.make_run(program(tmp_path, "tc", "kill -9 $$"))(Command(["tc"])).exit_code == -9


def test_much_goes_in_and_much_comes_out(tmp_path):
    text = "0123456789abcde\n" * 100_000
    assert mncni.make_run(program(tmp_path, "tc", "tee /dev/stderr"))(Command(["tc"], text)) == Reply(0, text, text)


def test_a_program_need_not_read_what_it_is_told(tmp_path):
    run = mncni.make_run(program(tmp_path, "tc", "exec <&-; echo done; exec >&-; exit 3"))
    assert all(run(Command(["tc"], "0123456789abcde\n" * 10_000)) == Reply(3, "done\n", "") for _ in range(20))


def test_a_pipe_whose_reader_is_gone_ends_a_program_as_it_does_in_a_shell(tmp_path):
    reply = mncni.make_run(program(tmp_path, "tc", "yes | head -n 1"))(Command(["tc"]))
    assert reply == Reply(0, "y\n", "")


def test_of_our_locks_a_process_holds_those_that_it_is_run_under(tmp_path):
    run = mncni.make_run(program(tmp_path, "tc", "readlink /proc/$$/fd/*"))
    one, two, other = (mncni.Locked(str(tmp_path / name)) for name in ("one", "two", "other"))
    with one, two, other:
        reply = two.held(one.held(run))(Command(["tc"]))
    assert one.path in reply.stdout and two.path in reply.stdout and other.path not in reply.stdout


def test_the_trace_gets_a_command_before_it_runs(tmp_path):
    traced = tmp_path / "traced"
    run = mncni.make_run(program(tmp_path, "ip", f"cat {traced}"), trace=lambda command: traced.write_text(str(command)))
    assert run(Command(["ip", "link"])).stdout == "ip link"


@pytest.mark.parametrize("name, package", [("ip", "iproute2"), ("nft", "nftables"), ("wg", "wireguard-tools"), ("nsenter", "util-linux")])
def test_a_missing_tool_is_code_4_with_its_package(mocker, name, package):
    mocker.patch("mncni.search_path", return_value="/nonexistent")
    with pytest.raises(mncni.CNIError) as raised:
        mncni.make_run({})(Command([name]))
    assert (raised.value.code, raised.value.msg) == (4, f'cannot find the program "{name}": install the package {package}')


def test_a_tool_that_is_missing_behind_nsenter_is_named_as_well(tmp_path):
    environ = program(tmp_path, "nsenter", "echo nsenter: failed to execute ip: No such file or directory >&2; exit 127")
    with pytest.raises(mncni.CNIError) as raised:
        mncni.make_run(environ)(Command(["nsenter", "--net=/run/netns/x", "ip", "link"]))
    assert raised.value.code == 4 and '"ip"' in raised.value.msg


def test_a_command_that_hangs_is_killed_and_code_100(tmp_path):
    environ = program(tmp_path, "ip", f"echo $$ >{tmp_path}/pid; exec sleep 60")
    with pytest.raises(mncni.CNIError) as raised:
        mncni.make_run(environ, timeout_s=2)(Command(["ip", "link"]))
    assert (raised.value.code, raised.value.details) == (100, "ip link")
    assert not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text().strip()}")


@pytest.mark.parametrize("value", ["a\nlink delete dev eth0", 'a"b', "a'b", "a\\b", "a#b", "a\rb", "a\x00b"])
def test_a_batch_refuses_what_could_be_more_than_one_word(value):
    with pytest.raises(mncni.CNIError) as raised:
        mncni.ip_batch([f"link set dev {value} up"])
    assert raised.value.code == 4


def test_a_command_reads_as_a_shell_line():
    command = Command(["tee", "/proc/a b"], "1\n", "a reason", {"X": "y z"})
    assert str(command) == "X='y z' tee '/proc/a b' <<'E'\n1\nE"
    assert command.explained("+ ") == f"# a reason\n+ {command}"
    assert Command(["ip"]).explained() == "ip"


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
    lo = {"ifname": "lo", "flags": ["UP"], "mtu": 65536}
    reply = Reply(1, f"{json.dumps([lo])}\n", 'Device "x" does not exist.\nCommand failed -:2\n')
    assert mncni.look_ip(["link show dev lo", "link show dev x"], lambda command: reply) == [lo]
    denied, no_namespace = "RTNETLINK answers: Operation not permitted\n", "nsenter: cannot open /x: No such file or directory\n"
    for stderr, code in ((denied, 100), (no_namespace, 8)):
        with pytest.raises(mncni.CNIError) as raised:
            mncni.look_ip(["link show"], lambda command, stderr=stderr: Reply(1, "", stderr))
        assert raised.value.code == code


def test_a_lock_that_is_passed_on_takes_no_descriptors_place(tmp_path):
    """However many files are open."""
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(120)]
    try:
        with mncni.Locked(str(tmp_path / "lock")) as lock:
            run = lock.held(mncni.make_run(program(tmp_path, "ip", "cat; readlink /proc/$$/fd/* | grep -c '/lock$'")))
            while many[-1] >= 100:  # the command's pipes come in their place
                os.close(many.pop())
            assert run(Command(["ip"], "line\n")) == Reply(0, "line\n1\n", "")
    finally:
        for fd in many:
            os.close(fd)
