#!/usr/bin/python3
"""A CRI client for tests: asks a container runtime what kubelet asks it.

    cri.py DIRECTORY SOCKET      DIRECTORY: where protoc has made cri_pb2.py of cri.proto

A line on stdin is a JSON list of calls to make side by side, [["RunPodSandbox", {"config": {...}}], ...]; the line that comes back
on stdout lists the replies in that order, each a message, or {"error": text}. Python's gRPC is the distribution's, so it runs
under /usr/bin/python3, not in the environment of pytest.
"""

import json
import sys

import grpc
from google.protobuf import json_format

TIMEOUT_S = 120  # kubelet's for most calls


def start(channel, messages, method, request):
    """The reply to come of one call."""
    kinds = [getattr(messages, method + kind) for kind in ("Request", "Response")]
    call = channel.unary_unary(f"/runtime.v1.RuntimeService/{method}", kinds[0].SerializeToString, kinds[1].FromString)
    return call.future(json_format.ParseDict(request, kinds[0]()), timeout=TIMEOUT_S)


def finish(future):
    """A reply as a dict."""
    try:
        return json_format.MessageToDict(future.result(), preserving_proto_field_name=True)
    except grpc.RpcError as error:
        return {"error": f"{error.code().name}: {error.details()}"}


def main(directory, socket):
    sys.path.append(directory)
    import cri_pb2

    with grpc.insecure_channel(f"unix://{socket}", [("grpc.enable_http_proxy", 0)]) as channel:
        for line in sys.stdin:
            futures = [start(channel, cri_pb2, *call) for call in json.loads(line)]
            print(json.dumps([finish(future) for future in futures]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
