"""Loading matrices: conversions between formats, the order of rows, files that fail, memory, progress."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import columns, converted_rows, dequantized, packed, random_rows
from model_files import write_gguf
from models import write_base

from recycle_ext import _C, load
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.tensor_source import TensorSource
from recycle_ext.errors import RecycleError, RecycleWarning
from recycle_ext.weights import load as weights_load
from recycle_ext.weights.layout import CONVERTED_TO, FORMATS, Matrix, bytes_of, matrix_bytes, pack_matrix, pack_rows
from recycle_ext.weights.load import Loader
from recycle_ext.weights.pack import pack_model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def source_of(rows: torch.Tensor, format: str, k: int, file: Path, **fields) -> TensorSource:
    """A tensor in a file of its own, behind 24 other bytes."""
    data = bytes_of(rows)
    file.write_bytes(b"x" * 24 + data.tobytes())
    return TensorSource("w", (len(rows), k), format, file, 24, data.nbytes // len(rows), **fields)


def loaded(source: TensorSource, format: str, ids: torch.Tensor | None = None, threads: int = 2) -> torch.Tensor:
    n = source.shape[0] if ids is None else len(ids)
    weights = torch.full((matrix_bytes(format, n, source.shape[1]),), 255, dtype=torch.uint8)
    Loader(threads).load(source, format, weights, ids)
    return weights


@pytest.mark.parametrize("target", CONVERTED_TO)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [96, 1056])  # a piece of 256 columns is converted at a time
def test_converted_weights_equal_those_of_torch_and_gguf(format, target, k):
    n, k = 19, columns(format, k)
    rows = random_rows(format, n, k, generator(k))
    result = torch.full((matrix_bytes(target, n, k),), 255, dtype=torch.uint8)
    pack_rows(rows, target, n, k, 0, result, format)
    expected = rows if target == format else converted_rows(dequantized(rows, format).float(), target)
    expected = packed(expected, target, k)
    ours, theirs = (Matrix(weights, 0, target, n, k).rows(torch.arange(n)) for weights in (result, expected))
    # A group of iq4_xs may be all zeros: which one's sign is that of the minimum is open.
    assert torch.equal(ours, theirs) and (format == "iq4_xs" or torch.equal(result, expected))


def hard_values() -> torch.Tensor:
    """float32 [rows, 64]: zeros, ties of rounding and of the largest magnitude, and floats of every size."""
    random = torch.randn(12, 64, generator=generator(1))
    random *= 2.0 ** torch.tensor([-149, -140, -130, -126, -60, -24, -14, 0, 15, 60, 120, 126])[:, None]
    steps = torch.arange(64.0)
    halves = (steps - 31.5) * 0.5
    return torch.cat(
        [
            random,
            torch.zeros(1, 64),
            torch.full((1, 64), 0.3),
            torch.full((1, 64), -0.3),
            torch.stack([steps, -steps, halves, halves * 2, halves / 127, steps / 15, steps % 2 - 0.5, 1 - steps % 3]),
            # Halfway between neighbours of f16 and bf16, and at the largest and the smallest of f16.
            torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-9, 1 + 3 * 2**-9]).repeat(1, 16),
            torch.tensor([65504.0, 65519.9, 65520.0, -65520.0]).repeat(1, 16),
            torch.tensor([2**-14, 2**-24, 2**-25, 1.5 * 2**-24]).repeat(1, 16),
        ]
    )


@pytest.mark.parametrize("target", CONVERTED_TO)
def test_zeros_ties_and_extremes_are_converted_as_by_torch_and_gguf(target):
    values = hard_values()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of overflows
        expected = packed(converted_rows(values, target), target, 64)
    assert torch.equal(pack_matrix(values, target), expected)


@pytest.mark.parametrize("target", CONVERTED_TO)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights_stay_nonfinite(target, value):
    values = torch.randn(16, 64, generator=generator())
    values[3, 40] = values[3, 50] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        rows = converted_rows(values, target)
    matrices = [
        Matrix(weights, 0, target, 16, 64) for weights in (pack_matrix(values, target), packed(rows, target, 64))
    ]
    ours, expected = (matrix.rows(torch.arange(16)) for matrix in matrices)
    assert torch.allclose(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert not ours[3, 40].isfinite()


def test_every_half_becomes_its_float_and_every_float_of_a_half_comes_back():
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(-1, 16)
    as_float = Matrix(torch.zeros(matrix_bytes("f32", len(halves), 16), dtype=torch.uint8), 0, "f32", len(halves), 16)
    pack_rows(halves, "f32", len(halves), 16, 0, as_float.weights, "f16")
    numbers = as_float.rows(torch.arange(len(halves)))
    assert torch.allclose(numbers, halves.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(numbers.signbit(), halves.signbit())
    back = Matrix(pack_matrix(numbers, "f16"), 0, "f16", len(halves), 16).rows(torch.arange(len(halves)))
    assert torch.allclose(back, numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("format", "target"), [("bf16", "bf16"), ("q4_1", "q4_1"), ("bf16", "q4_0"), ("q6_k", "f32")])
def test_file_of_several_pieces_is_loaded_whole(tmp_path, monkeypatch, format, target, threads):
    """A piece is what is read between two looks at signals; each thread reads a part of 128 KiB at a time."""
    n, k = 2500, columns(format, 96)
    rows = random_rows(format, n, k, generator())
    source = source_of(rows, format, k, tmp_path / "w")
    monkeypatch.setattr(weights_load, "_BYTES_AT_ONCE", 600 * source.row_bytes)
    expected = torch.zeros(matrix_bytes(target, n, k), dtype=torch.uint8)
    pack_rows(rows, target, n, k, 0, expected, format)
    assert torch.equal(loaded(source, target, threads=threads), expected)


@pytest.mark.parametrize("head_dim", [16, 48, 64])
@pytest.mark.parametrize(("format", "target"), [("q4_0", "q4_0"), ("f32", "q8_0")])
def test_interleaved_rows_are_loaded_in_the_order_of_hugging_face(tmp_path, format, target, head_dim):
    n = 3 * head_dim
    rows = random_rows(format, n, 64, generator())
    # Rows 0 and h/2 of a head are neighbours in the file.
    stored = rows.view(3, 2, head_dim // 2, -1).transpose(1, 2).reshape(n, -1)
    source = source_of(stored, format, 64, tmp_path / "w", interleaved_head_dim=head_dim)
    straight = source_of(rows, format, 64, tmp_path / "v")
    assert torch.equal(source.raw_rows(0, n), rows)
    assert torch.equal(loaded(source, target), loaded(straight, target))


@pytest.mark.parametrize(("format", "target"), [("q8_0", "q8_0"), ("f16", "q4_1")])
def test_rows_named_by_ids_are_loaded_in_their_order(tmp_path, format, target):
    rows = random_rows(format, 300, 64, generator())
    ids = torch.tensor([0, 1, 2, 17, 18, 40, *range(100, 180), 299])
    chosen = source_of(rows[ids], format, 64, tmp_path / "v")
    assert torch.equal(loaded(source_of(rows, format, 64, tmp_path / "w"), target, ids), loaded(chosen, target))


def test_ids_and_heads_outside_the_file_are_refused(tmp_path):
    source = source_of(torch.randn(32, 32), "f32", 32, tmp_path / "w")
    with pytest.raises(ValueError, match="ids must be n int64 numbers of rows in the file"):
        loaded(source, "f32", torch.tensor([0, 32]))
    odd = TensorSource("w", (32, 32), "f32", source.file, 24, 128, interleaved_head_dim=24)
    with pytest.raises(ValueError, match="whole heads"):
        loaded(odd, "f32")


@pytest.mark.parametrize("threads", [1, 2])
def test_file_that_became_shorter_is_an_error_with_its_size(tmp_path, threads):
    source = source_of(torch.randn(5000, 64), "f32", 64, tmp_path / "w")
    with source.file.open("r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(
        RecycleError, match=f"{source.file}: the file ends at byte 1000000, 280024 bytes before the end"
    ):
        loaded(source, "q8_0", threads=threads)


def test_file_that_cannot_be_read_is_an_error_with_the_reason(tmp_path):
    source = source_of(torch.randn(16, 16), "f32", 16, tmp_path / "w")
    source.file.unlink()
    with pytest.raises(RecycleError, match=f"{source.file}: cannot be read: No such file or directory"):
        loaded(source, "f32")
    source.file.mkdir()
    with pytest.raises(RecycleError, match=f"{source.file}: cannot be read: Is a directory"):
        loaded(source, "f32")


def test_type_without_a_format_becomes_f16_and_is_warned_of(tmp_path):
    """MXFP4: the type that gguf also writes."""
    hf = write_base(tmp_path / "hf", tied=False)
    values = write_gguf(tmp_path / "model.gguf", hf, "MXFP4")
    base = open_checkpoint(tmp_path / "model.gguf")
    matrices = [value for value in values.values() if value.ndim == 2]
    size = sum(value.size * 2 for value in matrices) / 1e9
    with pytest.warns(RecycleWarning) as caught:
        model = pack_model(base)
    assert [str(warning.message) for warning in caught] == [
        f"{base.path}: {len(matrices)} tensors of type MXFP4 become f16, {size:.3g} GB"
    ]
    assert model.formats == "f16"
    for dtype in ("f32", "q8"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pack_model(base, dtype=dtype).formats == {"f32": "f32", "q8": "q8_0"}[dtype]
    for name in ("model.layers.1.self_attn.k_proj.weight", "lm_head.weight"):
        expected = torch.from_numpy(values[name])
        for ids in (None, torch.tensor([0, 7, 8, 30])):
            rows = expected if ids is None else expected[ids]
            weights = loaded(base.tensors[name], "f16", ids)
            assert torch.equal(weights, pack_matrix(rows, "f16")), name


def test_k_quant_with_rows_of_no_whole_block_is_refused(tmp_path):
    hf = write_base(tmp_path / "hf")
    file = tmp_path / "model.gguf"
    write_gguf(file, hf, "Q8_0", edit=lambda data: data.replace(*of_type("blk.1.ffn_up.weight", 8, 12)))
    with pytest.raises(RecycleError) as caught:
        open_checkpoint(file)
    assert str(caught.value) == f"{file}: tensor blk.1.ffn_up.weight has rows of 64; Q4_K has blocks of 256"


@pytest.mark.parametrize(("number", "name"), [(99, "number 99"), (24, "I8")])
def test_type_that_nothing_reads_is_refused_with_the_way_out(tmp_path, number, name):
    hf = write_base(tmp_path / "hf")
    file = tmp_path / "model.gguf"
    write_gguf(file, hf, "Q8_0", edit=lambda data: data.replace(*of_type("blk.1.ffn_up.weight", 8, number)))
    with pytest.raises(RecycleError) as caught:
        open_checkpoint(file)
    message = f"{file}: tensor blk.1.ffn_up.weight has type {name}, which is not supported; convert the file to another"
    assert str(caught.value).startswith(message)


def of_type(name: str, old: int, new: int) -> tuple[bytes, bytes]:
    """The header's entry of a [96, 64] tensor of one type, and of another."""
    start = len(name).to_bytes(8, "little") + name.encode()
    sizes = np.array([64, 96], "<u8").tobytes()
    return tuple(
        start + np.array([2], "<u4").tobytes() + sizes + np.array([kind], "<u4").tobytes() for kind in (old, new)
    )


def test_model_larger_than_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base")
    size, size_in_q8 = (pack_model(base, dtype=dtype).weights.numel() for dtype in (None, "q8"))
    monkeypatch.setattr(_C, "available_memory", lambda: size)
    pack_model(base)
    monkeypatch.setattr(Loader, "load", lambda *_: pytest.fail("a matrix was read"))
    sizes = r"the weights take 0\.00 GB in memory, and 0\.00 GB are available"
    for available, remedy in ((size - 1, r"; dtype q8 \(0\.00 GB\) or q4 \(0\.00 GB\) fits"), (size_in_q8 // 4, "")):
        monkeypatch.setattr(_C, "available_memory", lambda available=available: available)
        with pytest.raises(RecycleError, match=f"{base.path}: {sizes}{remedy}$"):
            pack_model(base)


MEMINFO = "MemTotal:       8000 kB\nMemFree:        1000 kB\nMemAvailable:   6000 kB\n"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({"proc/meminfo": "MemTotal: 8000 kB\n"}, None),
        ({"proc/meminfo": MEMINFO}, 6000 * 1024),
        # A group of version 2 below one with a limit: page cache that can be given up is available.
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": "3000000\n",
                "sys/fs/cgroup/a/memory.current": "2500000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 1800000\nfile 600000\ninactive_file 300000\nactive_file 200000\n",
            },
            1_000_000,
        ),
        # Version 1; and a limit above the machine's memory.
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "2000000\n",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "1900000\n",
                "sys/fs/cgroup/memory/x/memory.stat": "active_file 1\ntotal_active_file 400000\ntotal_inactive_file 5\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            500_005,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "2000\n",
            },
            0,
        ),
    ],
)
def test_available_memory_is_within_the_machine_and_every_control_group(tmp_path, files, available):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _C.available_memory(str(tmp_path)) == available


def test_progress_adds_up_to_the_matrices(tmp_path, monkeypatch):
    source = source_of(torch.randn(250, 64), "f32", 64, tmp_path / "w")
    monkeypatch.setattr(weights_load, "_BYTES_AT_ONCE", 16 * source.row_bytes)
    added = []
    weights = torch.zeros(matrix_bytes("q8_0", 250, 64), dtype=torch.uint8)
    Loader(1, added.append).load(source, "q8_0", weights)
    assert len(added) == 16 and sum(added) == weights.numel()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_progress_is_shown_on_a_terminal_where_asked_for(tmp_path, monkeypatch, default_model, stream, progress, shown):
    from recycle_ext.weights import pack

    def bar(**options):
        assert options["delay"] == 2
        return pack_bar(**options | {"delay": 0, "mininterval": 0})

    pack_bar = pack.tqdm
    monkeypatch.setattr(pack, "tqdm", bar)
    monkeypatch.setattr(sys, "stderr", stream())
    load(default_model, module="none", progress=progress)
    assert ("loading SmolLM2" in sys.stderr.getvalue()) == shown


def test_import_brings_neither_torch_compiler_nor_gguf():
    """They take seconds, and no load of a model with known types needs them."""
    code = "import sys, recycle_ext; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "recycle_ext.weights.load" in modules
    assert not {"torch._dynamo", "sympy", "gguf", "jinja2", "huggingface_hub"} & set(modules)
