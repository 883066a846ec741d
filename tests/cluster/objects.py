"""The objects that the tests put into the cluster, all in the namespace `tests`."""
from pathlib import Path

NAMESPACE = "tests"
PORT, HOST_PORT, HOST_NETWORK_PORT, NODE_PORT, LOCAL_NODE_PORT = 8000, 9000, 8100, 30080, 30081
PROTOCOLS = ("TCP", "UDP")
PROGRAM = "/peer/peer.py"


def item(kind, name, version="v1", **more):
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}, **more}


def container(port, name_from, **more):
    """A container with the server of peer.py. name_from: the field of the pod that it names itself by."""
    return {
        "name": "peer", "image": "python:3-slim", "command": ["python3", PROGRAM, "serve", str(port), "$(NAME)"],
        "env": [{"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": name_from}}}],
        "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
        "volumeMounts": [{"name": "peer", "mountPath": "/peer"}], **more,
    }


def template(app, containers, **more):
    """A pod template. The pods end at once: they keep nothing."""
    return {"metadata": {"labels": {"app": app}},
            "spec": {"containers": containers, "terminationGracePeriodSeconds": 0,
                     "volumes": [{"name": "peer", "configMap": {"name": "peer"}}], **more}}


def workload(kind, name, pod, **more):
    return item(kind, name, "apps/v1", spec={"selector": {"matchLabels": {"app": name}}, "template": pod, **more})


def service(name, selector, port=PORT, node_port=0, **more):
    ports = [{"name": each.lower(), "protocol": each, "port": port, **({"nodePort": node_port} if node_port else {})} for each in PROTOCOLS]
    return item("Service", name, spec={"selector": selector, "ports": ports, "ipFamilyPolicy": "PreferDualStack", **more})


def everything(nodes):
    """A pod on each node, pods-0 and so on, with host ports; one on each node's own network; and Services of every kind for them."""
    apart = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "pods"}}}]}}
    host_ports = [{"containerPort": PORT, "hostPort": HOST_PORT, "protocol": each} for each in PROTOCOLS]
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        item("ConfigMap", "peer", data={"peer.py": Path(__file__).with_name("peer.py").read_text()}),
        workload("StatefulSet", "pods", template("pods", [container(PORT, "metadata.name", ports=host_ports)], affinity=apart),
                 replicas=nodes, serviceName="headless", podManagementPolicy="Parallel"),
        workload("DaemonSet", "hosts", template("hosts", [container(HOST_NETWORK_PORT, "spec.nodeName")], hostNetwork=True,
                                                dnsPolicy="ClusterFirstWithHostNet")),
        service("headless", {"app": "pods"}, clusterIP="None", publishNotReadyAddresses=True),
        service("all", {"app": "pods"}),
        *(service(f"one-{number}", {"statefulset.kubernetes.io/pod-name": f"pods-{number}"}) for number in range(nodes)),
        service("hosts", {"app": "hosts"}, HOST_NETWORK_PORT),
        service("node-port", {"app": "pods"}, node_port=NODE_PORT, type="NodePort"),
        service("local", {"app": "pods"}, node_port=LOCAL_NODE_PORT, type="NodePort", externalTrafficPolicy="Local"),
    ]
