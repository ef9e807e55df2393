"""Stands in for the ranks of a run, without torch: ``stand_in.py FAULT FOLDER`` behaves well, or fails in one way.

As a module it is one rank of a real launcher: ``-m validation.stand_in FOLDER``, with the fault in ``STAND_IN_FAULT``.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ENGINES = {
    "ddp": ("DistributedDataParallel", "AdamW"),
    "fsdp": ("FSDPModule", "AdamW"),
    "zero1": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer"),
    "zero2": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer"),
}
PHASE = {"peak_allocated_bytes": 2_000_000, "end_allocated_bytes": 1_500_000, "peak_reserved_bytes": None, "seconds": 1}
MEASURED = {
    "device": "cpu",
    "states_bytes": 1_000_000,
    "forward": PHASE,
    "backward": PHASE,
    "step": PHASE,
    "step_s": [0.25, 0.5, 0.25],
    "tokens_per_step": 128,
    "host_peak_bytes": 2**29,
}


def report(folder: Path, rank: int, **changed: object) -> None:
    """What a rank that ran leaves."""
    request = json.loads((folder / "request.json").read_text())
    plan = request["plan"]
    engine, optimizer = ENGINES[plan["strategy"]]
    record = {
        "ranks": plan["gpus"],
        "engine": engine,
        "optimizer": optimizer,
        "losses": [5.0, 4.0],
        "trace": {"parameters": request["parameters"]},
        "measured": MEASURED,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(record | changed))


def every_rank(folder: Path, **changed: object) -> None:
    for rank in range(json.loads((folder / "request.json").read_text())["plan"]["gpus"]):
        report(folder, rank, **changed)


def main(fault: str, folder: Path) -> None:
    if fault != "waits on a lock":
        (folder / "progress0.json").write_text('{"step": 1, "steps": 3}')
    if fault == "none":
        every_rank(folder)
    elif fault == "raises":
        raise ValueError("weights of the wrong shape")
    elif fault == "out of memory":
        raise MemoryError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
    elif fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "hangs":
        time.sleep(600)
    elif fault == "leaves a child":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, __file__, "hangs", str(folder)], start_new_session=True)
        raise ValueError("weights of the wrong shape")
    elif fault == "prints garbage":
        os.write(1, os.urandom(2**20) + b"\x1b]0;title\x07\x1b[2J" + b"x" * 2**20)
        sys.exit(3)
    elif fault == "never stops printing":
        while True:
            os.write(1, b"\xff\x00" * 2**15)
    elif fault == "writes no JSON":
        every_rank(folder)
        (folder / "rank1.json").write_bytes(b"\xff{]")
    elif fault == "leaves a rank out":
        report(folder, 0)
    elif fault == "reports something else":
        every_rank(folder, measured={"kind": "no measurement"})
    elif fault == "fills its quota":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        every_rank(folder, losses=[1.0] * 10_000)
    elif fault == "waits on a lock":
        while (Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam" / "lock").exists():
            time.sleep(0.1)
    elif fault == "finds its port busy":
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            second.bind(first.getsockname())
    elif fault == "one rank dies":
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


if __name__ == "__main__":
    main(os.environ.get("STAND_IN_FAULT") or sys.argv[1], Path(sys.argv[-1]))
