"""A dataset repo of the Hub for `hf://` paths, on this machine."""

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


@contextlib.contextmanager
def serve_dataset(folder, repo, reads):
    """Serve a folder as a dataset repo; yields the endpoint, and notes (name, bytes) of what is read in `reads`."""
    folder = Path(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = self.path.split("?")[0].strip("/")
            api, files = f"api/datasets/{repo}", f"datasets/{repo}/resolve/main/"
            if path in (api, f"{api}/revision/main"):
                return self.answer({"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
            if path.startswith(f"{api}/tree/main"):
                place = folder / path.removeprefix(f"{api}/tree/main").strip("/")
                return self.answer([self.entry(one) for one in sorted(place.iterdir())])
            if not path.startswith(files):
                return self.answer({"error": "not found"}, 404)
            file = folder / path.removeprefix(files)
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            content = file.read_bytes()[start : end + 1]
            reads.append((file.name, len(content)))
            return self.send(content, 206)

        def entry(self, path):
            kind = {"type": "directory"} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
            return {"path": str(path.relative_to(folder)), "oid": "0", **kind}

        def answer(self, value, status=200):
            return self.send(json.dumps(value).encode(), status)

        def send(self, content, status):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
