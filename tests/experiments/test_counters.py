"""What ncu prints is read, and what it lacks is told."""

from __future__ import annotations

import pytest

from experiments.counters import METRICS, Options, command, parse

HEADER = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


def line(number, kernel, column, value):
    name = f"sparse_attention_{kernel}_mosaic_gpu_kernel"
    return f'"{number}","7","{name}","{METRICS[column]}","unit","{value}"'


def test_one_row_a_launch():
    lines = [
        "==PROF== Connected to process 7",
        HEADER,
        line(0, "forward", "ms", "1,234,500"),
        line(0, "forward", "tensor_pipe_percent", "61.25"),
        line(1, "dq", "ms", "2000000"),
        line(1, "dq", "l2_percent", "n/a"),
        line(2, "dkv", "ms", "3000000"),
        '"3","7","fusion_2","gpu__time_duration.sum","ns","5"',
    ]
    assert parse(lines) == [
        {"kernel": "sparse_attention_forward", "ms": 1.2345, "tensor_pipe_percent": 61.25},
        {"kernel": "sparse_attention_dq", "ms": 2.0},
        {"kernel": "sparse_attention_dkv", "ms": 3.0},
    ]


def test_a_table_that_lacks_kernels_is_an_error():
    lines = [HEADER, '"3","7","fusion_2","gpu__time_duration.sum","ns","5"']
    with pytest.raises(ValueError, match="did not measure the attention kernels forward, dq, dkv"):
        parse(lines)
    with pytest.raises(ValueError, match="kernels forward, dkv"):
        parse([*lines, line(1, "dq", "ms", "2000000")])


def test_the_command_leaves_clocks_alone():
    words = command(Options(length=512, rehearse=True))
    assert words[words.index("--clock-control") + 1] == "none"
    assert words[-3:] == ["--length", "512", "--rehearse"]
    assert words[words.index("--launch-count") + 1] == "3"
