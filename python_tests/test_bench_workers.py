"""python -m recycle_ext.bench with pretended workers: order of the runs, medians, failures, the user's mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from bench_model import SMALL, jobs_of, write_model
from tqdm import tqdm

from recycle_ext.bench import interleaved_runs, worker
from recycle_ext.bench.__main__ import main
from recycle_ext.bench.interleaved_runs import RunnerRecord, run_interleaved
from recycle_ext.bench.report import limit_fraction, summary
from recycle_ext.measuring.interleave import rounds


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("bench") / "base")


# ---- Workers that pretend ----------------------------------------------------------------------------

PRETENDER = """
import json, os, signal, sys, time
log = open(sys.argv[1], "a")
mode = json.loads(sys.stdin.readline())["runner"]["mode"]
print(json.dumps({"step_bytes": 100, "standard_step_bytes": 100}), flush=True)
for count, line in enumerate(sys.stdin):
    print(mode, file=log, flush=True)
    deed = dict(deed.split(":") for deed in sys.argv[2:]).get(mode)
    if deed == "fall":
        print("something happened\\nerror: out of luck\\n", file=sys.stderr)
        sys.exit(3)
    if deed == "shot":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "interrupt" and count == 1:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    names = "tokens_per_second gigabytes_per_second read_bandwidth_gigabytes_per_second "
    names += "roofline_fraction first_token_seconds prefill_tokens_per_second peak_memory_bytes"
    answer = dict.fromkeys(names.split(), 1.0 + count)
    answer["acceptance_rate"] = None if mode == "standard" else 0.5
    answer["phases"] = []
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Replaces the workers by pretenders; returns a function that reads the order of the requests."""

    def install(*deeds: str):
        log = tmp_path / "log"
        command = [sys.executable, "-c", PRETENDER, str(log), *deeds]
        monkeypatch.setattr(worker, "COMMAND", command)
        return lambda: [mode[0] for mode in log.read_text().split()] if log.exists() else []

    return install


def first_cells(out: str) -> list[list[str]]:
    """The first three cells of each row of the tables."""
    return [[cell.strip() for cell in line.split("|")[1:4]] for line in out.splitlines()]


def test_rounds_alternate_their_direction():
    assert ["".join(order) for order in rounds("ABC", 3)] == ["ABC", "CBA", "ABC"]


def test_interleaved_runs_alternate_their_direction(model, pretend):
    order = pretend()
    records = [RunnerRecord(job) for job in jobs_of(model)]
    assert run_interleaved(records, 3, phases=False)
    assert order() == ["s", "v", "a", "a", "v", "s", "s", "v", "a"]
    assert [len(record.measurements) for record in records] == [3, 3, 3]


def test_progress_ends_at_its_total(model, pretend, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            bars.append(self)

    pretend()
    monkeypatch.setattr(interleaved_runs, "tqdm", Bar)
    assert run_interleaved([RunnerRecord(job) for job in jobs_of(model)], 2, phases=True)
    assert [(bar.n, bar.total) for bar in bars] == [(12, 12)]  # three load, run twice, and give their phases


@pytest.mark.parametrize(("deed", "reason"), [("fall", "out of luck"), ("shot", "ended by signal 9: no reason given")])
def test_worker_that_dies_is_left_out(model, pretend, capsys, deed, reason):
    order = pretend(f"verify:{deed}")
    assert main(["--model", str(model), "--module", str(model.parent / "module"), *SMALL]) == 0
    out, error = capsys.readouterr()
    for dtype in ("bf16", "q8", "q4"):
        assert f"recycle_ext verify {dtype}, " in error
    assert error.count(f"is left out: {reason}\n") == 3
    assert ["recycle_ext", "standard", "bf16"] in first_cells(out)
    assert "| verify" not in out
    assert order().count("v") == 3


def test_run_without_any_result_fails(model, pretend, capsys):
    pretend("standard:fall")
    assert main(["--model", str(model), "--modes", "standard", "--dtypes", "q8", *SMALL]) == 1
    assert capsys.readouterr().out == ""


def test_ctrl_c_shows_the_results_so_far(model, pretend, capsys, tmp_path):
    pretend("alternate:interrupt")
    options = ["--module", str(model.parent / "module"), "--dtypes", "q8", "--repeats", "4"]
    options += ["--json", str(tmp_path / "out.json")]
    assert main(["--model", str(model), *SMALL, *options]) == 130
    out = capsys.readouterr().out
    assert ["recycle_ext", "alternate", "q8"] in first_cells(out)
    assert "medians of 1\n" in out
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [len(result["repeats"]) for result in results] == [1, 1, 1]


def test_summary_holds_medians_and_every_repeat(model):
    (job,) = jobs_of(model, modes=["verify"])
    names = ["gigabytes_per_second", "read_bandwidth_gigabytes_per_second", "roofline_fraction"]
    names += ["first_token_seconds", "prefill_tokens_per_second", "acceptance_rate"]
    rates = [90.0, 10.0, 40.0]
    measurements = [
        dict.fromkeys(names, rate / 100) | {"tokens_per_second": rate, "peak_memory_bytes": 7 + i}
        for i, rate in enumerate(rates)
    ]
    result = summary(RunnerRecord(job, measurements=measurements))
    assert result["tokens_per_second"] == 40
    assert all(result[name] == 0.4 for name in names)
    assert [repeat["tokens_per_second"] for repeat in result["repeats"]] == rates
    assert [repeat["first_token_seconds"] for repeat in result["repeats"]] == [0.9, 0.1, 0.4]
    assert result["peak_memory_bytes"] == 7  # the later ones include the probe's buffer


def test_limit_fraction_compares_with_the_bytes():
    def result(mode, rate, acceptance, drafts=1, threads=2):
        values = {"system": "recycle_ext", "dtype": "q8", "threads": threads, "batch": 1}
        values |= {"mode": mode, "tokens_per_second": rate, "acceptance_rate": acceptance}
        return values | {"drafts": drafts, "standard_step_bytes": 100, "step_bytes": 100 + 25 * drafts}

    standard = result("standard", 50.0, None, drafts=0)
    # Two tokens for 1.25 times the bytes: 1.6 times the rate, 80 tokens a second.
    assert limit_fraction(result("alternate", 60.0, 1.0), [standard]) == pytest.approx(60 / 80)
    assert limit_fraction(result("verify", 45.0, 0.5), [standard]) == pytest.approx(45 / 60)
    assert limit_fraction(result("alternate", 75.0, 1.0, 2), [standard]) == pytest.approx(75 / 100)
    assert limit_fraction(standard, [standard]) is None
    auto = result("verify", 45.0, 0.5) | {"drafts": "auto"}
    assert limit_fraction(auto, [standard]) is None
    assert limit_fraction(result("verify", 45.0, 0.5, threads=1), [standard]) is None


# ---- The user's mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--module", "nowhere"], "nowhere: no such directory"),
        (["--module", "none", "--modes", "verify"], "--modes is verify, which needs a module"),
        (["--modes", "fast"], "--modes has 'fast'; it must be of standard, verify, alternate"),
        (["--modes", ","], "--modes is empty"),
        (["--dtypes", "q8,q5"], "--dtypes has 'q5'; it must be of native, f32, bf16, q8, q4"),
        (["--peers", "vllm"], "--peers has 'vllm'; it must be of transformers, torch.compile, llama.cpp"),
        (["--drafts", "5"], "--drafts is 5; it must be 1 to 4"),
        (["--threads", "1,two"], "--threads is '1,two'; it must be whole numbers"),
        (["--threads", "257"], "--threads has 257; it must be 1 to 256"),
        (["--batch", "0"], "--batch has 0; it must be at least 1"),
        (["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (["--context", "0"], "--context is 0; it must be at least 1"),
        (["--new-tokens", "600"], "this model's context has 512"),
        (["--prompt-tokens", "512"], "--prompt-tokens is 512; this model's context is 512"),
        (["--json", "nowhere/out.json"], "--json nowhere/out.json: there is no directory nowhere"),
        (["--plot", "bars.jpeg2"], "--plot is bars.jpeg2; it must end in .png"),
    ],
)
def test_mistake_of_the_user_is_one_line(model, pretend, capsys, arguments, message):
    pretend()
    assert main(["--model", str(model), *SMALL, *arguments]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert out == ""


def test_missing_matplotlib_is_one_line(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--model", str(model), "--plot", "bars.png"]) == 2
    error = capsys.readouterr().err
    assert error == "error: --plot needs matplotlib: `pip install matplotlib`\n"


def test_missing_tabulate_is_one_line(model, pretend, monkeypatch, capsys):
    order = pretend()
    monkeypatch.setitem(sys.modules, "tabulate", None)
    assert main(["--model", str(model), *SMALL]) == 2
    error = capsys.readouterr().err
    assert error == "error: python -m recycle_ext.bench needs tabulate: `pip install tabulate`\n"
    assert order() == []


def test_model_without_a_module_runs_only_standard(model, pretend, capsys):
    order = pretend()
    assert main(["--model", str(model), "--dtypes", "q8", *SMALL]) == 0
    assert "verify and alternate are left out: there is no module" in capsys.readouterr().err
    assert set(order()) == {"s"}
