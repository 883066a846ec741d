"""Leases and files: whole or absent, whatever stops in the middle; and the search for a free address."""

import ipaddress
import os
import threading
import time
from pathlib import Path

import pytest

import mncni


@pytest.fixture
def leases(tmp_path):
    return mncni.Leases(str(tmp_path), "net", str(tmp_path / "run"))


def ranges(*texts):
    return mncni.parse_range_set([dict(zip(("subnet", "rangeStart", "rangeEnd", "gateway"), text.split())) for text in texts])


def take(leases, range_set, container_id, ifname="eth0", index=0):
    address, _ = mncni.next_free(leases, range_set, index)
    leases.take([address], container_id, ifname)
    leases.set_last(index, address)
    return str(address)


def test_addresses_go_round_and_are_not_given_again_at_once(leases):
    pool = ranges("10.0.0.0/29")
    assert [take(leases, pool, f"c{number}") for number in range(3)] == ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
    leases.release("c1", "eth0")
    assert [take(leases, pool, f"d{number}") for number in range(3)] == ["10.0.0.5", "10.0.0.6", "10.0.0.3"]
    with pytest.raises(mncni.CNIError) as raised:
        mncni.next_free(leases, pool, 0)
    assert raised.value.code == 11


def test_the_search_wraps_over_several_ranges_and_skips_each_gateway(leases):
    pool = ranges("10.0.0.0/30", "10.0.1.0/30 10.0.1.1 10.0.1.2 10.0.1.2")
    assert [take(leases, pool, f"c{number}") for number in range(2)] == ["10.0.0.2", "10.0.1.1"]
    leases.release("c0", "eth0")
    assert take(leases, pool, "d") == "10.0.0.2"


@pytest.mark.parametrize("mark", ["", "nonsense", "10.9.9.9", "fd00::1", "99999999999999999999"])
def test_a_mark_that_makes_no_sense_starts_from_the_beginning(leases, mark):
    os.makedirs(leases.dir)
    mncni.write_file(os.path.join(leases.dir, "last.0"), mark)
    assert str(mncni.next_free(leases, ranges("10.0.0.0/29"), 0)[0]) == "10.0.0.2"


def test_the_search_looks_at_an_address_once_a_round_however_many_are_taken(leases, mocker):
    pool = ranges("10.0.0.0/16")
    leases.boot_id = "b"
    os.makedirs(leases.index_dir)
    leases.set_last(0, ipaddress.ip_address("10.0.200.0"))
    looked = mocker.patch.object(leases, "holder", side_effect=lambda address: None)
    assert str(mncni.next_free(leases, pool, 0)[0]) == "10.0.200.1"
    assert looked.call_count == 1


def test_ipv6_pools_of_any_size_work(leases):
    assert take(leases, ranges("fd00::/48"), "c") == "fd00::2"


def test_an_attachment_releases_only_its_own(leases):
    leases.take(["10.0.0.2"], "c1", "eth0")
    leases.take(["10.0.0.3"], "c1", "eth1")
    leases.release("c1", "eth0")
    leases.release("c1", "eth0")
    leases.release("nobody", "eth0")
    assert leases.holder("10.0.0.2") is None and leases.holder("10.0.0.3") == ("c1", "eth1")


def test_a_stale_index_does_not_free_what_somebody_else_holds_now(leases):
    leases.take(["10.0.0.2"], "c1", "eth0")
    leases.take(["10.0.0.2"], "c2", "eth0")
    leases.release("c1", "eth0")
    assert leases.holder("10.0.0.2") == ("c2", "eth0")


@pytest.mark.parametrize("text", ["", "c1", "c1\neth0\n", "c1\neth0\nanother-boot\n", "-\n/\n{boot}\n", "\x00" * 40, "\ufffd"])
def test_a_lease_that_is_torn_or_of_an_earlier_boot_counts_as_free(leases, text):
    os.makedirs(leases.dir)
    mncni.write_file(os.path.join(leases.dir, "10.0.0.2"), text.replace("{boot}", leases.boot_id))
    assert leases.holder("10.0.0.2") is None


@pytest.mark.parametrize("key", ["boot_id", "run_id"])
def test_a_del_removes_the_leases_of_its_attachment_also_those_of_an_earlier_boot(leases, key):
    leases.run_id = "run-now"
    leases.take(["10.0.0.2", "fd00::2"], "c1", "eth0")
    leases.take(["10.0.0.3"], "c2", "eth0")
    setattr(leases, key, "run-later")
    leases.take(["10.0.0.3"], "c3", "eth0")
    assert leases.holder("10.0.0.2") is None and {"10.0.0.2", "fd00::2"} <= set(os.listdir(leases.dir))
    leases.release("c1", "eth0")
    leases.release("c2", "eth0")
    assert not {"10.0.0.2", "fd00::2"} & set(os.listdir(leases.dir))
    assert leases.holder("10.0.0.3") == ("c3", "eth0"), "what somebody else holds by now stays"


def test_a_crash_between_any_two_steps_leaves_nothing_that_a_del_cannot_find(tmp_path, mocker):
    """Every write and every removal of take() and release() is a point to stop at; then the DEL comes."""
    points = 0
    for verb in ("take", "release"):
        for point in range(1, 20):
            leases = mncni.Leases(str(tmp_path / f"{verb}{point}"), "net", str(tmp_path / "run"))
            if verb == "release":
                leases.take(["10.0.0.2", "fd00::2"], "c1", "eth0")
            if not stops_at(point, leases, verb, mocker):
                break
            points += 1
            leases.release("c1", "eth0")
            assert leases.holder("10.0.0.2") is None and leases.holder("fd00::2") is None
            assert not os.path.exists(leases.index_path("c1", "eth0"))
    assert points == 6


def stops_at(point, leases, verb, mocker):
    """Run verb with its step number `point` raising. Whether there was such a step."""
    count = [0]

    class Stop(Exception):
        pass

    def step(real):
        def act(*arguments, **options):
            count[0] += 1
            if count[0] == point:
                raise Stop
            return real(*arguments, **options)

        return act

    for name in ("write_file", "remove_file"):
        mocker.patch.object(mncni, name, step(getattr(mncni, name)))
    try:
        leases.take(["10.0.0.2", "fd00::2"], "c1", "eth0") if verb == "take" else leases.release("c1", "eth0")
        return False
    except Stop:
        return True
    finally:
        mocker.stopall()


def test_write_file_leaves_the_old_file_when_it_fails(tmp_path, mocker):
    path = str(tmp_path / "f")
    mncni.write_file(path, "old")
    mocker.patch("os.rename", side_effect=OSError(28, "No space left on device"))
    with pytest.raises(OSError) as raised:
        mncni.write_file(path, "new")
    assert raised.value.filename == path
    assert os.listdir(tmp_path) == ["f"] and mncni.read_file(path) == "old"


def test_write_file_follows_no_link_that_lies_in_wait(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("safe")
    os.symlink(victim, mncni.unfinished(str(tmp_path / "f")))
    with pytest.raises(OSError):
        mncni.write_file(str(tmp_path / "f"), "new")
    assert victim.read_text() == "safe"


def test_of_several_writers_at_once_a_reader_sees_one_or_another_whole(tmp_path):
    """Also beside what a killed one left."""
    path, texts = str(tmp_path / "f"), [letter * 300_000 for letter in "abc"]
    mncni.write_file(path, texts[0])
    (tmp_path / os.path.basename(mncni.unfinished(path))).write_text("half of something longer" * 20_000)
    writers = [threading.Thread(target=lambda text=text: [mncni.write_file(path, text) for _ in range(30)]) for text in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert mncni.read_file(path) in texts
    assert os.listdir(tmp_path) == ["f"]


def test_a_lock_is_waited_for_and_given_up_with_code_11(tmp_path):
    path = str(tmp_path / "lock")
    with mncni.Locked(path), pytest.raises(mncni.CNIError) as raised, mncni.Locked(path, timeout_s=0.05):
        pass
    assert raised.value.code == 11 and path in raised.value.msg
    entered = threading.Event()
    with mncni.Locked(path):
        waiting = threading.Thread(target=lambda: [mncni.Locked(path).__enter__(), entered.set()])
        waiting.start()
        assert not entered.wait(0.05)
    assert entered.wait(10)
    waiting.join()


def test_who_gave_up_waiting_for_a_lock_does_not_get_it_later(tmp_path):
    """It lives on in the agent, which would hold it for good."""
    path = str(tmp_path / "lock")
    with mncni.Locked(path):
        for _ in range(20):
            with pytest.raises(mncni.CNIError), mncni.Locked(path, timeout_s=0):
                pass
    for _ in range(20):
        with mncni.Locked(path, timeout_s=10):
            pass
    deadline = time.monotonic() + 10
    while path in [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]:
        assert time.monotonic() < deadline, "a descriptor of the lock stays open"
        time.sleep(0.01)


def test_hashes_and_names_are_what_they_were():
    """Names on hosts are made of them: a change would orphan every attachment."""
    assert mncni.short_hash("net", "c1", "eth0") == "d24d4ce558d333a3"
    assert mncni.host_ifname("mn", "net", "c1", "eth0") == "mnce558d333a3"
    assert mncni.mac_of("10.244.1.5") == "0a:58:0a:f4:01:05"


class TestInstall:
    def test_writes_the_plugin_and_launchers_and_is_idempotent(self, tmp_path):
        paths = mncni.install(str(tmp_path), ["naivewg"])
        assert sorted(os.listdir(tmp_path)) == ["loopback", "mncni", "mncni.py", "naivewg"]
        assert all(os.access(path, os.X_OK) for path in paths)
        times = {path: os.stat(path).st_mtime_ns for path in paths}
        mncni.install(str(tmp_path), ["naivewg"])
        assert {path: os.stat(path).st_mtime_ns for path in paths} == times

    def test_leaves_a_foreign_loopback_alone_and_refuses_other_foreign_files(self, tmp_path):
        (tmp_path / "loopback").write_text("the reference plugin")
        mncni.install(str(tmp_path))
        assert (tmp_path / "loopback").read_text() == "the reference plugin"
        (tmp_path / "naivewg").write_text("somebody else's")
        with pytest.raises(mncni.CNIError) as raised:
            mncni.install(str(tmp_path), ["naivewg"])
        assert "--force" in raised.value.msg and (tmp_path / "naivewg").read_text() == "somebody else's"
        mncni.install(str(tmp_path), ["naivewg"], force=True)
        assert "launcher" in (tmp_path / "naivewg").read_text()

    def test_an_unknown_name_is_refused(self, tmp_path):
        with pytest.raises(mncni.CNIError, match="no plugin"):
            mncni.install(str(tmp_path), ["naive"])


# ---- host ports ----


def portmap_call(command, number, run_dir):
    """ADD or DEL of the number-th pod with a host port. Returns the commands that it ran."""
    ran = []

    def run(command):
        ran.append(str(command))
        return mncni.Reply(0, "", "")

    ip = {"address": f"10.88.{number >> 8}.{number & 255}/16", "interface": 1}
    links = [{"name": "mncni0"}, {"name": "eth0", "sandbox": "/run/netns/c1"}]
    conf = {"cniVersion": "1.1.0", "name": "net", "plugin": "portmap", "prevResult": {"interfaces": links, "ips": [ip]}}
    conf["runtimeConfig"] = {"portMappings": [{"hostPort": 1000 + number, "containerPort": 80}]}
    if command == "ADD" and not (run_dir / "netns").exists():
        (run_dir / "netns").symlink_to("/proc/self/ns/net")
    names = {"CNI_CONTAINERID": f"c{number}", "CNI_NETNS": f"{run_dir}/netns", "CNI_IFNAME": "eth0"}
    environ = {**names, "CNI_COMMAND": command, "CNI_NETNS_OVERRIDE": "1", "MNCNI_RUN_DIR": str(run_dir)}
    exit_code, stdout = mncni.answer(environ, mncni.to_json(conf), run)
    assert exit_code == 0, stdout
    return ran


def test_the_host_ports_of_all_pods_are_written_in_one_transaction(tmp_path):
    """Each ADD and DEL runs one nft, however many pods there are, which writes one rule for each of them; the last DEL leaves no file."""
    for number in range(2, 60):
        ran = portmap_call("ADD", number, tmp_path)
        assert [command.split()[0] for command in ran] == ["ip", "nft", "tc", "tee"]  # tc and tee: for 127.0.0.1
        assert ran[1].count(" dnat ip to ") == number - 1
    for number in range(2, 60):
        ran = [command for command in portmap_call("DEL", number, tmp_path) if command.startswith("nft")]
        assert ran[0].count(" dnat ip to ") == 59 - number
    assert [path.name for path in (tmp_path / "portmap").iterdir()] == ["lock"]

def test_restore_makes_no_table_when_the_last_pod_goes_meanwhile(tmp_path, monkeypatch):
    states = iter([{"path": "a state"}, {}])
    monkeypatch.setattr(mncni, "look_spoofs", lambda run_dir: next(states))
    assert mncni.restore_spoof(str(tmp_path), lambda command: pytest.fail(f"runs {command.argv}")) == []
