"""Time and memory of whole processes: advisor beside ``accelerate estimate-memory`` on the same model.

    python benchmarks/startup.py             # about two minutes; the comparison needs the extra "run"
    python benchmarks/startup.py --rounds 3

Every round starts each command once, in turn, so that a busy machine slows all of them alike. The first round only
warms the disk cache and is not counted. Wall time runs from starting Python to its end; peak memory is the kernel's
``ru_maxrss``. Medians over the rounds, with the fastest beside them.

``accelerate estimate-memory`` asks the Hub about a model before it counts. Here a server on this machine gives that
answer, and the configuration lies in the folder that the model is named after: the command is the real one, without
the time that a network would add. It counts weights and multiplies; advisor prices every plan of a training step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from statistics import median

PROFILE = Path(__file__).parents[1] / "profiles" / "models" / "Qwen__Qwen2.5-1.5B.json"
MODEL = "Qwen/Qwen2.5-1.5B"
MIB = 2**20
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in one unit of ``ru_maxrss``: macOS counts bytes, Linux KiB."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command as it is typed, and what Python runs for it."""

    typed: str
    module: str
    most_s: float | None = None
    """Wall time that it may take; None where that is not ours to say."""

    @property
    def arguments(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.typed.split()[1:]]


@dataclass(frozen=True, slots=True)
class Run:
    """One process from start to end."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


RECOMMEND = Command("advisor recommend --model Qwen2.5-1.5B --gpus 4", "advisor", most_s=0.5)
HELP = Command("advisor --help", "advisor", most_s=0.3)
ACCELERATE = Command(f"accelerate estimate-memory {MODEL}", "accelerate.commands.accelerate_cli")
MOST_BYTES = 150 * MIB
"""Peak memory that a command of advisor's may take."""
LEAST_SPEEDUP = 10


def measured(command: Command, folder: str, environment: dict[str, str]) -> Run:
    """Run *command* in *folder*, which must end well."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command.arguments, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise SystemExit(f"{command.typed} ended with {process.returncode}:\n{said.decode(errors='replace')}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * MAXRSS_UNIT)


@contextmanager
def hub(config: dict[str, object]) -> Iterator[str]:
    """A server that knows one model; yields its address."""
    answer = json.dumps({"id": MODEL, "library_name": "transformers", "tags": [], "config": config}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path.startswith(f"/api/models/{MODEL}")
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer) if known else 0))
            self.end_headers()
            if known:
                self.wfile.write(answer)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def compare(rounds: int) -> dict[Command, list[Run]]:
    """*rounds* runs of every command, one after another."""
    config = json.loads(PROFILE.read_text())["config"]
    comparable = find_spec("accelerate") and find_spec("transformers")
    commands = (RECOMMEND, HELP, ACCELERATE) if comparable else (RECOMMEND, HELP)
    found: dict[Command, list[Run]] = {command: [] for command in commands}
    with tempfile.TemporaryDirectory() as folder, hub(config) as address:
        model = Path(folder, MODEL)
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(config))
        hugging_face = {"HF_ENDPOINT": address, "HF_HOME": str(Path(folder, "cache")), "NO_PROXY": "127.0.0.1"}
        environment = {**os.environ, **hugging_face, "COLUMNS": "100"}
        for number in range(rounds + 1):
            for command in commands:
                run = measured(command, folder, environment)
                if number:
                    found[command].append(run)
    return found


def table(found: dict[Command, list[Run]]) -> list[str]:
    """A line per command, and how many times faster the main one is than accelerate's."""
    title = f"median of {len(found[RECOMMEND])}"
    head = f"{title:50}{'wall s':>8}{'fastest':>9}{'CPU s':>8}{'peak MiB':>10}  goal"
    lines = [head, "─" * len(head)]
    for command, runs in found.items():
        wall_s, peak_bytes = median(run.wall_s for run in runs), max(run.peak_bytes for run in runs)
        fastest_s, cpu_s = min(run.wall_s for run in runs), median(run.cpu_s for run in runs)
        line = f"{command.typed:50}{wall_s:8.3f}{fastest_s:9.3f}{cpu_s:8.3f}{peak_bytes / MIB:10.0f}"
        if command.most_s:
            reached = wall_s <= command.most_s and peak_bytes <= MOST_BYTES
            line += f"  {command.most_s} s, {MOST_BYTES // MIB} MiB: {_met(reached)}"
        lines.append(line)
    if ACCELERATE not in found:
        return [*lines, "accelerate estimate-memory was left out: accelerate and transformers are not both installed"]
    pairs = zip(found[ACCELERATE], found[RECOMMEND], strict=True)
    ratio = median(other.wall_s / own.wall_s for other, own in pairs)
    return [
        *lines,
        f"{'accelerate over recommend':50}{ratio:7.1f}x{'':27}  {LEAST_SPEEDUP}x: {_met(ratio >= LEAST_SPEEDUP)}",
    ]


def _met(reached: bool) -> str:
    return "met" if reached else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="counted runs of each command (default 9)")
    print("\n".join(table(compare(parser.parse_args().rounds))))


if __name__ == "__main__":
    main()
