"""deploy/aks: the commands that the scripts give to az, which is a stand-in here."""

import os
import subprocess

import pytest

from tests.manifests import DEPLOY, settings

STAND_IN = """#!/bin/sh
printf '%s' "${0##*/}" >>"$RECORD"; printf ' %s' "$@" >>"$RECORD"; echo >>"$RECORD"
case "$*" in "account show"*) exit ${NOT_LOGGED_IN:-0};; "$FAILS"*) exit 3;; esac
"""


@pytest.fixture
def script(tmp_path):
    """script(name, *words, answer, **environ) -> (exit status, what was said, the commands that were run)."""
    for name in ("az", "kubectl"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(0o755)

    def run(name, *words, answer="", path=f"{tmp_path}/bin:/usr/bin:/bin", **environ):
        record = tmp_path / "record"
        record.write_text("")
        environ = {"PATH": path, "RECORD": str(record), "FAILS": "nothing", **environ}
        argv = ["/bin/bash", str(DEPLOY / "aks" / name), *words]
        done = subprocess.run(argv, input=answer, capture_output=True, text=True, env=environ, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr, record.read_text().splitlines()

    return run


def test_provision_makes_a_group_a_cluster_without_network_and_gets_its_credentials(script):
    cidr = settings()["MNCNI_CLUSTER_CIDR"].split(",")[0]
    code, _, commands = script("provision.sh", NODES="3")
    assert code == 0
    assert commands == [
        "az account show --output none",
        "az group create --name mncni --location westeurope --output none",
        "az aks create --resource-group mncni --name mncni --location westeurope --node-count 3 --node-vm-size Standard_B2s"
        f" --network-plugin none --pod-cidr {cidr} --generate-ssh-keys --output none",
        "az aks get-credentials --resource-group mncni --name mncni --overwrite-existing",
    ]


def test_names_with_spaces_stay_whole_and_a_version_is_passed_on(script):
    _, said, commands = script("provision.sh", GROUP="my group", KUBERNETES="1.31.2")
    assert r"+ az group create --name my\ group --location" in said
    assert "--kubernetes-version 1.31.2 --network-plugin none" in commands[2]


@pytest.mark.parametrize("name", ["provision.sh", "cleanup.sh"])
def test_a_dry_run_runs_nothing_and_needs_no_az(script, name):
    code, said, commands = script(name, "--dry-run", path="/usr/bin:/bin")
    assert (code, commands) == (0, [])
    assert "+ az group" in said


@pytest.mark.parametrize("name", ["provision.sh", "cleanup.sh"])
def test_without_az_or_a_login_nothing_is_tried(script, name):
    assert script(name, NOT_LOGGED_IN="1") == (1, "az is not logged in: az login\n", ["az account show --output none"])
    if not any(os.access(f"{part}/az", os.X_OK) for part in ("/usr/bin", "/bin")):
        assert script(name, path="/usr/bin:/bin")[:2] == (1, "needs az, the Azure CLI: https://aka.ms/azure-cli\n")


def test_a_step_that_fails_is_the_last(script):
    code, _, commands = script("provision.sh", FAILS="aks create")
    assert (code, len(commands)) == (3, 3)


def test_cleanup_asks_and_deletes_nothing_without_the_name(script):
    assert script("cleanup.sh", answer="y\n")[::2] == (1, ["az account show --output none"])
    code, _, commands = script("cleanup.sh", answer="mncni\n")
    assert (code, commands[1:]) == (0, ["az group delete --name mncni --yes", "kubectl config delete-context mncni"])


def test_cleanup_without_a_person_needs_a_word(script):
    assert script("cleanup.sh", YES="1", GROUP="g1")[2][1] == "az group delete --name g1 --yes"


def test_an_unknown_word_prints_what_the_script_is_for(script):
    code, said, commands = script("cleanup.sh", "--help")
    assert (code, commands) == (2, [])
    assert "deploy/aks/cleanup.sh [--dry-run]" in said
