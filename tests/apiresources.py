"""The resources of the API server double: its store, what a request asks for, and the answers. No network here: see tests/apiserver.py."""
import base64
import bisect
import copy
import fnmatch
import json
import secrets
import threading
import time
import urllib.parse
import uuid

from tests import apiobjects as objects
from tests.apiobjects import ApiError, compact, realistic_node

VERSION = {"major": "1", "minor": "30", "gitVersion": "v1.30.1", "gitCommit": "0" * 40, "gitTreeState": "clean",
           "buildDate": "2024-05-14T10:42:02Z", "goVersion": "go1.22.2", "compiler": "gc", "platform": "linux/amd64"}
NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")
GROUPS = ("/api/v1/", "/apis/coordination.k8s.io/v1/", "/apis/events.k8s.io/v1/")
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
KEPT = ("resourceVersion", "creationTimestamp", "generation", "managedFields", "deletionTimestamp", "deletionGracePeriodSeconds")
WRITES = tuple(VERBS.values())
HISTORY = 5_000                                      # changes kept for watches and for the pages of a list


def timestamp():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ---------------------------------------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------------------------------------
class Entry:
    """A stored object, encoded once: .item (no kind, no apiVersion), as in lists."""

    __slots__ = ("resource", "namespace", "name", "version", "item", "_partial")

    def __init__(self, resource, obj, version):
        meta = obj["metadata"]
        self.resource, self.namespace, self.name, self.version = resource, meta.get("namespace", ""), meta["name"], version
        meta = {**meta, "resourceVersion": str(version)}
        self.item = compact({key: value for key, value in {**obj, "metadata": meta}.items() if key not in ("kind", "apiVersion")})
        self._partial = None

    @property
    def key(self):
        return (self.namespace, self.name)

    def object(self):
        """A new dict, kind and apiVersion first."""
        return {**objects.kind_of(self.resource), **json.loads(self.item)}

    def encoded(self, partial=False):
        """The object alone, as the answer to a GET or in an event; partial: its metadata only."""
        if not partial:
            return compact(objects.kind_of(self.resource))[:-1] + b"," + self.item[1:]
        if self._partial is None:
            self._partial = compact(objects.partial(json.loads(self.item)))
        return self._partial

    def listed(self, partial):
        return self.encoded(True) if partial else self.item


class Change:
    """One step of the history: type ADDED, MODIFIED or DELETED; entry as it is (for DELETED: was) with the version of the step."""

    __slots__ = ("version", "type", "entry", "before")

    def __init__(self, version, kind, entry, before):
        self.version, self.type, self.entry, self.before = version, kind, entry, before


class Store:
    """All objects, one version counter, and the history since `oldest`. Use it under its lock."""

    def __init__(self):
        self.lock = threading.RLock()
        self.entries = {}                            # resource -> {(namespace, name): Entry}
        self.version, self.changes = 1, 0
        self.oldest, self.trimmed = 1, 0             # what came before is refused; is no longer known
        self.history, self.versions = [], []         # changes, and their versions for bisect
        self.on_change = lambda: None

    def get(self, resource, namespace, name):
        return self.entries.get(resource, {}).get((namespace, name))

    def put(self, resource, obj):
        """Store an object under a new version. Returns its Entry."""
        self.version += 1
        entry = Entry(resource, obj, self.version)
        before = self.get(resource, *entry.key)
        self.entries.setdefault(resource, {})[entry.key] = entry
        self._note("MODIFIED" if before else "ADDED", entry, before)
        return entry

    def delete(self, entry):
        self.version += 1
        del self.entries[entry.resource][entry.key]
        last = Entry(entry.resource, entry.object(), self.version)
        self._note("DELETED", last, entry)
        return last

    def _note(self, kind, entry, before):
        self.changes += 1
        self.history.append(Change(self.version, kind, entry, before))
        self.versions.append(self.version)
        if len(self.history) > 2 * HISTORY:
            del self.history[:HISTORY], self.versions[:HISTORY]
            self.trimmed = self.versions[0] - 1
            self.oldest = max(self.oldest, self.trimmed)
        self.on_change()

    def since(self, version):
        """The changes after a version, oldest first."""
        return self.history[bisect.bisect_right(self.versions, version):]

    def state_at(self, resource, version):
        """{key: Entry} as it was at a version that is not older than `oldest`."""
        state = dict(self.entries.get(resource, {}))
        for change in reversed(self.since(version)):
            if change.entry.resource != resource:
                continue
            if change.before:
                state[change.entry.key] = change.before
            else:
                state.pop(change.entry.key, None)
        return state


# ---------------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------------
class Request:
    """One request: method, path, query {name: value}, headers, body; what it asks for: verb, resource ("" for other paths),
    subresource, namespace, name; who asks: user {"username", "groups", "extra"}."""

    def __init__(self, method, target, headers, body):
        self.method, self.headers, self.body, self.user = method, headers, body, ANONYMOUS
        self.path, _, query = target.partition("?")
        self.query = {name: values[-1] for name, values in urllib.parse.parse_qs(query, keep_blank_values=True).items()}
        self.resource, self.namespace, self.name, self.subresource = parse_path(self.path)
        self.verb = VERBS.get(method, method.lower())
        if method == "GET" and self.resource and not self.name:
            self.verb = "watch" if self.query.get("watch", "") in ("1", "true", "True", "t") else "list"
        self.selector = parse_field_selector(self.query.get("fieldSelector", ""))

    @property
    def target(self):
        """"nodes", "nodes/status", or the path."""
        return "/".join(filter(None, (self.resource.rpartition("/")[2], self.subresource))) if self.resource else self.path

    @property
    def object_name(self):
        """The one name this is about, also where a field selector gives it; "" for many."""
        return self.name or (self.selector or {}).get("metadata.name", "")

    @property
    def dry_run(self):
        return "dryRun" in self.query

    @property
    def manager(self):
        """The field manager of a write: the parameter, else the beginning of the user agent."""
        return (self.query.get("fieldManager") or self.headers.get("User-Agent", "").partition("/")[0] or "unknown")[:128]


ANONYMOUS = {"username": "system:anonymous", "groups": ["system:unauthenticated"], "extra": {}}


def parse_path(path):
    """(resource, namespace, name, subresource) of a path of the API, ("", "", "", "") of another one."""
    parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
    for resource, row in objects.RESOURCES.items():
        prefix = ["apis", row["group"], row["version"]] if row["group"] else ["api", row["version"]]
        if parts[:len(prefix)] != prefix:
            continue
        rest, namespace = parts[len(prefix):], ""
        if rest[:1] == ["namespaces"] and len(rest) > 2 and row["namespaced"]:
            namespace, rest = rest[1], rest[2:]
        if rest[:1] == [resource.rpartition("/")[2]] and len(rest) <= 3:
            name, subresource = (rest + ["", ""])[1:3]
            if not subresource or row.get(subresource):
                return resource, namespace, name, subresource
    return "", "", "", ""


def parse_field_selector(text):
    """{field: value}, or None for one that the double does not know."""
    found = {}
    for term in filter(None, text.split(",")):
        field, _, value = term.partition("=")
        if field not in ("metadata.name", "metadata.namespace") or term.count("=") > 2:
            return None
        found[field] = value.lstrip("=")
    return found


def parse_accept(header):
    """("", "PartialObjectMetadata" or "PartialObjectMetadataList") of an Accept header: the first clause that can be had. ApiError 406."""
    for clause in header.split(","):
        media, *parameters = [part.strip() for part in clause.split(";")]
        given = dict(part.split("=", 1) for part in parameters if "=" in part)
        if media not in ("application/json", "*/*", "application/*", ""):
            continue
        if "as" not in given:
            return ""
        known = given["as"] in ("PartialObjectMetadata", "PartialObjectMetadataList")
        if known and (given.get("g"), given.get("v")) == ("meta.k8s.io", "v1"):
            return given["as"]
    raise ApiError(406, "NotAcceptable", "406: Not Acceptable\n\nAvailable representations: application/json, application/yaml, "
                                         "application/vnd.kubernetes.protobuf", {})


def presented(resource, entry, partial):
    """The bytes of one object as this resource shows it."""
    if resource != entry.resource and not partial:
        return compact(objects.from_stored(resource, entry.object()))
    return entry.encoded(partial)


def selected(selector, entry):
    """Whether a field selector lets an entry through."""
    found = {"metadata.name": entry.name, "metadata.namespace": entry.namespace}
    return all(found[field] == value for field, value in selector.items())


# ---------------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------------
class Resources:
    """Answers requests for objects: rights, admission, reading, writing. ApiServer puts it behind HTTP."""

    def __init__(self):
        self.store, self.rbac, self.policies = Store(), None, []

    # ---- objects, behind the API's back -------------------------------------------------------------------------------

    @property
    def resource_version(self):
        return str(self.store.version)

    def bump(self):
        """Use up a resourceVersion, as a change of some other resource does."""
        with self.store.lock:
            self.store.version += 1

    def put(self, resource, obj):
        """Store an object as it is, new or not. Returns it as stored."""
        obj = objects.prepared(resource, obj)
        if resource == "nodes" and "managedFields" not in obj["metadata"]:
            obj = objects.with_managers(obj, timestamp())
        meta = {"uid": str(uuid.uuid4()), "creationTimestamp": timestamp(), **obj["metadata"]}
        with self.store.lock:
            return self.store.put(resource, {**obj, "metadata": meta}).object()

    def get(self, resource, name, namespace=""):
        """An object, None when there is none."""
        entry = self.store.get(resource, namespace, name)
        return entry and entry.object()

    def create_node(self, node, pod_cidrs=(), annotations=None, addresses=()):
        """A node, whole or by its name and these."""
        if isinstance(node, str):
            rows = [{"type": "InternalIP", "address": address} for address in addresses]
            node = {"metadata": {"name": node, "annotations": annotations or {}, "labels": {"kubernetes.io/hostname": node}},
                    "spec": {"podCIDRs": list(pod_cidrs), **({"podCIDR": pod_cidrs[0]} if pod_cidrs else {})},
                    "status": {"addresses": [*rows, {"type": "Hostname", "address": node}], "conditions": []}}
        return self.put("nodes", node)

    def create_nodes(self, count, prefix="node-"):
        """realistic_node(prefix + index, index) for index below count."""
        for index in range(count):
            self.put("nodes", realistic_node(f"{prefix}{index}", index))

    def node(self, name):
        return self.get("nodes", name)

    def nodes(self):
        with self.store.lock:
            return [entry.object() for entry in self.store.entries.get("nodes", {}).values()]

    def patch_node(self, name, patch):
        """Merge a patch (status and spec as well) into a node."""
        with self.store.lock:
            return self.put("nodes", objects.merge_patch(self.node(name), patch))

    def delete_node(self, name):
        with self.store.lock:
            return self.store.delete(self.store.get("nodes", "", name)).object()

    def compact(self):
        """410 for every resourceVersion before the present one."""
        with self.store.lock:
            self.store.oldest = self.store.version

    # ---- rights and policies -------------------------------------------------------------------------------------------------

    def _authorize(self, request, verb=""):
        """ApiError 403 where no rule lets the user do this (or another verb)."""
        user, verb, name = request.user, verb or request.verb, request.object_name
        if user is ANONYMOUS or not (self.rbac is None or any(rule_allows(rule, request, verb, name) for rule in self.rbac)):
            raise objects.forbidden(user["username"], verb, request.resource, request.subresource, request.namespace, name)

    def add_policy(self, hook, name="policy", binding="binding", resources=("nodes", "nodes/status"), code=422):
        """A ValidatingAdmissionPolicy as a function, see the top of this file."""
        self.policies.append({"hook": hook, "name": name, "binding": binding, "resources": resources, "code": code})

    def _admit(self, request, operation, old, new):
        for policy in list(self.policies):
            if request.target not in policy["resources"]:
                continue
            why = policy["hook"](request.user, operation, old, new)
            if why:
                name = (new or old)["metadata"]["name"]
                raise objects.denied(request.resource, name, policy["name"], policy["binding"], why, policy["code"])

    # ---- reading -------------------------------------------------------------------------------------------------------------

    def _handle(self, request):
        """(code, body, headers) of everything but a watch. ApiError."""
        if not request.resource:
            return self._other_path(request)
        self._check(request)
        handler = {"get": self._get, "list": self._list, "create": self._create, "update": self._update, "patch": self._patch,
                   "delete": self._delete}.get(request.verb)
        if handler is None or (request.verb != "list" and not request.name) == (request.verb != "create"):
            raise ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        return handler(request)

    def _other_path(self, request):
        if request.path in ("/healthz", "/livez", "/readyz"):
            return 200, b"ok", {"Content-Type": "text/plain; charset=utf-8"}
        if request.path in ("/version", "/version/"):
            return 200, json.dumps(VERSION, indent=2).encode(), {}
        if request.user is ANONYMOUS:
            raise objects.forbidden_path(request.user["username"], request.method.lower(), request.path)
        if request.path.startswith(GROUPS):
            raise objects.no_such_resource()
        return 404, b"404 page not found\n", {"Content-Type": "text/plain; charset=utf-8"}

    def _check(self, request):
        """ApiError where a request for objects has no right, or asks for what is not there."""
        self._authorize(request)
        if request.selector is None:
            raise objects.bad_request(f"field label not supported: {request.query['fieldSelector'].partition('=')[0]}")
        if "labelSelector" in request.query:
            raise objects.bad_request("this double of an API server knows no label selectors")
        if request.query.get("dryRun", "All") != "All":
            kind = {"create": "CreateOptions", "delete": "DeleteOptions", "patch": "PatchOptions"}.get(request.verb, "UpdateOptions")
            raise objects.invalid_options(kind, "dryRun", "FieldValueNotSupported",
                                          f"Unsupported value: {objects.go_strings([request.query['dryRun']])}: supported values: "
                                          '"All"')

    def _shown(self, request, obj):
        """The body of an answer with one object."""
        kind = parse_accept(request.headers.get("Accept", ""))
        if kind == "PartialObjectMetadataList":
            raise ApiError(406, "NotAcceptable", "you requested PartialObjectMetadataList, but the requested object is not a list "
                                                 f"(*core.{objects.RESOURCES[request.resource]['kind']})")
        return compact(objects.partial(obj) if kind else objects.from_stored(request.resource, obj))

    def _find(self, request):
        """The Entry a request is about. ApiError 404."""
        entry = self.store.get(objects.stored(request.resource), request.namespace, request.name)
        if entry is None:
            raise objects.not_found(request.resource, request.name)
        return entry

    def _get(self, request):
        return 200, self._shown(request, self._find(request).object()), {}

    def _list(self, request):
        partial = parse_accept(request.headers.get("Accept", ""))
        if partial == "PartialObjectMetadata":
            raise ApiError(406, "NotAcceptable", "you requested PartialObjectMetadata, but the requested object is a list "
                                                 f"(*core.{objects.RESOURCES[request.resource]['kind']}List)")
        kind = {"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1"} if partial else objects.kind_of(request.resource)
        if not partial:
            kind["kind"] += "List"
        entries, meta = self._page(request)
        if partial or request.resource == objects.stored(request.resource):
            items = b",".join(entry.listed(bool(partial)) for entry in entries)
        else:
            items = b",".join(presented(request.resource, entry, False) for entry in entries)
        return 200, compact({**kind, "metadata": meta})[:-1] + b',"items":[' + items + b"]}", {}

    def _page(self, request):
        """(entries, metadata of the list) of one page."""
        query = request.query
        limit, token = int(query.get("limit") or 0), query.get("continue", "")
        version, match = parse_version(query, "resourceVersion"), query.get("resourceVersionMatch", "")
        check_list_options(version, match, token)
        with self.store.lock:
            now, at, start = self.store.version, self.store.version, None
            if token:
                at, start = self._continued(token)
            elif version and (match == "Exact" or (limit and not match)):
                at = version
            if version and version > now:
                raise objects.too_large(version, now)
            if at < self.store.oldest and at != now:
                raise objects.gone("The resourceVersion for the provided list is too old.")
            state = self.store.state_at(objects.stored(request.resource), at)
        if version == 0 and not token:
            limit = 0                                # the watch cache answers, and gives all it has
        keys = [key for key in sorted(state) if (start is None or key >= start) and request.namespace in ("", key[0])
                and selected(request.selector, state[key])]
        meta = {"resourceVersion": str(at)}
        if limit and len(keys) > limit:
            meta["continue"] = make_continue(at, keys[limit])
            if not request.selector:
                meta["remainingItemCount"] = len(keys) - limit
            keys = keys[:limit]
        return [state[key] for key in keys], meta

    def _continued(self, token):
        """(version, first key) of a continue token. ApiError 410 with a token that goes on at the present version."""
        try:
            row = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
            version, start = row["rv"], tuple(row["start"])
        except (ValueError, KeyError, TypeError):
            raise objects.bad_request(f"invalid continue token: continue key is not valid: {token}") from None
        if version == -1:
            return self.store.version, start
        if version < self.store.oldest:
            error = objects.gone(
                "The provided continue parameter is too old to display a consistent list result. You can start a new list without the "
                "continue parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with "
                "the provided token results in an inconsistent list - objects that were created, modified, or deleted between the time the "
                "first chunk was returned and now may show up in the list.")
            error.status["metadata"] = {"continue": make_continue(-1, start)}
            raise error
        return version, start

    # ---- writing ------------------------------------------------------------------------------------------------------

    def _body(self, request):
        """The object in the body of a POST or PUT, as it would be stored. ApiError 400."""
        kind = objects.kind_of(request.resource)
        try:
            obj = json.loads(request.body)
        except ValueError as error:
            raise objects.bad_request(f"couldn't get version/kind; json parse error: {error}") from None
        given = {key: obj.get(key, kind[key]) for key in kind} if isinstance(obj, dict) else {}
        if given != kind:
            wrong = f"{given.get('kind')} in version \"{given.get('apiVersion', '').rpartition('/')[2]}\""
            raise objects.bad_request(f"{wrong} cannot be handled as a {kind['kind']}: unknown conversion")
        try:
            obj, unknown = objects.decoded(request.resource, obj)
            self._refuse_unknown(request, unknown)
        except ValueError as error:
            raise objects.bad_request(f'{kind["kind"]} in version "v1" cannot be handled as a {kind["kind"]}: {error}') from None
        return objects.prepared(objects.stored(request.resource), objects.to_stored(request.resource, obj))

    def _refuse_unknown(self, request, unknown):
        """Unknown fields were dropped; with fieldValidation=Strict that is an error (ValueError)."""
        if unknown and request.query.get("fieldValidation") == "Strict":
            raise ValueError("strict decoding error: " + ", ".join(f'unknown field "{field}"' for field in unknown))

    def _create(self, request):
        new = self._body(request)
        meta = dict(new["metadata"])
        if "generateName" in meta and "name" not in meta:
            meta["name"] = meta["generateName"] + secrets.token_hex(3)[:5]
        if objects.RESOURCES[request.resource]["namespaced"]:
            self._match_path(request, {**meta, "name": request.name})
            meta["namespace"] = request.namespace
            if request.namespace not in NAMESPACES:
                raise ApiError(404, "NotFound", f'namespaces "{request.namespace}" not found',
                               {"name": request.namespace, "kind": "namespaces"})
        if "resourceVersion" in meta:
            raise objects.internal("resourceVersion should not be set on objects to be created")
        for key in ("managedFields", "selfLink"):
            meta.pop(key, None)
        new["metadata"] = {**meta, "uid": str(uuid.uuid4()), "creationTimestamp": timestamp()}
        return 201, self._shown(request, self._store_new(request, new)), {}

    def _match_path(self, request, meta):
        """Fill in name and namespace from the path. ApiError 400 where they differ."""
        if meta.setdefault("name", request.name) != request.name:
            raise objects.bad_request(f"the name of the object ({meta['name']}) does not match the name on the URL ({request.name})")
        if request.namespace and meta.setdefault("namespace", request.namespace) != request.namespace:
            raise objects.bad_request("the namespace of the provided object does not match the namespace sent on the request")

    def _store_new(self, request, new):
        resource, meta = objects.stored(request.resource), new["metadata"]
        causes = objects.name_causes(request.resource, new) or objects.CAUSES[request.resource](new)
        if causes:
            raise objects.invalid(request.resource, meta.get("name", ""), causes)
        with self.store.lock:
            self._admit(request, "CREATE", None, new)
            if self.store.get(resource, meta.get("namespace", ""), meta["name"]):
                raise objects.already_exists(request.resource, meta["name"])
            managed = objects.managed_fields(resource, None, new, request.manager, "", timestamp())
            if managed:
                new["metadata"]["managedFields"] = managed
            if resource == "nodes":                  # the admission plugin TaintNodesByCondition adds it, in nobody's name
                taint = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}
                taints = new["spec"].get("taints", [])
                new["spec"] = {**new["spec"], "taints": taints if taint in taints else [*taints, taint]}
            return new if request.dry_run else self.store.put(resource, new).object()

    def _update(self, request):
        new = self._body(request)
        self._match_path(request, new["metadata"])
        row = objects.RESOURCES[request.resource]
        with self.store.lock:
            missing = self.store.get(objects.stored(request.resource), request.namespace, request.name) is None
            if missing and row.get("create_on_update") and not request.subresource:
                self._authorize(request, "create")
                return self._create(request)
            old = self._find(request).object()
            uid = new["metadata"].get("uid", old["metadata"]["uid"])
            if uid != old["metadata"]["uid"]:
                raise objects.conflict(request.resource, request.name, objects.storage_error(
                    request.resource, old["metadata"], f"Precondition failed: UID in precondition: {uid}, UID in object meta: "
                                                       f"{old['metadata']['uid']}"))
            if "resourceVersion" not in new["metadata"] and not row.get("unconditional"):
                raise objects.invalid(request.resource, request.name, kind=objects.plural(request.resource), causes=[
                    ("metadata.resourceVersion", "FieldValueInvalid", "Invalid value: 0x0: must be specified for an update")])
            return 200, self._shown(request, self._store_update(request, old, new)), {}

    def _patch(self, request):
        media = request.headers.get("Content-Type", "").partition(";")[0].strip()
        if media not in objects.PATCHES:
            raise ApiError(415, "UnsupportedMediaType", "415: Unsupported Media Type", {})
        try:
            patch = json.loads(request.body)
        except ValueError as error:
            raise objects.bad_request(f"error decoding patch: {error}") from None
        with self.store.lock:
            old = self._find(request).object()
            patched = objects.PATCHES[media](objects.from_stored(request.resource, old), patch)
            try:
                patched, unknown = objects.decoded(request.resource, patched)
                self._refuse_unknown(request, unknown)
            except ValueError as error:
                raise objects.bad_patch(f"Invalid value: {json.dumps(patched)}: {error}") from None
            new = objects.prepared(objects.stored(request.resource), objects.to_stored(request.resource, patched))
            self._match_path(request, new["metadata"])
            return 200, self._shown(request, self._store_update(request, old, new)), {}

    def _store_update(self, request, old, new):
        """The stored object after an update that passed every check. Nothing changed: nothing is written. ApiError."""
        resource, meta, before = objects.stored(request.resource), dict(new["metadata"]), old["metadata"]
        if meta.get("resourceVersion", before["resourceVersion"]) != before["resourceVersion"]:
            raise objects.conflict(request.resource, request.name)
        for key in KEPT:
            meta.pop(key, None)
            if key in before:
                meta[key] = before[key]
        meta.setdefault("uid", before["uid"])
        new = objects.kept_part(resource, request.subresource, {**new, "metadata": meta}, old)
        causes = [*objects.meta_causes(meta, before), *objects.CAUSES[request.resource](new, old)]
        if causes:
            raise objects.invalid(request.resource, request.name, causes)
        self._admit(request, "UPDATE", copy.deepcopy(old), copy.deepcopy(new))
        managed = objects.managed_fields(resource, old, new, request.manager, request.subresource, timestamp())
        if managed:
            meta["managedFields"] = managed
        if new == old or request.dry_run:
            return new
        if "deletionTimestamp" in meta and not meta.get("finalizers"):
            self.store.delete(self._find(request))   # the last to keep it has let go
            return new
        return self.store.put(resource, new).object()

    def _delete(self, request):
        options = json.loads(request.body) if request.body else {}
        with self.store.lock:
            entry = self._find(request)
            old = entry.object()
            check_preconditions(request, options.get("preconditions", {}), old["metadata"])
            self._admit(request, "DELETE", old, None)
            meta = old["metadata"]
            if meta.get("finalizers"):               # it stays until they have gone, marked
                marked = {"deletionTimestamp": timestamp(), "deletionGracePeriodSeconds": 0, **meta}
                if not request.dry_run and marked != meta:
                    old = self.store.put(entry.resource, {**old, "metadata": marked}).object()
                return 200, self._shown(request, old), {}
            if not request.dry_run and options.get("dryRun") != ["All"]:
                self.store.delete(entry)
        details = objects.details_of(request.resource, request.name, uid=old["metadata"]["uid"])
        return 200, compact({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}), {}


def rule_allows(rule, request, verb, name):
    """Whether one row of the rights lets this request through."""
    who, verbs, resource, *names = rule
    return (any(fnmatch.fnmatchcase(subject, who) for subject in (request.user["username"], *request.user["groups"]))
            and fnmatch.fnmatchcase(verb, verbs) and fnmatch.fnmatchcase(request.target, resource)
            and (not names or fnmatch.fnmatchcase(name, names[0])))


def parse_version(query, name):
    """A resourceVersion of a query as a number, None without one. ApiError 500, as the real one."""
    text = query.get(name, "")
    if text and not text.isdigit():
        raise objects.internal(f'resourceVersion: Invalid value: "{text}": strconv.ParseUint: parsing "{text}": invalid syntax')
    return int(text) if text else None


def check_list_options(version, match, token):
    """ApiError for a combination that makes no sense."""
    where, forbidden = "resourceVersionMatch", "FieldValueForbidden"
    if match and token:
        raise objects.invalid_options("ListOptions", where, forbidden,
                                      "Forbidden: resourceVersionMatch is forbidden when continue is provided")
    if token and version:
        raise objects.bad_request("specifying resource version is not allowed when using continue")
    if match and match not in ("Exact", "NotOlderThan"):
        raise objects.invalid_options("ListOptions", where, "FieldValueNotSupported",
                                      f'Unsupported value: "{match}": supported values: "Exact", "NotOlderThan", ""')
    if match and version is None:
        raise objects.invalid_options("ListOptions", where, forbidden,
                                      "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided")
    if match == "Exact" and version == 0:
        raise objects.invalid_options("ListOptions", where, forbidden,
                                      'Forbidden: resourceVersionMatch "exact" is forbidden for resourceVersion "0"')


def check_preconditions(request, wanted, meta):
    """ApiError 409 unless the object is the one that a DELETE means."""
    for key, text, became in (("uid", "UID", "deleted and then recreated"), ("resourceVersion", "ResourceVersion", "modified")):
        if wanted.get(key) not in (None, meta[key]):
            why = (f"the {text} in the precondition ({wanted[key]}) does not match the {text} in record ({meta[key]}). "
                   f"The object might have been {became}")
            raise objects.conflict(request.resource, request.name, why, by_kind=True)


def make_continue(version, key):
    row = {"v": "meta.k8s.io/v1", "rv": version, "start": list(key)}
    return base64.urlsafe_b64encode(compact(row)).decode().rstrip("=")
