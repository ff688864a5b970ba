"""A loopback server that speaks as much of the Hub's HTTP API as reading and writing a repo takes, and can fail."""

import base64
import contextlib
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants

TOKEN, OWNER = "hf_of_the_tests", "acme"
"""Who may write, and where a repo without an owner goes."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Failure(NamedTuple):
    """What the server does in place of answering correctly.

    Attributes:
        status: in place of 200, with `not today`.
        code: the Hub's own name for it, in `X-Error-Code`.
        cut: bytes of the body after which the connection breaks off.
        times: how often.
    """

    status: int = 200
    code: str = ""
    cut: int | None = None
    times: float = float("inf")


def talk_to_the_server():
    """For a process that has imported the client before HF_ENDPOINT was set."""
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = os.environ["HF_ENDPOINT"], False
    constants.HF_HUB_DISABLE_XET = True  # which is another protocol, to another server


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def commit_of(branch: str) -> str:
    """The commit at the end of a branch."""
    return COMMIT if branch == "main" else hashlib.sha1(branch.encode()).hexdigest()


@dataclass
class _Hub:
    """What is served; see `serve`."""

    repos: dict[str, Path]
    requests: list[str] | None = None
    failures: Mapping[str, Failure | int] = field(default_factory=dict)
    more: Mapping[str, bytes] = field(default_factory=dict)
    made: dict[str, str | None] = field(default_factory=dict)
    new: Path = Path()
    failed: Counter[str] = field(default_factory=Counter)
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded and not committed yet."""

    def files(self, folder):
        here = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
        return {str(file.relative_to(folder)): file.read_bytes() for file in here} | dict(self.more)

    def failure(self, path, body=True):
        """The failure that is due."""
        for ending, due in self.failures.items():
            failure = Failure(due) if isinstance(due, int) else due
            of_a_body = failure.cut is not None
            if path.endswith(ending) and self.failed[ending] < failure.times and (body or not of_a_body):
                self.failed[ending] += 1
                return failure
        return None


class _Handler(BaseHTTPRequestHandler):
    @property
    def hub(self):
        return self.server.hub

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def do_PUT(self):
        content, path = self.body(), self.note()
        if not self.refused(path):
            self.hub.objects[path.removeprefix("lfs/")] = content
            self.send(200, b"", True)

    def do_POST(self):
        content, path = self.body(), self.note()
        if self.refused(path):
            return None
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send_json({"error": "Invalid username or password."}, 401)
        if path == "api/repos/create":
            return self.create(json.loads(content))
        if path == "api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(content)["objects"]
            return self.send_json({"transfer": "basic", "objects": [self.place(**one) for one in asked]})
        repo = "/".join(path.split("/")[2:4])
        if path == f"api/models/{repo}/preupload/main":
            files = [one["path"] for one in json.loads(content)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            answers = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None} for name, mode in modes.items()
            ]
            return self.send_json({"files": answers})
        assert path == f"api/models/{repo}/commit/main"
        self.commit(self.hub.repos[repo], [json.loads(line) for line in content.splitlines()])
        return self.send_json({"commitUrl": f"{self.own_url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def create(self, asked):
        repo = f"{asked.get('organization') or OWNER}/{asked['name']}"
        status = 409 if repo in self.hub.repos else 200
        if repo not in self.hub.repos:
            self.hub.repos[repo] = self.hub.new / repo
            # newer clients ask for the one, older ones for the other
            self.hub.made[repo] = "private" if asked.get("private") or asked.get("visibility") == "private" else None
        self.send_json({"url": f"{self.own_url}/{repo}", "private": asked.get("private")}, status)

    def place(self, oid, size):
        return {
            "oid": oid,
            "size": size,
            "actions": {"upload": {"href": f"{self.own_url}/lfs/{oid}"}},
        }

    def commit(self, folder, operations):
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "header":
                continue
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if operation["key"] == "lfsFile":
                path.write_bytes(self.hub.objects[value["oid"]])
            else:
                path.write_bytes(base64.b64decode(value["content"]))

    @property
    def own_url(self):
        return f"http://{self.headers['Host']}"

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def note(self):
        """The path that is asked for."""
        path = self.path.split("?")[0].strip("/")
        if self.hub.requests is not None:
            self.hub.requests.append(path)
        return path

    def refused(self, path):
        """Whether a request to write failed, as it was to."""
        failure = self.hub.failure(path)
        if failure is not None:
            self.send_json({"error": "not today"}, failure.status)
        return failure is not None

    def send_json(self, value, status=200):
        self.send(status, json.dumps(value).encode(), True)

    def answer(self, body):
        path = self.note()
        failure = self.hub.failure(path, body) or Failure()
        if failure.cut is None and failure.status != 200:
            content = json.dumps({"error": "not today"}).encode()
            return self.send(failure.status, content, body, {"X-Error-Code": failure.code})
        for name, folder in self.hub.repos.items():
            repo, _, branch = name.partition("@")
            revisions = (branch or "main", commit_of(branch or "main"))
            api = f"api/models/{repo}"
            if path in ((api,) if not branch else ()) or path in [f"{api}/revision/{one}" for one in revisions]:
                siblings = [{"rfilename": name} for name in self.hub.files(folder)]
                info = {"id": repo, "sha": revisions[1], "siblings": siblings, "private": False, "tags": []}
                return self.send(200, json.dumps(info).encode(), body)
            if path in [f"{api}/tree/{one}" for one in revisions]:
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                    for name, content in self.hub.files(folder).items()
                ]
                return self.send(200, json.dumps(entries).encode(), body)
            for revision in revisions:
                name = path.removeprefix(f"{repo}/resolve/{revision}/")
                if name != path and name in self.hub.files(folder):
                    return self.send(
                        200, self.hub.files(folder)[name], body, {"X-Repo-Commit": revisions[1]}, failure.cut
                    )
                if name != path:
                    return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        known = any(path.startswith((f"{name}/resolve/", f"api/models/{name}/")) for name in self.hub.repos)
        return self.send(404, b"", body, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

    def send(self, status, content, body, headers=None, cut=None):
        first = 0
        if status == 200 and (asked := self.headers.get("Range", "").removeprefix("bytes=")):
            begin, _, end = asked.partition("-")
            status, first = 206, int(begin)
            content = content[: int(end) + 1] if end else content
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", f'"{digest(content)}"')
        for name, value in {"X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[first:] if cut is None else content[first : first + cut])
        self.close_connection |= cut is not None and cut < len(content) - first

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # a client with several threads is not turned away

    def __init__(self, hub):
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)


@contextlib.contextmanager
def serve(repos, **served):
    """Serve folders as model repos; yields the endpoint for HF_ENDPOINT.

    Args:
        repos: folders by id, or by `id@branch` for another branch than main; commits are written into them, and those
            that are made are added.
        requests: takes what is asked for.
        failures: or a status, by an ending of the path that is asked for; "" is any.
        more: files that all repos have beside those in their folders, by any name.
        made: takes whether new repos are to be private.
        new: where folders of new repos are made.
    """
    server = _Server(_Hub(repos, **served))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def in_place_of_the_hub(monkeypatch, **served):
    """Let this process talk to a server, and with the right to write; `served` as of `serve`."""
    # Older clients remember in their session that they were offline.
    reset = getattr(huggingface_hub.utils._http, "reset_sessions", lambda: None)
    with serve(**served) as endpoint:
        reset()
        for name, value in {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN}.items():
            monkeypatch.setenv(name, value)
        for name in ("ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
            monkeypatch.setattr(constants, name, getattr(constants, name))
        talk_to_the_server()
        try:
            yield
        finally:
            reset()
