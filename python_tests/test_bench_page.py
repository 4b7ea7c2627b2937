"""docs/benchmarks.md and the README's table: made of committed JSON, and committed as they are made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recycle_ext.bench.page import BEGIN, END, losses, main, page, readme_table

ROOT = Path(__file__).parent.parent
INTRO = "# Speed\n\nHow it is measured."


def result(system: str, mode: str, dtype: str, rates: list[float], **changes) -> dict:
    """A result of --json whose repeats have these rates; the prompt's are ten times as high."""

    def repeat(rate: float) -> dict:
        return {"tokens_per_second": rate, "prefill_tokens_per_second": 10 * rate}

    values = {"system": system, "mode": mode, "dtype": dtype, "threads": 2, "batch": 1}
    values |= {"drafts": 0 if mode == "standard" else 1, "roofline_fraction": 0.5}
    values |= {"acceptance_rate": None, "limit_fraction": None, "first_token_seconds": 0.05}
    values |= {"peak_memory_bytes": 2e8, "repeats": [repeat(rate) for rate in rates]}
    return values | repeat(sorted(rates)[len(rates) // 2]) | changes


def report(name: str, results: list[dict], **changes) -> dict:
    machine = {"cpu": "CPU X", "cores": 2, "isa": "avx2", "cache_bytes": {"L2": 1 << 20}}
    machine |= {"torch": "2.13", "recycle_ext": "0.1.0", "date": "2026-11-25 10:00"}
    settings = {"model": f"{name}.gguf", "model_name": name, "module": "m", "context": 16}
    settings |= {"new_tokens": 128, "prompt_tokens": 512}
    return {
        "machine": machine,
        "peer_versions": {"llama-cpp-python": "0.3"},
        "settings": settings,
        "read_bandwidth_gigabytes_per_second": 20.0,
        "results": results,
    } | changes


SMALL = report(
    "Small",
    [
        result("recycle_ext", "standard", "bf16", [100, 98, 103]),
        result("recycle_ext", "verify", "bf16", [90, 91, 89], acceptance_rate=0.5),
        result("llama.cpp", "standard", "bf16", [60, 61, 59]),
        result("recycle_ext", "standard", "q8", [300.4, 310, 290]),
        result("llama.cpp", "standard", "q8", [301, 302, 300], prefill_tokens_per_second=9000.0),
    ],
)
LARGE = report("Large", [result("recycle_ext", "standard", "q8", [12.34, 12.2, 12.4])])


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "intro.md").write_text(INTRO + "\n")
    for name, value in (("speed-1", SMALL), ("speed-2", LARGE), ("context-1024", LARGE)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("|:")
    ]


def test_page_shows_medians_and_ranges_of_each_run(folder):
    text = page(folder)
    assert INTRO in text
    headings = ["## Large: context-1024", "## Small: speed-1", "## Large: speed-2"]
    assert [line for line in text.splitlines() if line.startswith("## ")] == headings
    assert rows(text.split("## Small")[1])[:4] == [
        ["", "bf16", "q8"],
        ["recycle_ext, standard", "100 (98 to 103)", "300 (290 to 310)"],
        ["recycle_ext, verify", "90 (89 to 91)", ""],
        ["llama.cpp", "60 (59 to 61)", "301 (300 to 302)"],
    ]
    assert "12.3 (12.2 to 12.4)" in text
    assert "1000 (980 to 1030)" in text  # of the prompt
    for fact in (
        "CPU X, 2 cores (L2 1024 KiB), avx2, threads 2; 2026-11-25 10:00.",
        "recycle_ext 0.1.0, torch 2.13, llama-cpp-python 0.3.",
        "Model Small.gguf, module m; greedy, 128 new tokens after 16; 3 repeats",
    ):
        assert fact in text
    shares = [row for row in rows(text) if row[:2] == ["recycle_ext, verify", "bf16"]]
    assert shares == [["recycle_ext, verify", "bf16", "50%", "50%", "", "50 ms", "200 MB"]]


def test_page_lists_every_loss(folder):
    assert losses(SMALL["results"]) == [
        "recycle_ext, verify in bf16: 0.90 times the tokens per second of recycle_ext, standard",
        "recycle_ext, standard in q8: 0.33 times the prompt tokens per second of llama.cpp",
    ]
    assert "- recycle_ext, verify in bf16: 0.90 times" in page(folder)
    assert losses(LARGE["results"]) == []


def test_page_has_a_table_per_threads_and_batch(folder):
    results = [
        result("recycle_ext", "standard", "q8", [rate], threads=threads, batch=batch)
        for threads, batch, rate in ((1, 1, 11), (2, 1, 22), (2, 4, 44))
    ]
    (folder / "batches.json").write_text(json.dumps(report("Small", results)))
    text = page(folder).split("## Small: batches")[1].split("\n## ")[0]
    parts = text.split("### ")[1:]
    titles = ["1 thread, batch 1", "2 threads, batch 1", "2 threads, batch 4"]
    assert [part.splitlines()[0] for part in parts] == titles
    for part, rate in zip(parts, ("11", "22", "44"), strict=True):
        assert rows(part)[1] == ["recycle_ext, standard", f"{rate} ({rate} to {rate})"]


def test_page_shows_a_gpu_report(folder):
    machine = {"gpu": "GPU Y", "driver": "1", "torch": "2", "cuda": "13", "date": "2026-11-25"}
    row = {"shape": "Tiny", "system": "recycle_ext", "mode": "standard", "dtype": "bf16"}
    row |= {"step_microseconds": 500.0, "tokens_per_second": 2000.0, "gigabytes_per_second": 1.0}
    row |= {"roofline_fraction": 0.25, "speedup_limit": None, "prefill_tokens_per_second": None}
    gpu = {"machine": machine, "checks": {"tests": "passed"}, "settings": {}, "results": [row]}
    (folder / "gpu.json").write_text(json.dumps(gpu))
    text = page(folder).split("## GPU Y")[1]
    assert "tests passed" in text
    assert rows(text)[1][:6] == ["Tiny", "recycle_ext", "standard", "bf16", "500", "2000"]


def test_readme_table_has_the_speed_files_side_by_side(folder):
    text = readme_table(folder)
    assert rows(text) == [
        ["", "Small bf16", "Small q8", "Large q8"],
        ["recycle_ext, standard", "100", "300", "12.3"],
        ["recycle_ext, verify", "90", "", ""],
        ["llama.cpp", "60", "301", ""],
    ]
    assert (
        "Small: 128 tokens after 16, medians of 3 repeats, which lie within 3% of the medians; "
        "CPU X, avx2, 2 threads; 2026-11-25." in text
    )


def test_command_writes_the_page_and_replaces_the_readme_table(folder, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    for _ in range(2):  # the second time changes nothing
        assert main([str(folder), "--readme", str(readme)]) == 0
        assert (tmp_path / "benchmarks.md").read_text() == page(folder)
        expected = f"before\n\n{BEGIN}\n\n{readme_table(folder)}\n\n{END}\n\nafter\n"
        assert readme.read_text() == expected


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("README.md", "no markers", "the README needs a line <!-- begin: speed -->"),
        ("benchmarks/bad.json", "{", "bad.json: not JSON"),
        ("benchmarks/bad.json", "[]", "bad.json: not a --json file of python -m recycle_ext.bench"),
    ],
)
def test_mistake_is_one_line(folder, tmp_path, capsys, file, text, message):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    (tmp_path / file).write_text(text)
    assert main([str(folder), "--readme", str(tmp_path / "README.md")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_committed_page_equals_the_generated_one():
    folder = ROOT / "docs" / "benchmarks"
    assert (ROOT / "docs" / "benchmarks.md").read_text("utf-8") == page(folder)


def test_committed_readme_holds_the_generated_table():
    folder = ROOT / "docs" / "benchmarks"
    readme = (ROOT / "README.md").read_text("utf-8")
    assert any(folder.glob("speed*.json"))
    assert f"{BEGIN}\n\n{readme_table(folder)}\n\n{END}" in readme
