"""A stand-in for the W&B server on loopback: it keeps what arrives, and can be told to refuse, fail, hang or die.

Beside it, a reader of the files that wandb keeps on disk.

It speaks as much of W&B's protocol (GraphQL, file stream, file uploads; as wandb 0.31 uses it) as one run with media,
tables and artifacts needs, and saved workspaces and reports. What it does not know is kept in ``unknown``, so that a test notices a changed protocol.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

Mode = Literal["ok", "401", "403", "500", "hang", "hang files"]

_ENTITY = {"id": "e1", "name": "lab"}
_FIELDS_KEPT = ("displayName", "groupName", "jobType", "project", "tags")


@dataclass
class StoredRun:
    """One run as the server knows it."""

    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """displayName, groupName, jobType, project, tags."""
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    """Artifact name -> names of the files in it."""
    starts: int = 0
    """Processes that reported to this run."""


class WandbServer:
    """The server in a thread of its own; a context manager that leaves no thread and no open connection behind."""

    def __init__(self, mode: Mode = "ok") -> None:
        self.mode: Mode = mode
        self.runs: dict[str, StoredRun] = {}
        self.projects: set[str] = {"eit_lab"}
        self.views: dict[str, dict[str, Any]] = {}
        """Id -> a saved workspace (type project-view) or report (type runs): name, displayName, projectName, spec, ..."""
        self.requests: Counter[str] = Counter()
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        self.released = threading.Event()
        """Ends the requests that hang."""
        self.artifact_of: dict[str, tuple[str, str]] = {}
        """Artifact id -> (run, artifact name)."""
        self._connections: set[socket.socket] = set()
        self._http = _Http(self)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    @property
    def url(self) -> str:
        """Base URL, for WANDB_BASE_URL."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def run(self, run_id: str) -> StoredRun:
        """The run of an id, made at its first mention."""
        return self.runs.setdefault(run_id, StoredRun())

    def die(self) -> None:
        """Close the port and every open connection, as a machine that goes away; a second call does nothing."""
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._connections):
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()


class _RefusedError(Exception):
    """What a query asks for is not there."""


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, owner: WandbServer) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.owner._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.owner._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients that give up are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def log_message(self, *args: Any) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        owner, body = self.server.owner, self._body()
        mode, path = owner.mode, self.path.split("?")[0]
        is_file = self.command == "PUT" or path.endswith("/file_stream")
        if mode == "hang" or (mode == "hang files" and is_file):
            owner.requests["hang"] += 1
            owner.released.wait()
            self.close_connection = True
            return
        if mode in ("401", "403", "500"):
            owner.requests[mode] += 1
            self._send(
                {"errors": [{"message": {"401": "not logged in", "403": "no access", "500": "out of order"}[mode]}]},
                int(mode),
            )
            return
        with owner.lock:
            if self.command == "GET" and path == "/":
                reply = {}
            elif self.command == "PUT":
                owner.requests["PUT"] += 1
                reply = self._keep_file(path, body)
            elif path == "/graphql":
                query = json.loads(body)
                try:
                    reply = {"data": _graphql(owner, query["query"], query.get("variables") or {})}
                except _RefusedError as error:
                    reply = {"data": None, "errors": [{"message": str(error)}]}
            elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
                owner.requests["file_stream"] += 1
                reply = _file_stream(owner.run(found[1]), json.loads(body))
            else:
                owner.unknown.append(f"{self.command} {path}")
                reply = {}
        self._send(reply)

    def _keep_file(self, path: str, body: bytes) -> dict[str, Any]:
        owner = self.server.owner
        _, kind, name, file = path.split("/", 3)
        if kind == "upload":
            owner.run(name).files[file] = body
        else:
            run, artifact = owner.artifact_of[name]
            owner.run(run).artifacts.setdefault(artifact, []).append(file)
        return {}

    def _send(self, reply: Any, status: int = 200) -> None:
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body


def _file_stream(run: StoredRun, sent: dict[str, Any]) -> dict[str, Any]:
    for name, chunk in (sent.get("files") or {}).items():
        if name == "wandb-history.jsonl":
            # Lines have places, so that a part that is sent twice, or by a run that resumes, is not there twice.
            rows = [json.loads(line) for line in chunk["content"]]
            run.history[chunk["offset"] : chunk["offset"] + len(rows)] = rows
        elif name == "wandb-summary.json" and chunk["content"]:
            run.summary = json.loads(chunk["content"][-1])
    if sent.get("complete"):
        run.exit_code = sent.get("exitcode")
    return {"exitcode": None, "limits": {}}


def _graphql(owner: WandbServer, text: str, given: dict[str, Any]) -> dict[str, Any]:
    found = re.search(r"(?:query|mutation)\s+(\w+)", text)
    operation = found[1] if found else text[:80]
    owner.requests[operation] += 1
    put = given.get("input", given)
    match operation:
        case "Viewer":
            who = {"id": "u1", "entity": "lab", "username": "lab", "email": "lab@example.org", "flags": "{}"}
            return {"viewer": {**who, "teams": {"edges": []}}}
        case "GetDefaultEntity":
            return {"viewer": {"id": "u1", "entity": "lab"}}
        case "GetProjects":
            edges = [{"node": _project(name)} for name in sorted(owner.projects)]
            return {"models": {"pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": edges}}
        case "ProjectInternalId":
            return {"project": {"internalId": "p1"} if given["projectName"] in owner.projects else None}
        case "upsertView" | "UpsertView2":
            return {"upsertView": _upsert_view(owner, given)}
        case "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        case "OrganizationCoreWeaveOrganizationID":
            return {"entity": {"organization": None}}
        case "RunResumeStatus":
            return {"model": {"id": "p1", "name": given["project"], "entity": _ENTITY, "bucket": _bucket(owner, given)}}
        case "UpsertBucket":
            return {"upsertBucket": _upsert(owner, given)}
        case "CreateRunFiles":
            files = [
                {"name": name, "uploadUrl": f"{owner.url}/upload/{given['run']}/{name}"} for name in given["files"]
            ]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        case "RunStoppedStatus":
            return {"project": {"run": {"stopped": False}}}
        case "ArtifactType":
            return {"project": {"artifact": None}}
        case "XXHashDigestsEnabled":
            return {"entity": {"xxhashDigestsEnabled": False}}
        case "CreateArtifact":
            artifact_id = f"a{len(owner.artifact_of)}"
            owner.artifact_of[artifact_id] = (put["runName"], put["artifactCollectionName"])
            sequence = {"latestArtifact": None}
            return {
                "createArtifact": {"artifact": {"id": artifact_id, "state": "PENDING", "artifactSequence": sequence}}
            }
        case "CreateArtifactManifest" | "UpdateArtifactManifest":
            artifact_id = given.get("artifactID") or given["artifactManifestID"].removeprefix("m")
            file = {
                "id": "f1",
                "uploadUrl": f"{owner.url}/artifact/{artifact_id}/wandb_manifest.json",
                "uploadHeaders": [],
            }
            key = operation[0].lower() + operation[1:]
            return {key: {"artifactManifest": {"id": f"m{artifact_id}", "file": file}}}
        case "CreateArtifactFiles":
            return {
                "createArtifactFiles": {
                    "files": {"edges": [_artifact_file(owner, spec) for spec in put["artifactFiles"]]}
                }
            }
        case "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "0"}}}
        case _:
            owner.unknown.append(operation)
            return {}


def _project(name: str) -> dict[str, Any]:
    facts = {"id": "p1", "entityName": "lab", "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
    return {"__typename": "Project", "name": name, **facts}


def _upsert_view(owner: WandbServer, given: dict[str, Any]) -> dict[str, Any]:
    inserted = not given.get("id")
    view_id = given.get("id") or f"Vmlldzo{len(owner.views) + 1}"
    if not inserted and view_id not in owner.views:
        raise _RefusedError(f"view {view_id} not found")
    owner.views[view_id] = {**given, "spec": json.loads(given["spec"])}
    times = {"createdAt": "2026-01-01T00:00:00Z", "updatedAt": "2026-01-01T00:00:00Z"}
    facts = {key: given.get(key) for key in ("type", "name", "displayName", "description", "spec")}
    project = {"id": "p1", "name": given["projectName"], "entityName": given["entityName"]}
    return {"view": {"id": view_id, "project": project, **facts, **times}, "inserted": inserted}


def _upsert(owner: WandbServer, given: dict[str, Any]) -> dict[str, Any]:
    run_id = given.get("name") or given["id"].removeprefix("b-")
    inserted = run_id not in owner.runs
    run = owner.run(run_id)
    if given.get("config"):
        # W&B wraps each top-level value, and adds what it knows about the process under _wandb.
        run.config = {key: item["value"] for key, item in json.loads(given["config"]).items() if key != "_wandb"}
    run.facts |= {key: given[key] for key in _FIELDS_KEPT if given.get(key)}
    run.starts += 1
    project = {"id": "p1", "name": given.get("project") or "eit_lab", "entity": _ENTITY}
    bucket = _bucket(owner, {"name": run_id}) or {}
    return {"bucket": {**bucket, "description": None, "sweepName": None, "project": project}, "inserted": inserted}


def _bucket(owner: WandbServer, given: dict[str, Any]) -> dict[str, Any] | None:
    """What a client that resumes is told about a run."""
    if given["name"] not in owner.runs:
        return None
    run, name = owner.run(given["name"]), given["name"]
    return {
        "id": f"b-{name}",
        "name": name,
        "displayName": run.facts.get("displayName", name),
        "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
        "summaryMetrics": json.dumps(run.summary),
        "logLineCount": 0,
        "historyLineCount": len(run.history),
        "eventsLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "eventsTail": "[]",
        "tags": run.facts.get("tags", []),
        "notes": None,
        "wandbConfig": json.dumps({"t": {"value": {}}}),
    }


def _artifact_file(owner: WandbServer, spec: dict[str, Any]) -> dict[str, Any]:
    artifact_id, name = spec["artifactID"], spec["name"]
    return {
        "node": {
            "storagePath": f"{artifact_id}/{name}",
            "uploadUrl": f"{owner.url}/artifact/{artifact_id}/{name}",
            "uploadHeaders": [],
            "uploadMultipartUrls": None,
            "artifact": {"id": artifact_id},
        }
    }


def rows_on_disk(folder: Path, run_id: str) -> list[dict[str, str]]:
    """The history rows of every part of a run, read from wandb's files: LevelDB's log format around protobuf records.

    A row is {key: value as JSON}.
    """
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(folder.glob(f"wandb/*run-*/run-{run_id}.wandb")):
        content, place, record = path.read_bytes(), 7, b""
        while place + 7 <= len(content):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            _, size, kind = struct.unpack("<IHB", content[place : place + 7])
            record += content[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):  # a whole record, or the last piece of one
                parsed = wandb_internal_pb2.Record()
                parsed.ParseFromString(record)
                record = b""
                if parsed.WhichOneof("record_type") == "history":
                    rows.append({item.key or item.nested_key[0]: item.value_json for item in parsed.history.item})
    return rows
