"""What a rank on gloo does otherwise than torch alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

RANK = """
import sys
import torch
import torch.distributed as distributed
from advisor.tracing.counter import StorageCounter
from advisor.validation import worker

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
given = torch.arange(1000.0) * (rank + 1)
expected = torch.empty(500)
distributed.reduce_scatter_tensor(expected, given.clone())
worker.reduce_scatter_in_place()
for output in (torch.empty(500), given[500 * rank :][:500]):
    buffer = given if output.data_ptr() == given[500 * rank :].data_ptr() else given.clone()
    with StorageCounter() as counter:
        distributed.reduce_scatter_tensor(output, buffer)
    assert torch.equal(output, expected), output
    assert counter.peak_bytes <= buffer.nbytes + output.nbytes, counter.peak_bytes
"""


def test_gloo_reduces_and_scatters_within_the_tensor_it_is_given(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")], cwd=root)
        for rank in range(2)
    ]

    assert [rank.wait(60) for rank in ranks] == [0, 0]
