#!/usr/bin/env bash
# Makes an AKS cluster without a network, for MNCNI:  deploy/aks/provision.sh [--dry-run]
#
# What it makes is named by these variables; those in the environment win. deploy/aks/cleanup.sh removes it again.
set -euo pipefail
: "${GROUP:=mncni}" "${CLUSTER:=mncni}" "${LOCATION:=westeurope}"
: "${NODES:=2}" "${NODE_SIZE:=Standard_B2s}" "${KUBERNETES:=}"  # KUBERNETES: a version, at least 1.30; empty: AKS's default

settings=$(dirname "$0")/../settings.env
POD_CIDR=$(sed -n 's/^MNCNI_CLUSTER_CIDR=\([^,]*\).*/\1/p' "$settings")

dry_run=false
main() {
    case ${1:-} in
        --dry-run) dry_run=true ;;
        "") check_az ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    run az group create --name "$GROUP" --location "$LOCATION" --output none
    # --network-plugin none: nodes come without CNI and without pod CIDRs, and stay NotReady until MNCNI is there.
    # --pod-cidr: then only kube-proxy heeds it, to tell pods from others. So it is ours.
    run az aks create --resource-group "$GROUP" --name "$CLUSTER" --location "$LOCATION" --node-count "$NODES" --node-vm-size "$NODE_SIZE" \
        ${KUBERNETES:+--kubernetes-version "$KUBERNETES"} --network-plugin none --pod-cidr "$POD_CIDR" \
        --generate-ssh-keys --output none
    run az aks get-credentials --resource-group "$GROUP" --name "$CLUSTER" --overwrite-existing
    echo "next, at the top of the repository:  kubectl apply -k ." >&2
}

run() {
    printf '+%s\n' "$(printf ' %q' "$@")" >&2
    $dry_run || "$@"
}

check_az() {
    command -v az >/dev/null || { echo "needs az, the Azure CLI: https://aka.ms/azure-cli" >&2; exit 1; }
    az account show --output none 2>/dev/null || { echo "az is not logged in: az login" >&2; exit 1; }
}

main "$@"
