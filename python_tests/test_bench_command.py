"""python -m recycle_ext.bench as a whole: its JSON, tables and plot, and peers beside recycle_ext."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from bench_model import SMALL, write_model

from recycle_ext.bench.__main__ import main
from recycle_ext.bench.page import page, readme_table
from recycle_ext.bench.plot import draw, plot

RESULT_KEYS = {
    "system",
    "mode",
    "drafts",
    "dtype",
    "threads",
    "batch",
    "tokens_per_second",
    "gigabytes_per_second",
    "read_bandwidth_gigabytes_per_second",
    "roofline_fraction",
    "acceptance_rate",
    "limit_fraction",
    "first_token_seconds",
    "prefill_tokens_per_second",
    "peak_memory_bytes",
    "weight_bytes",
    "step_bytes",
    "standard_step_bytes",
    "formats",
    "repeats",
    "phases",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("bench") / "base")


@pytest.fixture(scope="module")
def whole_run(model) -> tuple[subprocess.CompletedProcess, dict]:
    """All modes, one sequence and two, with phases; and the --json of this run."""
    out = model.parent / "out.json"
    options = ["--module", model.parent / "module", "--dtypes", "q8", "--batch", "1,2"]
    options += ["--threads", "1", "--phases", "--json", out]
    done = subprocess.run(
        [sys.executable, "-m", "recycle_ext.bench", "--model", model, *options, *SMALL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads(out.read_text())


def test_json_of_a_run_has_every_figure_and_repeat(whole_run):
    _, report = whole_run
    results = report["results"]
    machine = {"cpu", "cpu_features", "cores", "isa", "torch", "recycle_ext", "date"}
    assert set(report["machine"]) >= machine
    assert report["peer_versions"] == {}
    assert report["read_bandwidth_gigabytes_per_second"] > 0
    assert [(r["mode"], r["batch"]) for r in results] == [
        (mode, batch) for batch in (1, 2) for mode in ("standard", "verify", "alternate")
    ]
    for result in results:
        assert set(result) == RESULT_KEYS
        for name, value in result.items():
            if name.endswith(("_second", "_seconds", "_bytes")) or name == "roofline_fraction":
                assert value > 0, name
        assert len(result["repeats"]) == 2
        for name in ("tokens_per_second", "prefill_tokens_per_second", "roofline_fraction"):
            assert result[name] == pytest.approx(median(r[name] for r in result["repeats"]))
        has_drafts = result["mode"] != "standard"
        assert (result["acceptance_rate"] is not None) == has_drafts
        assert (result["limit_fraction"] is not None) == has_drafts
        assert (result["step_bytes"] > result["standard_step_bytes"]) == has_drafts


def test_phases_of_a_step_add_up_to_the_step(whole_run):
    _, report = whole_run
    for result in report["results"]:
        parts = {(row["part"], row["phase"]) for row in result["phases"]}
        assert {("base", "qkv"), ("base", "head"), ("", "call")} <= parts
        assert ("module" in {part for part, _ in parts}) == (result["mode"] != "standard")
        assert sum(row["share"] for row in result["phases"]) == pytest.approx(1, abs=0.05)


def test_tables_of_a_run_are_markdown(whole_run):
    done, _ = whole_run
    lines = done.stdout.splitlines()
    tables = [index for index, line in enumerate(lines) if line and not set(line) - set("|-: ")]
    assert len(tables) == 1 + 6  # the results, and the phases of each
    assert [lines[tables[0] + i].split("|")[2].strip() for i in range(1, 7)] == ["standard", "verify", "alternate"] * 2
    assert "tokens/s" in lines[tables[0] - 1]
    assert "base: 6 tokens after 5, a prompt of 20, medians of 2" in done.stdout
    assert "Phases of alternate q8, threads 1, batch 2:" in done.stdout
    assert "Traceback" not in done.stderr


def test_json_of_a_run_holds_what_the_page_needs(whole_run, tmp_path):
    _, report = whole_run
    (tmp_path / "speed.json").write_text(json.dumps(report))
    text = page(tmp_path)
    assert str(Path.home()) not in json.dumps(report)  # a committed file names no folder
    assert f"{report['machine']['cpu']}, " in text
    assert report["machine"]["date"] in text
    assert "### 1 thread, batch 2" in text
    table = readme_table(tmp_path)
    for result in report["results"]:
        rate = f"{result['tokens_per_second']:.0f}"
        assert f"{rate} (" in text
        assert f" {rate} |" in table or result["batch"] == 2
    assert len(table.split("\n\n")[0].splitlines()) == 2 + 3  # one row per mode


def test_plot_of_a_run_shows_every_rate_and_limit(whole_run, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` brings it")
    _, report = whole_run
    results = report["results"]
    figure = draw(results, "title")
    (axes,) = figure.axes
    heights = [bar.get_height() for bars in axes.containers for bar in bars]
    assert heights == [result["tokens_per_second"] for result in results]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    expected = [f"recycle_ext {r['mode']}, batch {r['batch']}" for r in results]
    assert sorted(labels) == sorted([*expected, "at full memory bandwidth"])
    limits = [r["tokens_per_second"] / r["roofline_fraction"] for r in results]
    assert [line.get_ydata()[0] for line in axes.lines] == limits
    # The group of the one dtype is centered on its tick.
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["q8"]
    centers = [bar.get_x() + bar.get_width() / 2 for bars in axes.containers for bar in bars]
    assert centers == sorted(centers)
    assert sum(centers) == pytest.approx(0, abs=1e-9)
    assert axes.get_title(loc="left") == "title"
    plot(results, "title", str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_a_dtype_of_a_peer_leaves_a_gap():
    pytest.importorskip("matplotlib", reason="the extra `bench` brings it")

    def result(system, dtype, rate):
        values = {"system": system, "mode": "standard", "dtype": dtype, "threads": 1, "batch": 1}
        return values | {"tokens_per_second": rate, "roofline_fraction": 0.5}

    results = [
        result("recycle_ext", "bf16", 10.0),
        result("transformers", "bf16", 5.0),
        result("recycle_ext", "q8", 20.0),
    ]
    (axes,) = draw(results, "").axes
    ours, theirs = axes.containers
    assert [bar.get_height() for bar in ours] == [10, 20]
    assert [bar.get_height() for bar in theirs] == [5]
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in (*ours, *theirs)] == [0, 1, 0]
    assert sorted(line.get_ydata()[0] for line in axes.lines) == [10, 20, 40]


def test_transformers_beside_ours_reads_as_many_bytes(model, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings it")
    out = tmp_path / "out.json"
    options = ["--module", "none", "--modes", "standard", "--dtypes", "bf16", "--batch", "2"]
    options += ["--peers", "transformers", "--threads", "1", "--json", str(out)]
    assert main(["--model", str(model), *options, *SMALL]) == 0, capsys.readouterr().err
    report = json.loads(out.read_text())
    assert report["peer_versions"] == {"transformers": transformers.__version__}
    ours, theirs = report["results"]
    assert (ours["system"], theirs["system"]) == ("recycle_ext", "transformers")
    assert theirs["tokens_per_second"] > 0
    assert theirs["prefill_tokens_per_second"] > 0
    # The same matrices in the same dtype; recycle_ext's bytes include vectors and the alignment.
    assert theirs["step_bytes"] <= ours["step_bytes"] < 1.1 * theirs["step_bytes"]
