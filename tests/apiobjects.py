"""What a Kubernetes API server does with objects, as pure functions: errors, patches, validation, field managers, realistic nodes.

The server itself is tests/apiserver.py. Objects are dicts as they come from JSON, and are never changed in place: every function that
changes one returns a new one. Facts: the API conventions, and the source of kube-apiserver 1.30; error texts are the ones it sends.
"""
import copy
import datetime
import ipaddress
import json
import re
import uuid

# kind -> what a server knows of a type. "conditions" etc.: lists that a strategic merge joins by a key instead of replacing them.
RESOURCES = {
    "nodes": {"kind": "Node", "group": "", "version": "v1", "namespaced": False, "status": True, "unconditional": True},
    "events": {"kind": "Event", "group": "", "version": "v1", "namespaced": True, "unconditional": True, "create_on_update": True},
    "leases": {"kind": "Lease", "group": "coordination.k8s.io", "version": "v1", "namespaced": True, "create_on_update": True},
    "events.k8s.io/events": {"kind": "Event", "group": "events.k8s.io", "version": "v1", "namespaced": True, "unconditional": True,
                             "create_on_update": True, "stored": "events"},
}
PARTIAL_KIND = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
# The newer Event's names of what the stored one calls otherwise.
EVENT_NAMES = {"regarding": "involvedObject", "note": "message", "reportingController": "reportingComponent", "deprecatedSource": "source",
               "deprecatedFirstTimestamp": "firstTimestamp", "deprecatedLastTimestamp": "lastTimestamp", "deprecatedCount": "count"}
MERGE_KEYS = {"status.conditions": "type", "status.addresses": "type", "metadata.ownerReferences": "uid"}
MERGED_SETS = ("spec.podCIDRs", "metadata.finalizers")        # lists of plain values that a strategic merge joins
SERVER_OWNED = ("uid", "creationTimestamp", "generation", "resourceVersion", "managedFields", "selfLink")


def compact(value):
    """JSON bytes as an API server writes them: no spaces, UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def group_version(resource):
    """apiVersion of a resource: "v1", "coordination.k8s.io/v1"."""
    row = RESOURCES[resource]
    return f"{row['group']}/{row['version']}" if row["group"] else row["version"]


def plural(resource):
    return resource.rpartition("/")[2]


def stored(resource):
    """The resource under which objects are kept: both kinds of Event are one."""
    return RESOURCES[resource].get("stored", resource)


def qualified(resource):
    """"nodes", "leases.coordination.k8s.io": how errors name a resource."""
    group = RESOURCES[resource]["group"]
    return f"{plural(resource)}.{group}" if group else resource


def kind_of(resource):
    return {"kind": RESOURCES[resource]["kind"], "apiVersion": group_version(resource)}


def partial(obj):
    """The PartialObjectMetadata of an object."""
    return {**PARTIAL_KIND, "metadata": obj["metadata"]}


def renamed(obj, names):
    return {names.get(key, key): value for key, value in obj.items()}


def to_stored(resource, obj):
    """What a client sent, as it is kept."""
    return renamed(obj, EVENT_NAMES) if resource != stored(resource) else obj


def from_stored(resource, obj):
    """What is kept, as this resource presents it."""
    if resource != stored(resource):
        obj = {key: value for key, value in obj.items() if value != ""}
        obj = renamed(obj, {old: new for new, old in EVENT_NAMES.items()})
    return {**obj, **kind_of(resource)}


# ---------------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------------
class ApiError(Exception):
    """An answer other than success: .status is the Status object, .code its HTTP code, .headers go with it."""

    def __init__(self, code, reason, message, details=None, headers=()):
        super().__init__(message)
        self.code, self.headers = code, dict(headers)
        self.status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
        if reason:
            self.status["reason"] = reason
        if details is not None:
            self.status["details"] = details
        self.status["code"] = code


def details_of(resource, name, **more):
    """The details of an error about one object."""
    row = RESOURCES[resource]
    found = {"name": name, "group": row["group"], "kind": plural(resource), **more}
    return {key: value for key, value in found.items() if value}


def bad_request(message):
    return ApiError(400, "BadRequest", message)


def unauthorized():
    return ApiError(401, "Unauthorized", "Unauthorized")


def forbidden(user, verb, resource, subresource="", namespace="", name=""):
    """403 in the words of the RBAC authorizer."""
    row = RESOURCES[resource]
    scope = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    full = f"{plural(resource)}/{subresource}" if subresource else plural(resource)
    what = f'{qualified(resource)} "{name}"' if name else qualified(resource)
    message = f'{what} is forbidden: User "{user}" cannot {verb} resource "{full}" in API group "{row["group"]}" {scope}'
    return ApiError(403, "Forbidden", message, details_of(resource, name))


def forbidden_path(user, verb, path):
    return ApiError(403, "Forbidden", f'forbidden: User "{user}" cannot {verb} path "{path}"', {})


def no_such_resource():
    return ApiError(404, "NotFound", "the server could not find the requested resource", {})


def internal(message):
    """500 as the server makes it of an error that it has no better code for: without a reason."""
    return ApiError(500, "", message)


def not_found(resource, name):
    return ApiError(404, "NotFound", f'{qualified(resource)} "{name}" not found', details_of(resource, name))


def already_exists(resource, name):
    return ApiError(409, "AlreadyExists", f'{qualified(resource)} "{name}" already exists', details_of(resource, name))


MODIFIED = "the object has been modified; please apply your changes to the latest version and try again"


def conflict(resource, name, why=MODIFIED, by_kind=False):
    """409. by_kind: it names the kind where others name the resource, as a DELETE does."""
    details = details_of(resource, name)
    if by_kind:
        details["kind"] = RESOURCES[resource]["kind"]
    named = details["kind"] + (f".{details['group']}" if "group" in details else "")
    return ApiError(409, "Conflict", f'Operation cannot be fulfilled on {named} "{name}": {why}', details)


def storage_error(resource, meta, text):
    """How a failed precondition of the storage reads."""
    where = "/".join(filter(None, ("minions" if resource == "nodes" else plural(resource), meta.get("namespace", ""), meta["name"])))
    return f"StorageError: invalid object, Code: 4, Key: /registry/{where}, ResourceVersion: 0, AdditionalErrorMsg: {text}"


def gone(message):
    return ApiError(410, "Expired", message)


def invalid(resource, name, causes, kind=None):
    """422; causes as [(field, reason, text)]: `Node "n1" is invalid: spec.podCIDRs: Forbidden: ...`."""
    row = RESOURCES[resource]
    kind = kind or row["kind"]
    texts = [f"{field}: {text}" for field, _, text in causes]
    text = texts[0] if len(texts) == 1 else "[" + ", ".join(texts) + "]"
    group = "" if kind == "Event" else row["group"]        # to validation both kinds of Event are one
    named = kind + (f".{group}" if group else "")
    details = {"name": name, "group": group, "kind": kind,
               "causes": [{"reason": reason, "message": text, "field": field} for field, reason, text in causes]}
    return ApiError(422, "Invalid", f'{named} "{name}" is invalid: {text}', {key: value for key, value in details.items() if value})


def invalid_options(kind, field, reason, text):
    """422 for a parameter of the query."""
    details = {"group": "meta.k8s.io", "kind": kind, "causes": [{"reason": reason, "message": text, "field": field}]}
    return ApiError(422, "Invalid", f'{kind}.meta.k8s.io "" is invalid: {field}: {text}', details)


def bad_patch(text):
    """422 for a patch whose outcome is no object of the type."""
    details = {"causes": [{"reason": "FieldValueInvalid", "message": text, "field": "patch"}]}
    return ApiError(422, "Invalid", f' "" is invalid: patch: {text}', details)


def too_large(version, now):
    """504: a resourceVersion that this server has not seen yet."""
    details = {"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}], "retryAfterSeconds": 1}
    return ApiError(504, "Timeout", f"Timeout: Too large resource version: {version}, current: {now}", details, {"Retry-After": "1"})


def denied(resource, name, policy, binding, message, code=422):
    """The refusal of a ValidatingAdmissionPolicy; 422 Invalid unless the policy gives another reason."""
    reasons = {401: "Unauthorized", 403: "Forbidden", 413: "RequestEntityTooLarge", 422: "Invalid"}
    text = f"ValidatingAdmissionPolicy '{policy}' with binding '{binding}' denied request: {message}"
    details = details_of(resource, name, causes=[{"message": text}])
    return ApiError(code, reasons[code], f'{qualified(resource)} "{name}" is forbidden: {text}', details)


# ---------------------------------------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------------------------------------
def merge_patch(target, patch):
    """RFC 7386: null removes, objects merge, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def json_patch(target, operations):
    """RFC 6902. ApiError 422 when a test fails or a path is not there, 400 when the patch is none."""
    if not isinstance(operations, list):
        raise bad_request(f"error decoding patch: json: cannot unmarshal {go_kind(operations)} into Go value of type "
                          "[]handlers.jsonPatchOp")
    document = copy.deepcopy(target)
    for operation in operations:
        try:
            document = json_patch_step(document, operation)
        except (KeyError, IndexError, ValueError, TypeError):
            raise ApiError(422, "Invalid", "the server rejected our request due to an error in our request", {}) from None
    return document


def pointer(path):
    """A JSON pointer as a list of keys."""
    if path and not path.startswith("/"):
        raise ValueError(path)
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]


def child_of(parent, key):
    return parent[int(key)] if isinstance(parent, list) else parent[key]


def json_patch_step(document, operation):
    """The document after one operation; it may be changed in place. KeyError, IndexError, ValueError: it does not apply."""
    verb, keys = operation["op"], pointer(operation["path"])
    if verb in ("move", "copy"):
        source = pointer(operation["from"])
        value = document
        for key in source:
            value = child_of(value, key)
        value = copy.deepcopy(value)
        if verb == "move":
            document = json_patch_step(document, {"op": "remove", "path": operation["from"]})
        return json_patch_step(document, {"op": "add", "path": operation["path"], "value": value})
    if not keys:
        if verb == "test" and document != operation["value"]:
            raise ValueError("test failed")
        return document if verb == "test" else copy.deepcopy(operation["value"])
    parent = document
    for key in keys[:-1]:
        parent = child_of(parent, key)
    change_child(parent, keys[-1], verb, operation)
    return document


def change_child(parent, key, verb, operation):
    """add, remove, replace or test one child."""
    if isinstance(parent, list):
        index = len(parent) if key == "-" else int(key)
        if verb == "add" and index <= len(parent):
            parent.insert(index, operation["value"])
            return
        key = index
    elif not isinstance(parent, dict):
        raise KeyError(key)
    if verb == "add":
        parent[key] = operation["value"]
        return
    present = parent[key]                            # KeyError, IndexError: nothing there to remove, replace or test
    if verb == "remove":
        del parent[key]
    elif verb == "replace":
        parent[key] = operation["value"]
    elif verb != "test" or present != operation["value"]:
        raise ValueError(verb)


def strategic_merge(target, patch, path=""):
    """Strategic merge patch: as merge_patch, but conditions and the like merge by their key, sets of values are joined.

    Understood: $patch: delete and replace, $deleteFromPrimitiveList/, $setElementOrder/ (order of the elements it names), $retainKeys.
    """
    if not isinstance(patch, dict):
        return patch
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    if patch.get("$patch") == "delete":
        return {}
    before = target if isinstance(target, dict) else {}
    merged = dict(before)
    for key in list(merged):
        if "$retainKeys" in patch and key not in patch["$retainKeys"]:
            del merged[key]
    for key, value in patch.items():
        directive, _, plain = key.partition("/")
        if directive == "$deleteFromPrimitiveList":
            merged[plain] = [item for item in merged.get(plain, []) if item not in value]
        elif key.startswith("$"):
            continue
        elif value is None:
            merged.pop(key, None)
        elif merged.get(key) is None:
            merged[key] = without_directives(value)  # new: taken as it is, whatever its lists merge by
        else:
            merged[key] = merged_value(merged[key], value, f"{path}.{key}".lstrip("."))
    for key, order in patch.items():
        if key.startswith("$setElementOrder/"):
            plain = key.partition("/")[2]
            at = f"{path}.{plain}".lstrip(".")
            refuse_order(patch.get(plain) or [], order, MERGE_KEYS.get(at))
            merged[plain] = ordered(merged.get(plain) or [], order, before.get(plain) or [], MERGE_KEYS.get(at))
    return merged


def without_directives(value):
    """What a patch brings, without what it says about merging."""
    if isinstance(value, list):
        return [without_directives(row) for row in value if not (isinstance(row, dict) and "$patch" in row)]
    if isinstance(value, dict):
        return {key: without_directives(child) for key, child in value.items()
                if child is not None and not key.startswith("$") and not (isinstance(child, dict) and "$patch" in child)}
    return value


def merged_value(old, new, path):
    """One field of a strategic merge."""
    if isinstance(new, list) and path in MERGE_KEYS:
        return merged_rows(old, new, MERGE_KEYS[path], path)
    if isinstance(new, list) and path in MERGED_SETS:
        return ordered(list(dict.fromkeys([*old, *new])), new, old, None)
    return strategic_merge(old, new, path)


def merged_rows(old, new, key, path):
    """Rows joined by their key."""
    if any(row.get("$patch") == "replace" for row in new):
        return [row for row in new if "$patch" not in row]
    rows = {row.get(key): row for row in old}
    for row in new:
        if key not in row:
            raise internal(f"map: {go_map(row)} does not contain declared merge key: {key}")
        if row.get("$patch") == "delete":
            rows.pop(row[key], None)
        else:
            rows[row[key]] = strategic_merge(rows[row[key]], row, f"{path}[]") if row[key] in rows else row
    return ordered(list(rows.values()), [row for row in new if row.get("$patch") != "delete"], old, key)


def ordered(values, first, before, key):
    """Values in the order of `first`, those it does not name between them: each goes before the first one that stood behind it before."""
    def name(value):
        return value.get(key) if key else value

    wanted, places = [name(value) for value in first], [name(value) for value in before]
    left = sorted((value for value in values if name(value) not in wanted), key=lambda value: places.index(name(value)))
    right = sorted((value for value in values if name(value) in wanted), key=lambda value: wanted.index(name(value)))
    merged = []
    while left and right:
        both = name(left[0]) in places and name(right[0]) in places
        is_before = both and places.index(name(left[0])) < places.index(name(right[0]))
        merged.append((left if is_before else right).pop(0))
    return merged + left + right


def refuse_order(rows, order, key):
    """ApiError unless the rows of a patch come in the order that $setElementOrder gives."""
    places = [row[key] if key else row for row in order]
    found = [row.get(key) if key else row for row in rows if not (key and "$patch" in row)]
    if [name for name in places if name in found] != found:
        raise internal(f"The order in patch list:\n[{' '.join(map(go_value, rows))}]\n doesn't match $setElementOrder list:\n"
                       f"[{' '.join(map(go_value, order))}]\n")


def go_value(value):
    return go_map(value) if isinstance(value, dict) else "<nil>" if value is None else str(value)


def go_strings(values):
    return "[]string{" + ", ".join(map(json.dumps, values)) + "}"


def go_map(row):
    """A map as Go prints it."""
    return "map[" + " ".join(f"{key}:{go_value(value)}" for key, value in sorted(row.items())) + "]"


PATCHES = {
    "application/merge-patch+json": merge_patch,
    "application/strategic-merge-patch+json": strategic_merge,
    "application/json-patch+json": json_patch,
}


# ---------------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------------
def with_pod_cidrs(node):
    """The node with spec.podCIDR and spec.podCIDRs in step: podCIDR is the first of podCIDRs, and where they differ podCIDR wins."""
    spec = node.get("spec") or {}
    single, several = spec.get("podCIDR", ""), spec.get("podCIDRs") or []
    if single and several[:1] != [single]:
        several = [single]
    spec = {key: value for key, value in spec.items() if key not in ("podCIDR", "podCIDRs")}
    if several:
        spec = {"podCIDR": several[0], "podCIDRs": several, **spec}
    return {**node, "spec": spec}


def node_causes(node, old=None):
    """What is wrong with a node as [(field, reason, text)]; old is the stored one, None for a new node."""
    causes = []
    cidrs = node["spec"].get("podCIDRs", [])
    networks = []
    for index, cidr in enumerate(cidrs):
        try:
            networks.append(ipaddress.ip_network(cidr))
        except ValueError:
            causes.append((f"spec.podCIDRs[{index}]", "FieldValueInvalid",
                           f'Invalid value: "{cidr}": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)'))
    versions = [network.version for network in networks]
    if len(cidrs) > 2 or len(set(versions)) < len(versions):
        causes.append(("spec.podCIDRs", "FieldValueInvalid",
                       f"Invalid value: {go_strings(cidrs)}: may specify no more than one CIDR for each IP family"))
    before = old["spec"].get("podCIDRs", []) if old else []
    if before and before != cidrs:
        causes.append(("spec.podCIDRs", "FieldValueForbidden",
                       'Forbidden: node updates may not change podCIDR except from "" to valid'))
    provider = old["spec"].get("providerID", "") if old else ""
    if provider and provider != node["spec"].get("providerID", ""):
        causes.append(("spec.providerID", "FieldValueForbidden",
                       'Forbidden: node updates may not change providerID except from "" to valid'))
    return causes


def lease_causes(lease, _old=None):
    spec, causes = lease.get("spec", {}), []
    for key in ("leaseDurationSeconds", "leaseTransitions"):
        value, least = spec.get(key), 1 if key == "leaseDurationSeconds" else 0
        if value is not None and value < least:
            text = "must be greater than 0" if least else "must be greater than or equal to 0"
            causes.append((f"spec.{key}", "FieldValueInvalid", f"Invalid value: {value}: {text}"))
    return causes


def event_causes(event, old=None):
    """An event about a cluster-scoped object belongs into the namespace default; one with an eventTime may be in kube-system, too."""
    if old:
        return []
    about, own = event.get("involvedObject", {}).get("namespace", ""), event["metadata"]["namespace"]
    causes = []
    allowed = (about,) if about else ("default", "kube-system") if event.get("eventTime") else ("default",)
    if own not in allowed:
        causes.append(("involvedObject.namespace", "FieldValueInvalid", f'Invalid value: "{about}": does not match event.namespace'))
    if event.get("eventTime"):
        for key in ("reportingComponent", "reportingInstance", "action", "reason"):
            if not event.get(key):
                causes.append((key, "FieldValueRequired", "Required value"))
        if event.get("type") not in ("Normal", "Warning"):
            causes.append(("type", "FieldValueInvalid", f'Invalid value: "": has invalid value: {event.get("type", "")}'))
    if len(event.get("message", "")) > 1024 and event.get("eventTime"):
        causes.append(("message", "FieldValueInvalid", 'Invalid value: "": can have at most 1024 characters'))
    return causes


def new_event_causes(event, old=None):
    """events.k8s.io/v1 insists on eventTime, and with it on what it asks for; later only the series and metadata may change."""
    if not old and not event.get("eventTime"):
        return [("eventTime", "FieldValueRequired", "Required value")]
    fixed = [key for key in event if key not in ("metadata", "series", "kind", "apiVersion")] if old else []
    changed = [(key, "FieldValueInvalid", f"Invalid value: {json.dumps(event[key])}: field is immutable")
               for key in fixed if event[key] != old.get(key)]
    return changed or [(field.replace("Component", "Controller"), reason, text) for field, reason, text in event_causes(event, old)]


DNS_NAME = "[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"


def name_causes(resource, obj):
    """What is wrong with the names of a new object. A generateName may end in "-", and not in "."; nobody looks at that of an old Event."""
    meta = obj["metadata"]
    if not meta.get("name"):
        return [("metadata.name", "FieldValueRequired", "Required value: name or generateName is required")]
    names = {"name": meta["name"]}
    if "generateName" in meta and (stored(resource) != "events" or obj.get("eventTime")):
        names = {"generateName": re.sub("-$", "", meta["generateName"]), **names}
    wrong = [key for key, name in names.items() if len(name) > 253 or not re.fullmatch(DNS_NAME, name)]
    return [(f"metadata.{key}", "FieldValueInvalid",
             f'Invalid value: "{meta[key]}": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, \'-\' or '
             f"'.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{DNS_NAME}')")
            for key in wrong]


CAUSES = {"nodes": node_causes, "leases": lease_causes, "events": event_causes, "events.k8s.io/events": new_event_causes}


def meta_causes(meta, old):
    """What an update must leave alone in metadata."""
    causes = []
    for key in ("name", "namespace", "uid"):
        if meta.get(key) != old.get(key):
            causes.append((f"metadata.{key}", "FieldValueInvalid", f'Invalid value: "{meta.get(key, "")}": field is immutable'))
    more = [name for name in meta.get("finalizers", []) if name not in old.get("finalizers", [])]
    if more and "deletionTimestamp" in old:
        causes.append(("metadata.finalizers", "FieldValueForbidden", "Forbidden: no new finalizers can be added if the object is being "
                                                                     f"deleted, found new finalizers {go_strings(more)}"))
    size = sum(len(key) + len(value) for key, value in meta.get("annotations", {}).items())
    if size > 256 * 1024:
        causes.append(("metadata.annotations", "FieldValueTooLong", "Too long: must have at most 262144 bytes"))
    return causes


NODE_INFO = ("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "containerRuntimeVersion", "kubeletVersion",
             "kubeProxyVersion", "operatingSystem", "architecture")
EVENT_EMPTY = {"source": {}, "firstTimestamp": None, "lastTimestamp": None, "eventTime": None, "reportingComponent": "",
               "reportingInstance": ""}


def prepared(resource, obj):
    """The object as the server stores and shows it: what its type always has is there, nothing in metadata is empty."""
    meta = {key: value for key, value in obj.get("metadata", {}).items() if value not in (None, "", {}, [])}
    obj = {**obj, **kind_of(resource), "metadata": meta}
    if resource == "nodes":
        return with_pod_cidrs({**obj, "status": whole_status(obj.get("status") or {})})
    return {**EVENT_EMPTY, **obj} if resource == "events" else {**obj, "spec": obj.get("spec") or {}}


def whole_status(status):
    """A node's status with what is always in it. A condition without times has null in their place."""
    status = {key: value for key, value in status.items() if value not in (None, {}, [], "")}
    info = {**dict.fromkeys(NODE_INFO, ""), **status.get("nodeInfo", {})}
    if "conditions" in status:
        always = {"type": "", "status": "", "lastHeartbeatTime": None, "lastTransitionTime": None}
        status["conditions"] = [{**always, **row} for row in status["conditions"]]
    return {"daemonEndpoints": {"kubeletEndpoint": {"Port": 0}}, **status, "nodeInfo": info}


def kept_part(resource, subresource, new, old):
    """The update with what this endpoint cannot change set back: nodes leaves status alone, nodes/status leaves spec alone."""
    if not RESOURCES[resource].get("status"):
        return new
    part = "spec" if subresource == "status" else "status"
    new = {key: value for key, value in new.items() if key != part}
    return {**new, part: old[part]} if part in old else new


# What decoding knows of the types, as far as agents write them. Fields that are not here are dropped, as the server drops what it does
# not know. "..." keeps everything below; micro: a time with six digits of a second; time: a time, kept in whole seconds.
STRING, NUMBER, BOOL, TIME, MICRO, KEEP = "string", "number", "bool", "time", "micro", "..."
REFERENCE = dict.fromkeys(("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath"), STRING)
META = {
    **dict.fromkeys(("name", "generateName", "namespace", "uid", "resourceVersion", "selfLink"), STRING), "generation": NUMBER,
    "creationTimestamp": TIME, "deletionTimestamp": TIME, "deletionGracePeriodSeconds": NUMBER, "labels": {"*": STRING},
    "annotations": {"*": STRING}, "ownerReferences": [KEEP], "finalizers": [STRING], "managedFields": [KEEP],
}
EVENT = {
    "metadata": META, "eventTime": MICRO, "series": {"count": NUMBER, "lastObservedTime": MICRO}, "reportingInstance": STRING,
    "action": STRING, "reason": STRING, "type": STRING, "related": REFERENCE,
}
TYPES = {
    "nodes": {
        "metadata": META,
        "spec": {"podCIDR": STRING, "podCIDRs": [STRING], "providerID": STRING, "unschedulable": BOOL, "taints": [KEEP],
                 "configSource": KEEP, "externalID": STRING},
        "status": {
            **dict.fromkeys(("capacity", "allocatable", "daemonEndpoints", "nodeInfo", "config", "features"), KEEP), "phase": STRING,
            **dict.fromkeys(("images", "volumesInUse", "volumesAttached", "runtimeHandlers"), [KEEP]),
            "conditions": [{"type": STRING, "status": STRING, "lastHeartbeatTime": TIME, "lastTransitionTime": TIME, "reason": STRING,
                            "message": STRING}],
            "addresses": [{"type": STRING, "address": STRING}],
        },
    },
    "leases": {
        "metadata": META,
        "spec": {"holderIdentity": STRING, "leaseDurationSeconds": NUMBER, "acquireTime": MICRO, "renewTime": MICRO,
                 "leaseTransitions": NUMBER, "strategy": STRING, "preferredHolder": STRING},
    },
    "events": {**EVENT, "involvedObject": REFERENCE, "message": STRING, "source": {"component": STRING, "host": STRING},
               "firstTimestamp": TIME, "lastTimestamp": TIME, "count": NUMBER, "reportingComponent": STRING},
    "events.k8s.io/events": {
        **EVENT, "regarding": REFERENCE, "note": STRING, "deprecatedSource": {"component": STRING, "host": STRING},
        "deprecatedFirstTimestamp": TIME, "deprecatedLastTimestamp": TIME, "deprecatedCount": NUMBER, "reportingController": STRING},
}
SECONDS = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)")


def decoded(resource, obj):
    """(the object with the fields that its type has, ["spec.typo", ...] dropped). ValueError where a value has another type."""
    unknown = []
    found = decoded_value(obj, {"kind": STRING, "apiVersion": STRING, **TYPES[resource]}, "", unknown)
    return found, unknown


def decoded_value(value, kind, path, unknown):
    """One value of a type out of TYPES; null stands for absent."""
    if value is None or kind == KEEP:
        return value
    if isinstance(kind, str):
        return decoded_plain(value, kind, path)
    if go_kind(value) != ("object" if isinstance(kind, dict) else "array"):
        raise ValueError(f"json: cannot unmarshal {go_kind(value)} into Go struct field .{path} of type {path.rpartition('.')[2]}")
    if isinstance(kind, list):
        return [decoded_value(row, kind[0], path, unknown) for row in value]
    found = {}
    for key, child in value.items():
        at = f"{path}.{key}".lstrip(".")
        if "*" not in kind and key not in kind:
            unknown.append(at)
        elif child is not None:
            found[key] = decoded_value(child, kind.get(key) or kind["*"], at, unknown)
    return found


def decoded_plain(value, kind, path):
    """A string, number, bool or time."""
    wanted = "string" if kind in (TIME, MICRO) else kind
    if go_kind(value) != wanted:
        raise ValueError(f"json: cannot unmarshal {go_kind(value)} into Go struct field .{path} of type {wanted}")
    if kind not in (TIME, MICRO):
        return value
    match, layout = SECONDS.fullmatch(value), "2006-01-02T15:04:05.000000Z07:00" if kind == MICRO else "2006-01-02T15:04:05Z07:00"
    if not match or (kind == MICRO and len(match[2] or "") != 7):
        rest, expected = (value[19:], ".000000") if match else (value, "2006")
        raise ValueError(f'parsing time "{value}" as "{layout}": cannot parse "{rest}" as "{expected}"')
    if kind == TIME:
        when = datetime.datetime.fromisoformat(match[1] + match[3].replace("Z", "+00:00"))
        return when.astimezone(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return value


def go_kind(value):
    """How Go's JSON decoder calls a value."""
    if isinstance(value, bool):
        return "bool"
    return {dict: "object", list: "array", str: "string"}.get(type(value), "number")


# ---------------------------------------------------------------------------------------------------------------------------
# Field managers
# ---------------------------------------------------------------------------------------------------------------------------
ATOMIC = ("involvedObject", "regarding", "related")           # objects that have one owner as a whole


def leaves(value, path=(), name=""):
    """{path: value} of all that can be owned; a path is made of "f:key", 'k:{"type":"Ready"}', 'v:"10.0.0.0/8"', and "." for a container
    itself. Without what the server owns."""
    if isinstance(value, dict) and name not in ATOMIC:
        children = [(f"f:{key}", child, f"{name}.{key}".lstrip(".")) for key, child in value.items() if is_ownable(path, key)]
    elif isinstance(value, list) and name in MERGE_KEYS:
        key = MERGE_KEYS[name]
        children = [("k:" + compact({key: row.get(key)}).decode(), row, f"{name}[]") for row in value]
    elif isinstance(value, list) and name in MERGED_SETS:
        children = [("v:" + compact(item).decode(), item, "") for item in value]
    else:
        return {path: value}
    found = {(*path, "."): True} if path else {}
    for part, child, child_name in children:
        found.update(leaves(child, (*path, part), child_name))
    return found


def is_ownable(path, key):
    """Whether a field counts: not what identifies the object, and not what the server sets."""
    if path == ("f:metadata",):
        return key not in (*SERVER_OWNED, "name", "namespace")
    return bool(path) or key not in ("kind", "apiVersion")


def fields_of(paths):
    """FieldsV1 of a set of paths."""
    tree, containers = {}, []
    for path in sorted(paths):
        at = tree
        for part in path:
            at = at.setdefault(part, {})
            if part == "." and path[-1] == part:
                containers.append(path[:-1])
    for path in containers:                          # of a container whose members are others' alone, "." goes without saying
        at = tree
        for part in path:
            at = at[part]
        if list(at) == ["."]:
            del at["."]
    return tree


def paths_of(fields, path=()):
    """The set of paths of a FieldsV1."""
    found = set()
    for key, child in fields.items():
        found |= paths_of(child, (*path, key)) or {(*path, key)}
    return found


def managed_fields(resource, old, new, manager, subresource, now):
    """metadata.managedFields after an update by `manager`: what it changed is its own now, what is gone is nobody's. Of a new object (old
    is None) it owns what differs from an empty one. An object that has no managers never gets any."""
    if old and not old["metadata"].get("managedFields"):
        return []
    before, after = leaves(old or prepared(resource, {})), leaves(new)
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    entries, mine = [], None
    for entry in (old or {}).get("metadata", {}).get("managedFields", []):
        paths = {path if path in after else (*path, ".") for path in paths_of(entry["fieldsV1"])}
        is_mine = (entry["manager"], entry["operation"], entry.get("subresource", "")) == (manager, "Update", subresource)
        kept = {path for path in paths if path in after and path not in changed}
        if is_mine:
            mine, kept = entry, kept | changed
        if kept:
            entries.append({**entry, **({"time": now} if is_mine and changed else {}), "fieldsV1": fields_of(kept)})
    if changed and mine is None:
        entries.append(manager_entry(new, manager, subresource, now, changed))
    return entries


def manager_entry(obj, manager, subresource, when, paths):
    entry = {"manager": manager, "operation": "Update", "apiVersion": obj.get("apiVersion", "v1"), "time": when, "fieldsType": "FieldsV1",
             "fieldsV1": fields_of(paths)}
    return {**entry, "subresource": subresource} if subresource else entry


# ---------------------------------------------------------------------------------------------------------------------------
# Realistic nodes
# ---------------------------------------------------------------------------------------------------------------------------
IMAGES = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "etcd", "coredns", "pause", "metrics-server")


def node_addresses(index):
    """(InternalIP of IPv4, of IPv6, pod CIDR of IPv4, of IPv6) of node number index, 0 to 65,000."""
    high, low = divmod(index, 250)
    return f"172.16.{high}.{low + 1}", f"fd00:16::{index + 1:x}", f"10.{index // 256}.{index % 256}.0/24", f"fd00:10:{index:x}::/64"


def realistic_node(name, index=0, pod_cidrs=True):
    """A Node of about 13 KB as kubelet and the controller manager leave it in a cluster: images, conditions, labels, managedFields.

    Its addresses and pod CIDRs follow from index. Without kind and apiVersion it is an item of a list. No two calls share a value.
    """
    ipv4, ipv6, cidr4, cidr6 = node_addresses(index)
    created = f"2024-05-{index % 28 + 1:02d}T08:00:00Z"
    node = {
        "kind": "Node", "apiVersion": "v1",
        "metadata": {
            "name": name, "uid": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.{index}")), "creationTimestamp": created,
            "labels": realistic_labels(name, index),
            "annotations": {
                "alpha.kubernetes.io/provided-node-ip": f"{ipv4},{ipv6}",
                "csi.volume.kubernetes.io/nodeid": compact({"csi.example.com": f"i-{index:017x}"}).decode(),
                "kubeadm.alpha.kubernetes.io/cri-socket": "unix:///run/containerd/containerd.sock",
                "node.alpha.kubernetes.io/ttl": "0",
                "volumes.kubernetes.io/controller-managed-attach-detach": "true",
            },
        },
        "spec": {"podCIDR": cidr4, "podCIDRs": [cidr4, cidr6], "providerID": f"example:///zone-{index % 3}/i-{index:017x}"},
        "status": realistic_status(name, index, created, (ipv4, ipv6)),
    }
    if not pod_cidrs:
        del node["spec"]["podCIDR"], node["spec"]["podCIDRs"]
    return with_managers(node, created)


def realistic_labels(name, index):
    zone = f"zone-{index % 3}"
    return {
        "beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/instance-type": "m5.2xlarge", "beta.kubernetes.io/os": "linux",
        "failure-domain.beta.kubernetes.io/region": "region-1", "failure-domain.beta.kubernetes.io/zone": zone,
        "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
        "node.kubernetes.io/instance-type": "m5.2xlarge", "topology.kubernetes.io/region": "region-1",
        "topology.kubernetes.io/zone": zone, "example.com/pool": f"pool-{index % 7}", "example.com/team": "platform",
    }


def condition(kind, status, reason, message, when):
    return {"type": kind, "status": status, "lastHeartbeatTime": when, "lastTransitionTime": when, "reason": reason, "message": message}


def realistic_status(name, index, when, addresses):
    resources = {"cpu": "8", "ephemeral-storage": "101430960Ki", "hugepages-1Gi": "0", "hugepages-2Mi": "0",
                 "memory": "32386544Ki", "pods": "110"}
    return {
        "capacity": resources, "allocatable": {**resources, "cpu": "7910m", "memory": "31339312Ki"},
        "conditions": [
            condition("NetworkUnavailable", "False", "RouteCreated", "The network of the node is configured", when),
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available", when),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure", when),
            condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available", when),
            condition("Ready", "True", "KubeletReady", "kubelet is posting ready status", when),
        ],
        "addresses": [*({"type": "InternalIP", "address": address} for address in addresses),
                      {"type": "Hostname", "address": name}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
        "nodeInfo": {"machineID": uuid.uuid5(uuid.NAMESPACE_OID, name).hex, "systemUUID": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
                     "bootID": str(uuid.uuid5(uuid.NAMESPACE_X500, name)), "kernelVersion": "6.1.0-21-amd64",
                     "osImage": "Debian GNU/Linux 12 (bookworm)", "containerRuntimeVersion": "containerd://1.7.16",
                     "kubeletVersion": "v1.30.1", "kubeProxyVersion": "v1.30.1", "operatingSystem": "linux", "architecture": "amd64"},
        "images": [realistic_image(number, index) for number in range(32)],
    }


def realistic_image(number, index):
    name = IMAGES[number] if number < len(IMAGES) else f"team-{number % 5}/service-{number}"
    digest = uuid.uuid5(uuid.NAMESPACE_URL, f"{name}{index % 9}").hex * 2
    return {"names": [f"registry.example.com/{name}@sha256:{digest}", f"registry.example.com/{name}:v1.{number}.{index % 9}"],
            "sizeBytes": 500_000_000 - number * 13_000_003}


def with_managers(node, when):
    """The node with the managedFields that kubelet, kubeadm and the controller manager leave."""
    owners, empty = {}, leaves(prepared("nodes", {}))
    for path, value in leaves(node).items():
        if path in empty and empty[path] == value:
            continue
        text = "".join(path)
        if path[0] == "f:status":
            # Kubelet's merge keys etc.; images, capacity and the like belong to it too, through the subresource.
            owner = ("kube-controller-manager", "status") if "NetworkUnavailable" in text else ("kubelet", "status")
        elif path[0] == "f:spec":
            owner = ("kube-controller-manager", "") if "podCIDR" in text else ("kubelet", "")
        else:
            owner = ("kube-controller-manager", "") if "alpha.kubernetes.io/ttl" in text else ("kubelet", "")
        owners.setdefault(owner, set()).add(path)
    entries = [manager_entry(node, manager, subresource, when, paths) for (manager, subresource), paths in owners.items()]
    return {**node, "metadata": {**node["metadata"], "managedFields": entries}}
