"""A loopback server that speaks as much of the Hub's HTTP API as loading a repo takes, and fails on demand."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Failure(NamedTuple):
    """What the server does in place of answering rightly.

    Attributes:
        status: in place of 200, without a body.
        code: the Hub's own name for it, in `X-Error-Code`.
        cut: bytes of the body after which the connection breaks off.
        times: how often.
    """

    status: int = 200
    code: str = ""
    cut: int | None = None
    times: float = float("inf")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def commit_of(branch: str) -> str:
    """The commit at the end of a branch."""
    return COMMIT if branch == "main" else hashlib.sha1(branch.encode()).hexdigest()


@contextlib.contextmanager
def serve(
    repos: Mapping[str, Path],
    requests: list[str] | None = None,
    failures: Mapping[str, Failure] | None = None,
    more: Mapping[str, bytes] | None = None,
):
    """Serve folders as model repos; yields the endpoint for HF_ENDPOINT.

    Args:
        repos: folders by id, or by `id@branch` for another branch than main.
        requests: takes what is asked for.
        failures: by an ending of the path that is asked for; "" is any.
        more: files that all repos have beside those in their folders, by any name.
    """
    failed = dict.fromkeys(failures or {}, 0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = self.path.split("?")[0].strip("/")
            if requests is not None:
                requests.append(path)
            cut = None
            for ending, failure in (failures or {}).items():
                if (
                    not path.endswith(ending)
                    or failed[ending] >= failure.times
                    or (failure.cut is not None and not body)
                ):
                    continue
                failed[ending] += 1
                if failure.cut is None:
                    return self.send(failure.status, b"", body, {"X-Error-Code": failure.code})
                cut = failure.cut
            for name, folder in repos.items():
                repo, _, branch = name.partition("@")
                revisions = (branch or "main", commit_of(branch or "main"))
                api = f"api/models/{repo}"
                if path in ((api,) if not branch else ()) or path in [f"{api}/revision/{one}" for one in revisions]:
                    siblings = [{"rfilename": name} for name in files(folder)]
                    info = {"id": repo, "sha": revisions[1], "siblings": siblings, "private": False, "tags": []}
                    return self.send(200, json.dumps(info).encode(), body)
                if path in [f"{api}/tree/{one}" for one in revisions]:
                    entries = [
                        {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                        for name, content in files(folder).items()
                    ]
                    return self.send(200, json.dumps(entries).encode(), body)
                for revision in revisions:
                    name = path.removeprefix(f"{repo}/resolve/{revision}/")
                    if name != path and name in files(folder):
                        return self.send(200, files(folder)[name], body, {"X-Repo-Commit": revisions[1]}, cut)
                    if name != path:
                        return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            known = any(path.startswith((f"{name}/resolve/", f"api/models/{name}/")) for name in repos)
            return self.send(404, b"", body, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

        def send(self, status, content, body, headers=None, cut=None):
            first = 0
            if status == 200 and (asked := self.headers.get("Range", "")).endswith("-"):
                status, first = 206, int(asked.removeprefix("bytes=")[:-1])
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) - first))
            self.send_header("ETag", f'"{digest(content)}"')
            for name, value in {"X-Repo-Commit": COMMIT, **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content[first:] if cut is None else content[first : first + cut])
            self.close_connection |= cut is not None

        def log_message(self, *args):
            pass

    def files(folder):
        here = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
        return {str(file.relative_to(folder)): file.read_bytes() for file in here} | dict(more or {})

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # a client with several threads is not turned away

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
