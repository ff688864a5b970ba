import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny_networks import save_scripted, sha256, tiny_inception

from zsnr_diffusers.evaluation import InceptionFeatures, inception_file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch hub, and no proxy before this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    before = torch.hub._hub_dir
    torch.hub._hub_dir = None
    yield tmp_path / "torch" / "hub" / "checkpoints"
    torch.hub._hub_dir = before


@contextlib.contextmanager
def serve(content, promised=None):
    """Serve bytes under any name; yields the address and the list of requests. `promised` is a wrong length."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(promised or len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics/tiny.pt", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def network(tmp_path):
    return save_scripted(tiny_inception(), tmp_path / "tiny.pt")


def test_fetched_once_and_whole(cache, network, capsys):
    with serve(network.read_bytes()) as (url, requests):
        path = inception_file(url, sha256(network))
        assert path == cache / "tiny.pt"
        assert path.read_bytes() == network.read_bytes()
        assert inception_file(url, sha256(network)) == path
        assert requests == ["/metrics/tiny.pt"]
    assert InceptionFeatures(path, sha256(network)).origin.sha256 == sha256(network)
    assert f"downloading {url}" in capsys.readouterr().err


def test_wrong_bytes_are_refused_and_not_kept(cache, network):
    with serve(network.read_bytes()[:-1]) as (url, _), pytest.raises(ValueError, match=r"invalid hash.*was deleted"):
        inception_file(url, sha256(network))
    assert list(cache.iterdir()) == []


def test_connection_that_breaks_off(cache, network):
    content = network.read_bytes()
    with serve(content[:100], len(content)) as (url, _), pytest.raises((ValueError, OSError), match=str(cache)):
        inception_file(url, sha256(network))
    assert list(cache.iterdir()) == []


def test_no_such_file_and_no_server(cache):
    with serve(None) as (url, _), pytest.raises(OSError, match=rf"{url} cannot be downloaded .*404.*put the file at"):
        inception_file(url)
    with pytest.raises(OSError, match=rf"{url} cannot be downloaded .*put the file at {cache / 'tiny.pt'}"):
        inception_file(url)
    assert list(cache.iterdir()) == []
