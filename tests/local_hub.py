"""A hub on this machine: as much of the hub's HTTP as huggingface_hub asks for to read one repository and to write it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

TOKEN, GUEST = "hf_writer", "hf_guest"
"""One that may write, and one that may only read."""
LARGE = (".data", ".onnx", ".safetensors")
"""Suffixes of files that go through large file storage."""
JSON = {"Content-Type": "application/json"}


@dataclass
class Hub:
    """A repository and what was asked of it.

    Args:
        folder: the files of its only branch, `main`.
        commit: its latest.
        name: owner/name.
        exists: somebody made the repository.
        read: files that were downloaded.
        requests: METHOD path, of everything that asked for a change.
        large: of large file storage, by sha256.
    """

    folder: Path
    commit: str
    address: str = ""
    name: str = "owner/name"
    exists: bool = True
    read: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)

    def files(self) -> list[str]:
        """Paths in the repository."""
        return [str(path.relative_to(self.folder)) for path in sorted(self.folder.rglob("*")) if path.is_file()]

    def take(self, lines: list[dict[str, Any]]) -> None:
        """Apply a commit."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self._write(value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                content = self.large[value["oid"]]
                assert len(content) == value["size"]
                self._write(value["path"], content)
            elif line["key"] == "deletedFile":
                (self.folder / value["path"]).unlink()
            else:
                assert line["key"] == "header"
        self.commit = hashlib.sha1(repr([self.commit, lines]).encode()).hexdigest()

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextmanager
def serving(folder: Path, commit: str = "0" * 40, *, exists: bool = True) -> Iterator[Hub]:
    """A hub at `Hub.address` while active."""
    hub = Hub(folder, commit, exists=exists)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        if f"/{self.hub.name}" not in self.path or not self.hub.exists:
            self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        elif "/v9" in self.path:
            self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        elif "/resolve/" in self.path:
            self._file(self.path.split("/resolve/")[1].split("/", 1)[1])
        elif "/tree/" in self.path:
            sizes = {name: (self.hub.folder / name).stat().st_size for name in self.hub.files()}
            self._answer(200, [{"type": "file", "path": n, "size": size, "oid": self.hub.commit} for n, size in sizes.items()])
        else:
            names = [{"rfilename": name} for name in self.hub.files()]
            self._answer(200, {"id": self.hub.name, "sha": self.hub.commit, "siblings": names, "private": False})

    do_HEAD = do_GET

    def _file(self, name: str) -> None:
        path = self.hub.folder / name
        if not path.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._answer(200, content, {"ETag": tag, "X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"})
        if self.command == "GET":
            self.hub.read.append(name)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append(f"{self.command} {self.path}")
        token = str(self.headers.get("Authorization", "")).removeprefix("Bearer ")
        if token not in (TOKEN, GUEST):
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif token == GUEST and "validate-yaml" not in self.path:
            self._answer(403, {"error": 'You don\'t have the rights to create a model under the namespace "owner"'})
        elif self.path.endswith("/commit/main"):
            self.hub.take([json.loads(line) for line in content.splitlines()])
            url = f"{self.hub.address}/{self.hub.name}/commit/{self.hub.commit}"
            self._answer(200, {"success": True, "commitOid": self.hub.commit, "commitUrl": url})
        else:
            self._answer_json(json.loads(content))

    def _answer_json(self, value: dict[str, Any]) -> None:
        if self.path.endswith("/api/repos/create"):
            assert f"{value['organization']}/{value['name']}" == self.hub.name
            status, self.hub.exists = 409 if self.hub.exists else 200, True
            self._answer(status, {"url": f"{self.hub.address}/{self.hub.name}"})
        elif self.path.endswith("/api/validate-yaml"):
            metadata = yaml.safe_load(value["content"].split("---\n")[1])
            wrong = [] if isinstance(metadata, dict) else [{"message": "no mapping"}]
            self._answer(400 if wrong else 200, {"errors": wrong, "warnings": []})
        elif self.path.endswith("/preupload/main"):
            modes = [(file["path"], "lfs" if file["path"].endswith(LARGE) else "regular") for file in value["files"]]
            self._answer(200, {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes]})
        else:
            assert self.path == f"/{self.hub.name}.git/info/lfs/objects/batch"
            places = {item["oid"]: {"upload": {"href": f"{self.hub.address}/large/{item['oid']}"}} for item in value["objects"]}
            objects = [{"oid": i["oid"], "size": i["size"], "actions": places[i["oid"]]} for i in value["objects"]]
            self._answer(200, {"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        content, name = self.rfile.read(int(self.headers["Content-Length"])), self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == name
        self.hub.large[name] = content
        self._answer(200, {})

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {**({} if isinstance(value, bytes) else JSON), **(headers or {})}.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...
