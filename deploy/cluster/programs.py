"""What the nodes of a cluster run: the command line and the configuration of each program. All of it is pure.

`kind` says what cluster it is: {"families": "46", "proxy": "iptables", "containerd": "2.1.4" or "debian"}.
"""
import json

# The address plan of each family. {n} is the number of a node; the lab's underlay gives the nodes' own addresses.
FAMILIES = {
    "4": {"underlay": "ipv4", "pods": "10.244.0.0/16", "services": "10.96.0.0/16", "api": "10.96.0.1", "dns": "10.96.0.10",
          "gateway": "192.0.2.254/24"},
    "6": {"underlay": "ipv6", "pods": "fd00:10:244::/48", "services": "fd00:10:96::/112", "api": "fd00:10:96::1", "dns": "fd00:10:96::a",
          "gateway": "2001:db8::fffe/64"},
}
DOMAIN, API_PORT = "cluster.local", 6443
PKI, CONF = "/k8s/pki", "/k8s/conf"                  # in a node
SOCKET = "/run/containerd/containerd.sock"
ETCD = "http://127.0.0.1:2379"


def every(kind, key):
    """The values of FAMILIES for the families of this cluster, the first family first."""
    return [FAMILIES[family][key] for family in kind["families"]]


def bracketed(address):
    """An address as URLs have it."""
    return f"[{address}]" if ":" in address else address


# ---------------------------------------------------------------------------------------------------------------------------
# Certificates
# ---------------------------------------------------------------------------------------------------------------------------
def plan_certificates(kind, nodes, addresses):
    """[(name, CA's name or "", subject, alternative names)]; addresses: the API server's."""
    names = [f"DNS:{name}" for name in ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
                                        f"kubernetes.default.svc.{DOMAIN}")]
    names += [f"IP:{address}" for address in ("127.0.0.1", *every(kind, "api"), *addresses)]
    users = {"admin": "/O=system:masters/CN=admin", **{name: f"/CN=system:{name}" for name in CLIENTS}}
    users.update((node, f"/O=system:nodes/CN=system:node:{node}") for node in nodes)
    return [
        ("ca", "", "/CN=kubernetes", []),
        ("front-ca", "", "/CN=front-proxy", []),
        ("front", "front-ca", "/CN=front-proxy-client", []),
        ("accounts", "ca", "/CN=service-accounts", []),
        ("apiserver", "ca", "/CN=kube-apiserver", names),
        ("apiserver-kubelet", "ca", "/O=system:masters/CN=apiserver-kubelet", []),
        *((name, "ca", subject, []) for name, subject in users.items()),
    ]


CLIENTS = ("kube-controller-manager", "kube-scheduler", "kube-proxy")


# ---------------------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------------------
def plan_node(kind, node, addresses):
    """{program: command line} of every node, in the order in which they start."""
    return {
        "containerd": ["containerd", "--config", f"{CONF}/containerd.toml"],
        "kubelet": ["kubelet", f"--config={CONF}/kubelet.json", f"--kubeconfig={PKI}/{node}.kubeconfig",
                    f"--hostname-override={node}", f"--node-ip={','.join(addresses)}"],
        "kube-proxy": ["kube-proxy", f"--config={CONF}/kube-proxy.json"],
    }


def plan_control_plane(kind, addresses):
    """The same for the control plane, which runs on one of the nodes."""
    return {
        "etcd": ["etcd", "--data-dir=/var/lib/etcd", "--unsafe-no-fsync", f"--listen-client-urls={ETCD}", f"--advertise-client-urls={ETCD}",
                 "--listen-peer-urls=http://127.0.0.1:2380", "--log-level=warn"],
        "kube-apiserver": plan_apiserver(kind, addresses),
        "kube-controller-manager": [
            *plan_client("kube-controller-manager"), "--controllers=*,bootstrapsigner,tokencleaner", "--use-service-account-credentials",
            "--allocate-node-cidrs=false", f"--service-account-private-key-file={PKI}/accounts.key", f"--root-ca-file={PKI}/ca.crt",
            f"--cluster-signing-cert-file={PKI}/ca.crt", f"--cluster-signing-key-file={PKI}/ca.key"],
        "kube-scheduler": plan_client("kube-scheduler"),
    }


def plan_client(name):
    """The command line of a part of the control plane that is a client of the API server, as far as it is the same for all."""
    access = [f"--{which}={PKI}/{name}.kubeconfig" for which in ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")]
    return [name, *access, "--leader-elect=false", "--bind-address=127.0.0.1"]


def plan_apiserver(kind, addresses):
    return [
        "kube-apiserver", f"--etcd-servers={ETCD}", f"--advertise-address={addresses[0]}", f"--secure-port={API_PORT}",
        f"--bind-address={'::' if '6' in kind['families'] else '0.0.0.0'}",
        f"--service-cluster-ip-range={','.join(every(kind, 'services'))}",
        "--allow-privileged", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
        f"--client-ca-file={PKI}/ca.crt", f"--tls-cert-file={PKI}/apiserver.crt", f"--tls-private-key-file={PKI}/apiserver.key",
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet.crt", f"--kubelet-client-key={PKI}/apiserver-kubelet.key",
        "--kubelet-preferred-address-types=InternalIP", f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
        f"--service-account-key-file={PKI}/accounts.crt", f"--service-account-signing-key-file={PKI}/accounts.key",
        f"--requestheader-client-ca-file={PKI}/front-ca.crt", "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User", f"--proxy-client-cert-file={PKI}/front.crt",
        f"--proxy-client-key-file={PKI}/front.key",
    ]


# ---------------------------------------------------------------------------------------------------------------------------
# Configuration files
# ---------------------------------------------------------------------------------------------------------------------------
def plan_files(kind, node):
    """{file name: content} of a node's configuration."""
    return {
        "containerd.toml": plan_containerd(kind),
        "kubelet.json": json.dumps(plan_kubelet(kind), indent=1),
        "kube-proxy.json": json.dumps(plan_proxy(kind, node), indent=1),
    }


def plan_kubelet(kind):
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", "cgroupDriver": "cgroupfs", "failCgroupV1": False,
        "failSwapOn": False, "clusterDNS": every(kind, "dns")[:1], "clusterDomain": DOMAIN, "resolvConf": "/etc/resolv.conf",
        "containerRuntimeEndpoint": f"unix://{SOCKET}", "serializeImagePulls": False,
        "authentication": {"x509": {"clientCAFile": f"{PKI}/ca.crt"}, "webhook": {"enabled": True}, "anonymous": {"enabled": False}},
        "authorization": {"mode": "Webhook"},
        # Images cannot be fetched again here, and the disk is the machine's, which other things may fill.
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
    }


def plan_proxy(kind, node):
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": kind["proxy"], "hostnameOverride": node,
        "detectLocalMode": "ClusterCIDR", "clusterCIDR": ",".join(every(kind, "pods")),
        "clientConnection": {"kubeconfig": f"{PKI}/kube-proxy.kubeconfig"},
        "conntrack": {"maxPerCore": 0, "min": 0},    # the size of the table is the machine's
    }


# containerd 2 and containerd 1.6 have the same settings at different places.
CRI = {"2": "io.containerd.cri.v1.runtime", "1.6": "io.containerd.grpc.v1.cri"}
PAUSE = {
    "2": 'version = 3\n[plugins."io.containerd.cri.v1.images".pinned_images]\nsandbox = "pause:local"\n'
         '[plugins."io.containerd.cri.v1.runtime"]',
    "1.6": 'version = 2\n[plugins."io.containerd.grpc.v1.cri"]\nsandbox_image = "pause:local"',
}
CONTAINERD = """{pause}
restrict_oom_score_adj = true  # for machines whose root has no CAP_SYS_RESOURCE
[plugins."{cri}".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
[plugins."{cri}".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
base_runtime_spec = "{conf}/container.json"
"""


def plan_containerd(kind):
    series = "1.6" if kind["containerd"] == "debian" else "2"
    return CONTAINERD.format(pause=PAUSE[series], cri=CRI[series], conf=CONF)


# A container has a procfs of its own, which shows the machine's boot ID. The hook puts the node's there, before the container starts.
HOOK = """#!/bin/sh
cat >/dev/null
if [ -d rootfs ]; then cd rootfs; fi  # runc starts hooks in the container's root or above it
mount --bind /k8s/boot_id "$PWD/proc/sys/kernel/random/boot_id" 2>>/var/log/hook.log || echo "in $PWD" >>/var/log/hook.log
"""


def plan_container(spec):
    """The runtime specification that every container starts from: containerd's own, with the hook."""
    return {**spec, "hooks": {"createContainer": [{"path": f"{CONF}/hook"}]}}
