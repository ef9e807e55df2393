"""Models of the Hub, from its cache and from a server that stands in for it.

huggingface_hub reads its environment when it is imported, so each look-up is a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}

LOOK_UP = """
import sys
from advisor.catalog.models import find_model
from advisor.errors import AdvisorError
try:
    model = find_model(sys.argv[1]).model
    print(f"{model.name}, hidden size {model.hidden_size}, from {model.source}")
except AdvisorError as error:
    print(f"{type(error).__name__}: {error}")
"""

LookUp = Callable[[str], str]


def look_up(name: str, environment: dict[str, str]) -> str:
    """What finding *name* says in a fresh process: the model, or the error."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    done = subprocess.run(
        [sys.executable, "-c", LOOK_UP, name], env=kept | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def fill(cache: Path, repository: str) -> None:
    """Lay a configuration out as huggingface_hub caches it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture
def offline(tmp_path: Path) -> LookUp:
    fill(tmp_path, "someone/tiny-gpt2")
    return lambda name: look_up(name, {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})


def test_a_cached_configuration_is_read_offline(offline: LookUp) -> None:
    said = offline("someone/tiny-gpt2")

    assert said == "tiny-gpt2, hidden size 32, from config.json of someone/tiny-gpt2 on the Hub"


def test_offline_an_unknown_model_brings_near_names(offline: LookUp) -> None:
    said = offline("someone/gpt2-smal")

    assert said.startswith(
        "UnknownNameError: the catalog has no model someone/gpt2-smal, and HF_HUB_OFFLINE keeps the Hub from being "
        "asked; near names: gpt2"
    )


def test_an_id_that_the_hub_s_rules_forbid_is_refused(offline: LookUp) -> None:
    assert "is neither a model's name nor a Hub id" in offline("someone/-gpt2--small")


class StandIn(BaseHTTPRequestHandler):
    """Answers for ``config.json`` of a few repositories as the Hub does."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        body = json.dumps(CONFIG).encode()
        versioned = {"X-Repo-Commit": COMMIT, "ETag": '"abc"'}
        answers: dict[str, tuple[int, dict[str, str]]] = {
            "/someone/tiny-gpt2": (200, {**versioned, "Content-Length": str(len(body))}),
            "/someone/gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}),
            "/someone/weights": (404, {"X-Error-Code": "EntryNotFound", **versioned}),
            "/someone/teapot": (418, {}),
        }
        unknown = (401, {"X-Error-Code": "RepoNotFound"})
        status, headers = answers.get(self.path.removesuffix("/resolve/main/config.json"), unknown)
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if status == 200 and self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A stand-in for the Hub on this machine."""
    stand_in = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=stand_in.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield stand_in
    stand_in.shutdown()
    thread.join()
    stand_in.server_close()


@pytest.fixture
def online(server: ThreadingHTTPServer, tmp_path: Path) -> LookUp:
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    return lambda name: look_up(name, {"HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": endpoint})


def test_a_model_of_the_hub_is_downloaded_into_its_cache(online: LookUp, tmp_path: Path) -> None:
    said = online("someone/tiny-gpt2")

    assert said == "tiny-gpt2, hidden size 32, from config.json of someone/tiny-gpt2 on the Hub"
    assert look_up("someone/tiny-gpt2", {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}) == said


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("someone/gated", r"ConfigError: someone/gated asks for its licence .* http://127.*/someone/gated"),
        ("someone/weights", r"ConfigError: someone/weights on the Hub has no config\.json"),
        ("someone/teapot", "UnknownNameError: the catalog has no model someone/teapot, and the Hub answered: .*418"),
        ("someone/gpt-2", "UnknownNameError: neither the catalog nor the Hub has a model someone/gpt-2; near.*: gpt2"),
    ],
)
def test_what_the_hub_refuses_is_explained_in_one_line(online: LookUp, asked: str, message: str) -> None:
    said = online(asked)

    assert re.match(message, said), said
    assert said.endswith("`advisor models` lists all")
    assert "\n" not in said


def test_a_hub_that_cannot_be_reached_is_told_without_waiting(tmp_path: Path) -> None:
    said = look_up("someone/gpt2-smal", {"HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"})

    assert re.match("UnknownNameError: the catalog has no .*, and the Hub cannot be reached .*; near names: gpt2", said)
