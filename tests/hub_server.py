"""A loopback server that speaks as much of the Hub's HTTP API as loading a repo takes."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def serve(repos: dict[str, Path], requests: list[str] | None = None):
    """Serve folders as model repos by id; yields the endpoint for HF_ENDPOINT, and notes what is asked for."""

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
            for repo, folder in repos.items():
                files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
                api = f"api/models/{repo}"
                if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                    siblings = [{"rfilename": name} for name in files]
                    info = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                    return self.send(200, json.dumps(info).encode(), body)
                if path in (f"{api}/tree/main", f"{api}/tree/{COMMIT}"):
                    entries = [
                        {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file.read_bytes())}
                        for name, file in files.items()
                    ]
                    return self.send(200, json.dumps(entries).encode(), body)
                for revision in ("main", COMMIT):
                    name = path.removeprefix(f"{repo}/resolve/{revision}/")
                    if name != path and name in files:
                        return self.send(200, files[name].read_bytes(), body)
                    if name != path:
                        return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
                if path.startswith(f"{repo}/resolve/"):
                    return self.send(404, b"", body, {"X-Error-Code": "RevisionNotFound"})
            return self.send(404, b"", body, {"X-Error-Code": "RepoNotFound"})

        def send(self, status, content, body, headers=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{digest(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
