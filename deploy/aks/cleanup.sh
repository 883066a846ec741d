#!/usr/bin/env bash
# Removes what deploy/aks/provision.sh has made, which is the whole resource group:  deploy/aks/cleanup.sh [--dry-run]
#
# It asks, unless YES=1, for the group goes with everything in it. GROUP and CLUSTER are those of provision.sh.
set -euo pipefail
: "${GROUP:=mncni}" "${CLUSTER:=mncni}" "${YES:=}"

dry_run=false
main() {
    case ${1:-} in
        --dry-run) dry_run=true ;;
        "") check_az; ask ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    run az group delete --name "$GROUP" --yes
    if command -v kubectl >/dev/null; then
        run kubectl config delete-context "$CLUSTER" || echo "kubectl had no context $CLUSTER" >&2
    fi
}

run() {
    printf '+%s\n' "$(printf ' %q' "$@")" >&2
    $dry_run || "$@"
}

check_az() {
    command -v az >/dev/null || { echo "needs az, the Azure CLI: https://aka.ms/azure-cli" >&2; exit 1; }
    az account show --output none 2>/dev/null || { echo "az is not logged in: az login" >&2; exit 1; }
}

ask() {
    [[ $YES ]] && return
    local answer
    read -r -p "Delete the resource group $GROUP with everything in it? Type its name: " answer
    [[ $answer == "$GROUP" ]] || { echo "nothing was deleted" >&2; exit 1; }
}

main "$@"
