"""A hub on loopback that implements what huggingface_hub needs to create repositories, push and load.

State is in memory. Every request is recorded; `refusals` makes chosen ones fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_FROM_BYTES = 100_000
"""Files of this size and more go by LFS, as on the real hub."""


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.commits}{sorted(self.files)}".encode()).hexdigest()


@dataclass
class Refusal:
    """A refusal of requests whose "METHOD path" matches, from the `after`-th on."""

    pattern: str
    status: int
    message: str
    after: int = 0
    seen: int = 0


class Hub:
    """The server. Use as a context manager; pass `endpoint` as HF_ENDPOINT."""

    def __init__(self, token: str):
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> content, of LFS
        self.requests: list[str] = []
        self.uploads: list[str] = []  # sha256 of the files that were uploaded and accepted
        self.refusals: list[Refusal] = []
        self.unknown: list[str] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Returns the environment of a process that uses this hub and none of its user's files."""
        return os.environ | {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",  # the environment of the tests may forbid all others
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: Hub

    def do_GET(self) -> None:
        self.handle_request()

    def do_HEAD(self) -> None:
        self.handle_request()

    def do_POST(self) -> None:
        self.handle_request()

    def do_PUT(self) -> None:
        self.handle_request()

    def log_message(self, format: str, *args) -> None:
        """Logs nothing."""

    def handle_request(self) -> None:
        hub = self.server_hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        hub.requests.append(request)
        for refusal in hub.refusals:
            if re.search(refusal.pattern, request):
                refusal.seen += 1
                if refusal.seen > refusal.after:
                    return self.reply(refusal.status, {"error": refusal.message}, {"X-Error-Message": refusal.message})
        is_open = self.command in ("GET", "HEAD") or path.startswith("/lfs/") or path == "/control"
        if not is_open and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.reply(401, {"error": "Invalid credentials"})
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                return getattr(self, method)(*match.groups(), body=body)
        hub.unknown.append(request)
        return self.reply(404, {"error": f"no such endpoint: {request}"})

    def reply(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def control(self, body: bytes) -> None:
        """Sets which requests to refuse from now on, for scripts in other processes."""
        self.server_hub.refusals = [Refusal(**fields) for fields in json.loads(body)]
        self.reply(200, {})

    def who_am_i(self, body: bytes) -> None:
        self.reply(200, {"type": "user", "name": "tester", "fullname": "Tester", "auth": {}, "orgs": []})

    def create(self, body: bytes) -> None:
        fields = json.loads(body)
        name = f"{fields.get('organization') or 'tester'}/{fields['name'].rpartition('/')[2]}"
        url = {"url": f"{self.server_hub.endpoint}/{name}", "name": name, "id": name}
        if name in self.server_hub.repositories:
            return self.reply(409, url | {"error": "You already created this model repo"})
        self.server_hub.repositories[name] = Repository()
        return self.reply(200, url)

    def validate_yaml(self, body: bytes) -> None:
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        modes = []
        for file in json.loads(body)["files"]:
            is_large = file["size"] > LFS_FROM_BYTES or file["path"].endswith((".safetensors", ".png"))
            mode = "lfs" if is_large else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.reply(200, {"files": modes})

    def lfs_batch(self, name: str, body: bytes) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.server_hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.server_hub.endpoint}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.reply(400, {"error": "the content does not have this hash"})
        self.server_hub.objects[oid] = body
        self.server_hub.uploads.append(oid)
        return self.reply(200, b"")

    def commit(self, name: str, revision: str, body: bytes) -> None:
        repository = self.server_hub.repositories[name]
        changes = {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                changes[value["path"]] = self.server_hub.objects[value["oid"]]
        repository.files |= changes
        repository.commits += 1
        url = f"{self.server_hub.endpoint}/{name}/commit/{repository.sha}"
        self.reply(200, {"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def model_info(self, name: str, revision: str | None, body: bytes) -> None:
        repository = self.server_hub.repositories.get(name)
        if repository is None:
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": path} for path in repository.files]
        return self.reply(
            200,
            {"_id": name, "id": name, "modelId": name, "sha": repository.sha, "siblings": siblings, "private": False}
            | {"tags": [], "downloads": 0, "likes": 0},
        )

    def tree(self, name: str, revision: str, folder: str | None, body: bytes) -> None:
        files = self.server_hub.repositories[name].files
        if folder is not None:  # there are none
            return self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        return self.reply(200, entries)

    def resolve(self, name: str, revision: str, path: str, body: bytes) -> None:
        repository = self.server_hub.repositories.get(name)
        if repository is None:
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": repository.sha}
        if path not in repository.files:
            return self.reply(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        content = repository.files[path]
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.reply(200, content, headers)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"POST /control", "control"),
    (r"GET /api/whoami-v2", "who_am_i"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"POST /api/models/{_REPO}/preupload/(\w+)", "preupload"),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(\w+)", "lfs_put"),
    (rf"POST /api/models/{_REPO}/commit/(\w+)", "commit"),
    (rf"GET /api/models/{_REPO}(?:/revision/(\w+))?", "model_info"),
    (rf"GET /api/models/{_REPO}/tree/(\w+)(?:/(.+))?", "tree"),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(\w+)/(.+)", "resolve"),
]
