"""The parts that bench, eval, train and info share: the machine, the bandwidth, tables, plots, optional libraries."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from recycle_ext import _C
from recycle_ext.errors import RecycleError
from recycle_ext.measuring import machine
from recycle_ext.measuring.bandwidth import read_bandwidth
from recycle_ext.measuring.extras import is_installed, require
from recycle_ext.measuring.plots import check_plot, grouped_bars, new_figure, save_figure
from recycle_ext.measuring.tables import markdown_table, percent

CPU = torch.device("cpu")


def torch_read_bandwidth(size: int, repeats: int = 5) -> float:
    """Bytes per second of torch's sum over a buffer of ``size`` bytes: the best of the repeats."""
    buffer = torch.ones(size // 4)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)


@pytest.mark.parametrize("size", [1 << 20, 1 << 24, 1 << 26])
def test_read_bandwidth_is_near_that_of_torch(size):
    """Within a factor of 4 either way. A pass that the compiler dropped, or a wrong unit, is 1000 times off."""
    _C.set_n_threads(1)
    torch.set_num_threads(1)
    ours = max(read_bandwidth(CPU, size, 5) for _ in range(3))
    theirs = max(torch_read_bandwidth(size) for _ in range(3))
    assert theirs / 4 < ours < theirs * 4


def test_time_of_read_bandwidth_grows_with_buffer_and_repeats():
    """The time that the caller sees bounds the rate from above: at least ``repeats`` whole passes took place."""
    size, repeats = 1 << 26, 8
    start = time.perf_counter()
    rate = read_bandwidth(CPU, size, repeats)
    seconds = time.perf_counter() - start
    # The rate is that of the median pass; half of the passes took at least as long as the median.
    assert seconds > repeats / 2 * size / rate


def test_peak_memory_counts_this_process_alone(tmp_path):
    """A child of a large parent starts small; the child's peak follows its own allocations."""
    code = (
        "import numpy as np\n"
        "from recycle_ext.measuring.machine import peak_memory_bytes\n"
        "before = peak_memory_bytes()\n"
        "np.ones(100_000_000, dtype=np.uint8)\n"
        "print(before, peak_memory_bytes())\n"
    )
    large = torch.ones(1_500_000_000, dtype=torch.uint8)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(large) == 1_500_000_000
    before, after = map(int, done.stdout.split())
    assert before < 1_200_000_000 < machine.peak_memory_bytes()
    assert 90_000_000 < after - before < 200_000_000


def test_machine_describes_this_one():
    found = machine.machine()
    assert found["cpu"]
    assert set(found["cpu_features"]) <= set(machine.FEATURES)
    if found["isa"] == "avx2":
        assert "avx2" in found["cpu_features"]
    assert found["cores"] == _C.available_cores()
    assert found["memory_bytes"] > 1 << 28
    assert found["torch"] == torch.__version__
    sizes = list(found["cache_bytes"].values())
    assert sizes == sorted(sizes)


def test_cache_sizes_are_read_from_sysfs(tmp_path, monkeypatch):
    levels = [("1", "Data", "32K"), ("1", "Instruction", "64K"), ("2", "Unified", "1M")]
    for index, values in enumerate(levels):
        (tmp_path / f"index{index}").mkdir()
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (tmp_path / f"index{index}" / name).write_text(value + "\n")
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    assert machine.cache_bytes() == {"L1": 32 << 10, "L2": 1 << 20}
    monkeypatch.setattr(machine, "_CACHES", tmp_path / "nowhere")
    assert machine.cache_bytes() == {}


def test_table_aligns_words_left_and_figures_right():
    table = markdown_table(["name", "x"], [["a", "1"], ["bb", "22.0"], ["", ""]], left=1)
    lines = table.splitlines()
    assert lines[1].startswith("|:-") and lines[1].endswith("-:|")
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [cells[0], *cells[2:]] == [["name", "x"], ["a", "1"], ["bb", "22.0"], ["", ""]]
    assert lines[2].startswith("| a ") and lines[2].endswith(" 1 |")
    assert (percent(0.256), percent(0.256, 1), percent(None)) == ("26%", "25.6%", "")


def test_missing_package_is_named_with_its_pip_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    assert not is_installed("cpuinfo")
    with pytest.raises(RecycleError, match=r"^x needs py-cpuinfo: `pip install py-cpuinfo`$"):
        require("cpuinfo", "x")
    require("json", "x")


def test_plot_file_of_an_unknown_kind_is_refused():
    with pytest.raises(RecycleError, match=r"--plot is bars\.gif; it must end in \.png"):
        check_plot("bars.gif")


def test_grouped_bars_draw_each_value_in_its_group():
    pytest.importorskip("matplotlib", reason="the extra `bench` brings it")
    figure, (axes,) = new_figure(1, 4, 3)
    bars = grouped_bars(axes, ["a", "b"], {"x": [1, 2], "y": [None, 4]}, ["red", "blue"], "%.0f")
    assert [[bar.get_height() for bar in series] for series in bars] == [[1, 2], [4]]
    centers = [[bar.get_x() + bar.get_width() / 2 for bar in series] for series in bars]
    assert [[round(center) for center in series] for series in centers] == [[0, 1], [1]]
    assert bars[0][1].get_x() + bars[0][1].get_width() <= bars[1][0].get_x()  # no overlap
    assert [text.get_text() for text in axes.texts] == ["1", "2", "4"]
    with pytest.raises(RecycleError, match=r"nowhere/x\.png: cannot be written: No such file or directory"):
        save_figure(figure, "nowhere/x.png")
