"""Tar shards for tests, and places to read them from that fail when they are told to."""

import contextlib
import io
import json
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


def tar(members, format=tarfile.PAX_FORMAT):
    """The bytes of a tar of `{name: bytes}`, or of pairs of them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, content in dict(members).items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def captioned(image_folder):
    """(name without ending, bytes of the PNG, caption) of a folder's images."""
    lines = [json.loads(line) for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
    return [
        (Path(line["file_name"]).stem, (image_folder / line["file_name"]).read_bytes(), line["text"]) for line in lines
    ]


def members(samples):
    """Pairs as a tar has them."""
    return [pair for key, png, text in samples for pair in ((f"{key}.png", png), (f"{key}.txt", text.encode()))]


def write_shards(folder, samples, sizes=(4, 3, 3)):
    """Shards of so many samples each, `0.tar` and so on; the pattern that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = iter(samples)
    for number, size in enumerate(sizes):
        (folder / f"{number}.tar").write_bytes(tar(members([next(rest) for _ in range(size)])))
    return f"{folder}/{{0..{len(sizes) - 1}}}.tar"


def to_memory(folder, protocol="memory", ending="tar"):
    """The same shards where fsspec has them in memory; the pattern that names them."""
    system = fsspec.filesystem(protocol)
    files = sorted(folder.glob(f"*.{ending}"))
    for file in files:
        system.pipe(f"/{folder.name}/{file.name}", file.read_bytes())
    return f"{protocol}://{folder.name}/{{0..{len(files) - 1}}}.{ending}"


class FlakyFileSystem(MemoryFileSystem):
    """Raises what is in `errors`, one per read and the last for good; notes how many bytes it gives."""

    protocol = "flaky"
    store, pseudo_dirs = {}, [""]
    errors, reads = [], []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        if self.errors:
            error = self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]
            if error is not None:
                raise error
        data = super().cat_file(path, start=start, end=end, **kwargs)
        self.reads.append(len(data))
        return data


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@contextlib.contextmanager
def serve_ranges(folder, answer=None):
    """Serve a folder over HTTP, by range; `answer(name, start)` may give another status, or "whole" for no ranges."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            file = Path(folder, self.path.strip("/"))
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            status = answer(file.name, int(span[1]) if span else None) if answer else None
            if isinstance(status, int) or not file.is_file():
                return self.send(status if isinstance(status, int) else 404, b"", {}, body)
            data = file.read_bytes()
            if span is None or status == "whole":
                return self.send(200, data, {} if status == "whole" else {"Accept-Ranges": "bytes"}, body)
            start, end = int(span[1]), min(int(span[2]) + 1, len(data))
            return self.send(206, data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, body)

        def send(self, status, data, headers, body):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
