"""A command in a session of its own: started, watched, and ended with every process that it left behind.

What it prints goes through a pipe of which only the end is kept, so that no program can fill a disk or this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MARK = "ADVISOR_RUN"
"""Environment variable by which a run's processes are found, wherever a launcher put them."""
GRACE_S = 5.0
"""What processes are given to end by themselves before they are killed."""
LOOK_S = 0.2
"""Time between two looks at a command."""
KEPT_BYTES = 2**16
"""Of the output, from its end."""
DRAIN_S = 2.0
"""What the rest of the output is waited for once no process is left to write it."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended, and the last of what it printed."""

    exit_code: int | None
    """None where it was ended here: it took too long, or was interrupted."""
    interrupted: bool
    output: str
    seconds: float


def finish(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    timeout_s: float,
    look: Callable[[float], None] = lambda elapsed_s: None,
) -> Ended:
    """Run *command* in *folder* to its end, or end it with all its processes after *timeout_s* or at Ctrl-C.

    *look* is called a few times a second with the time that has passed.
    """
    started = time.monotonic()
    process, tail, exit_code, interrupted = None, None, None, False
    with _interrupted_once() as deafen:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(environment) | {MARK: folder.name},
                cwd=folder,
                start_new_session=True,  # the terminal's Ctrl-C reaches this process alone, which ends the others
            )
            tail = _Tail(process.stdout)
            while exit_code is None and time.monotonic() - started < timeout_s:
                look(time.monotonic() - started)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    exit_code = process.wait(LOOK_S)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            deafen()
            seconds = time.monotonic() - started
            end(folder.name)
            if process:
                process.wait()
    return Ended(exit_code, interrupted, tail.text() if tail else "", seconds)


class _Tail:
    """Reads a pipe to its end and keeps the last bytes."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        assert pipe is not None
        self._kept = bytearray()
        self._pipe = pipe
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._pipe:
            while part := os.read(self._pipe.fileno(), KEPT_BYTES):
                self._kept += part
                del self._kept[:-KEPT_BYTES]

    def text(self) -> str:
        """What was kept, once all is read."""
        self._thread.join(DRAIN_S)
        return bytes(self._kept).decode("utf-8", errors="replace")


@contextlib.contextmanager
def _interrupted_once() -> Iterator[Callable[[], None]]:
    """Let SIGTERM and a closed terminal interrupt as Ctrl-C does: by themselves they would leave a run's processes.

    What it yields makes this process deaf to all three, so that nothing stops it from ending the others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def interrupt(*_: object) -> None:
        deafen()
        raise KeyboardInterrupt

    def deafen() -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield deafen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(mark: str) -> None:
    """End every process that carries *mark*: torchrun's ranks have sessions of their own, and may outlive it."""
    import psutil

    def marked() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == mark:
                    found.append(process)
        return found

    for process in marked():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(marked(), timeout=GRACE_S)
    for process in marked():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
