"""The dispatcher with plugins of the test's own: chains, their order, their undoing; results and their versions; main."""

import json
import os
import subprocess
import sys

import pytest

import mncni

RESULT = {
    "interfaces": [{"name": "eth0", "sandbox": "/proc/self/ns/net", "mtu": 1400, "socketPath": "/s", "pciID": "p", "ours": 1}],
    "ips": [{"address": "10.0.0.5/24", "gateway": "10.0.0.1", "interface": 0}, {"address": "fd00::5/64", "interface": 0}],
    "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1", "mtu": 1300, "advmss": 1, "priority": 2, "table": 3, "scope": 4}],
    "dns": {"nameservers": ["10.0.0.1"]},
    "unknown": {"kept": True},
}


def plugin(name, calls, failing=()):
    """A verb table that notes its calls; ADD appends an interface, verbs in `failing` raise."""

    def verb(word):
        def act(request, run):
            calls.append(f"{name} {word}")
            if word in failing:
                raise mncni.CNIError(123, f"{name} cannot {word}")
            if word == "ADD":
                before = request.prev_result or {"interfaces": []}
                return {**before, "interfaces": [*before["interfaces"], {"name": name}]}
            return None

        return act

    return {word: verb(word) for word in mncni.VERBS}


def call(command, plugins, chain, **conf):
    """(exit code, stdout as an object) of one call of a chain."""
    names = {"CNI_COMMAND": command, "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"}
    environ = {**names, "CNI_NETNS": "/proc/self/ns/net", "CNI_NETNS_OVERRIDE": "1"}
    text = json.dumps({"cniVersion": "1.1.0", "name": "net", "plugin": chain, **conf})
    exit_code, stdout = mncni.answer(environ, text, None, plugins)
    return exit_code, json.loads(stdout) if stdout else None


def chain_of(calls, **failing):
    return {name: plugin(name, calls, failing.get(name, ())) for name in ("a", "b", "c")}


def test_each_stage_of_a_chain_gets_the_result_of_the_one_before_it():
    calls = []
    exit_code, result = call("ADD", chain_of(calls), ["a", "b", "c"])
    assert exit_code == 0
    assert [link["name"] for link in result["interfaces"]] == ["a", "b", "c"]
    assert calls == ["a ADD", "b ADD", "c ADD"]


def test_a_failed_add_deletes_the_earlier_stages_in_reverse_and_reports_its_own_error():
    calls = []
    exit_code, error = call("ADD", chain_of(calls, c=["ADD"], b=["DEL"]), ["a", "b", "c"])
    assert (exit_code, error["code"], error["msg"]) == (1, 123, "c cannot ADD")
    assert calls == ["a ADD", "b ADD", "c ADD", "b DEL", "a DEL"]


@pytest.mark.parametrize("command, order", [("DEL", "cba"), ("CHECK", "abc"), ("GC", "abc"), ("STATUS", "abc")])
def test_other_verbs_run_every_stage_and_report_the_first_error_at_the_end(command, order):
    calls = []
    failing = {"a": [command], "b": [command]}
    exit_code, error = call(command, chain_of(calls, **failing), ["a", "b", "c"], prevResult=RESULT)
    assert calls == [f"{name} {command}" for name in order]
    first = next(name for name in order if name in failing)
    assert (exit_code, error["msg"]) == (1, f"{first} cannot {command}")


def test_a_plugin_may_be_named_alone():
    calls = []
    assert call("ADD", chain_of(calls), "b")[0] == 0
    assert calls == ["b ADD"]


def test_prev_result_of_the_runtime_comes_first_in_ours():
    exit_code, result = call("ADD", chain_of([]), "a", prevResult=RESULT)
    assert [link["name"] for link in result["interfaces"]] == ["eth0", "a"]
    assert result["unknown"] == {"kept": True}


def test_an_unexpected_error_is_999_on_stdout_with_its_traceback_on_stderr_only(capsys):
    plugins = {"a": {"ADD": lambda request, run: 1 // 0}}
    exit_code, error = call("ADD", plugins, "a")
    assert (exit_code, error["code"]) == (1, 999)
    assert "ZeroDivisionError" in error["msg"]
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" in captured.err


def test_a_system_error_is_5_and_names_the_file():
    def add(request, run):
        raise PermissionError(13, "Permission denied", "/var/lib/x")

    error = call("ADD", {"a": {"ADD": add}}, "a")[1]
    assert error["code"] == 5 and "plugin a: ADD failed: " in error["msg"] and "Permission denied: '/var/lib/x'" in error["msg"]
    error = mncni.to_cni_error(PermissionError(13, "Permission denied", "/var/lib/x"))
    assert (error.code, error.msg) == (5, "input/output failure: Permission denied: /var/lib/x")


@pytest.mark.parametrize("version", mncni.CNI_VERSIONS)
def test_a_result_survives_the_way_to_a_version_and_back(version):
    there = mncni.result_to_version(RESULT, version)
    assert there["cniVersion"] == version
    back = mncni.to_newest(there)
    assert back["ips"] == RESULT["ips"] and back["dns"] == RESULT["dns"] and back["unknown"] == RESULT["unknown"]
    assert back["interfaces"][0]["ours"] == 1
    assert ("mtu" in back["interfaces"][0]) == ("table" in back["routes"][0]) == (version == "1.1.0")
    assert [ip.get("version") for ip in there["ips"]] == (["4", "6"] if version < "1" else [None, None])


def test_merging_moves_the_indexes_of_our_addresses():
    own = {"interfaces": [{"name": "b"}, {"name": "eth1"}], "ips": [{"address": "10.1.0.2/24", "interface": 1}], "routes": [], "dns": {}}
    merged = mncni.merge_results(RESULT, own)
    assert [link["name"] for link in merged["interfaces"]] == ["eth0", "b", "eth1"]
    assert merged["ips"][-1] == {"address": "10.1.0.2/24", "interface": 2}
    assert merged["dns"] == RESULT["dns"]


@pytest.mark.parametrize("text, wanted", [("1.1.0", True), ("1.1", True), ("1.0.0.0", False), ("", False), ("x.1", False)])
def test_versions_are_judged_as_libcni_does(text, wanted):
    with pytest.raises(mncni.CNIError) as raised:
        mncni.check_version("CHECK", text if text != "1.1.0" else "0.1.0")
    assert raised.value.code == (1 if wanted else 6)


class TestMain:
    """The program as a process."""

    def start(self, *arguments, stdin="", **environ):
        environ = {**{name: value for name, value in os.environ.items() if not name.startswith("CNI_")}, **environ}
        return subprocess.run([mncni.__file__, *arguments], input=stdin, capture_output=True, text=True, env=environ)

    def test_version_answers_with_stdin_closed(self):
        argv = ["sh", "-c", f"exec {mncni.__file__} <&-"]
        done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "CNI_COMMAND": "VERSION"})
        assert json.loads(done.stdout)["supportedVersions"] == list(mncni.CNI_VERSIONS)

    def test_bytes_that_are_no_utf8_are_code_6(self):
        environ = {**os.environ, "CNI_COMMAND": "STATUS"}
        done = subprocess.run([mncni.__file__], input=b'{"name": "\xff"}', capture_output=True, env=environ)
        assert done.returncode == 1 and json.loads(done.stdout)["code"] == 6

    def test_without_anything_it_says_what_it_is_on_stderr(self):
        done = self.start()
        assert (done.returncode, done.stdout) == (0, "")
        assert "naivewg, portmap, bandwidth, lat" in done.stderr and "1.1.0" in done.stderr

    def test_help_and_version_go_to_stdout(self):
        assert "install" in self.start("--help").stdout
        assert mncni.PROGRAM_VERSION in self.start("--version").stdout

    def test_an_error_is_one_json_object_on_stdout(self):
        done = self.start(stdin="{}", CNI_COMMAND="GC")
        assert done.returncode == 1
        assert json.loads(done.stdout) == {"cniVersion": "1.1.0", "code": 7, "msg": 'the network configuration has no "name"'}

    def test_it_runs_isolated_under_the_distributions_python(self):
        with open(mncni.__file__, encoding="utf-8") as file:
            assert file.readline() == "#!/usr/bin/python3 -IS\n"

    def test_version_and_status_start_no_process_and_import_nothing_dear(self):
        conf = {"cniVersion": "1.1.0", "name": "net", "plugin": "naivewg"}
        dear = ("subprocess", "argparse", "hashlib", "typing", "dataclasses", "logging", "contextlib", "shlex", "traceback")
        for command, stdin in (("VERSION", ""), ("STATUS", json.dumps(conf))):
            code = f"import sys; sys.argv = ['mncni']; sys.path.append({os.path.dirname(mncni.__file__)!r}); import mncni; mncni.main()"
            argv = [sys.executable, "-IS", "-X", "importtime", "-c", code]
            done = subprocess.run(argv, input=stdin, capture_output=True, text=True, env={**os.environ, "CNI_COMMAND": command})
            assert done.returncode == 0, done.stdout
            imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
            assert not imported & set(dear), command
