"""What was asked, as answers repeat it."""

from __future__ import annotations

from advisor.report.question import assumed_line, read_lines
from advisor.specs.question import Input

INPUTS = (
    Input("cluster", "lab", "given"),
    Input("gpu", "RTX 3090", "file", "cluster lab"),
    Input("host_memory_gib", 256, "file", "cluster lab"),
    Input("micro_batch", 2, "file", "ds.json"),
    Input("seq_len", 2048, "assumed"),
    Input("bucket_size", 5, "default", "DeepSpeed"),
)


def test_what_was_read_stands_with_its_source_once() -> None:
    assert [line.plain for line in read_lines(INPUTS)] == [
        "Read: gpu RTX 3090, host-memory 256 GiB (cluster lab), micro-batch 2 (ds.json).",
        "By default: bucket-size 5 (DeepSpeed).",
    ]


def test_what_was_given_or_read_is_not_assumed() -> None:
    assert [line.plain for line in assumed_line(INPUTS)] == ["Assumed (flags of these names change it): seq-len 2048."]
