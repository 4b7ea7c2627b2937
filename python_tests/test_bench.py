"""python -m recycle_ext.bench: what it counts, in which order, and what it says of what cannot run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from models import write_base, write_byte_tokenizer, write_module

from recycle_ext.bench import worker
from recycle_ext.bench.__main__ import main
from recycle_ext.bench.contenders import Contender, Job, Request, growth, jobs
from recycle_ext.bench.peers import LlamaCpp, open_system
from recycle_ext.bench.plot import plot
from recycle_ext.bench.report import limit_fraction, summary
from recycle_ext.bench.same_width import matrix_bytes, write_same_width
from recycle_ext.bench.story import part
from recycle_ext.bench.systems import Ours
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.gguf import GgufHeader
from recycle_ext.measuring.interleave import Entry, race, rounds

SMALL = ["--new-tokens", "6", "--prompt-tokens", "20", "--context", "5", "--repeats", "2"]
RESULT_KEYS = {
    "system",
    "mode",
    "drafts",
    "width",
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
    """A tiny base with a tokenizer of single bytes; its module is in ``module`` beside it."""
    folder = tmp_path_factory.mktemp("bench") / "base"
    base = write_base(folder, vocab_size=write_byte_tokenizer(folder))
    write_module(folder.parent / "module", base, like_base=True)
    return folder


def request(**changes) -> Request:
    values = {
        "dtypes": ["bf16"],
        "modes": ["standard", "verify", "alternate"],
        "drafts": 1,
        "threads": [1],
        "batches": [1],
        "context": 5,
        "new_tokens": 6,
        "prompt_tokens": 20,
        "peers": [],
    }
    return Request(**(values | changes))


def jobs_of(model: Path, notes: list[str] | None = None, **changes) -> list[Job]:
    checkpoint = open_checkpoint(model)
    note = [].append if notes is None else notes.append
    return jobs(request(**changes), checkpoint, model.parent / "module", model.parent, note)


# ---- The whole command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(model) -> tuple[subprocess.CompletedProcess, dict]:
    """All modes, one sequence and two, with phases; and what --json wrote of it."""
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


def test_the_json_has_everything(whole_run):
    _, report = whole_run
    results = report["results"]
    assert set(report["machine"]) >= {"cpu", "cores", "isa", "torch", "date"}
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
        assert result["tokens_per_second"] == pytest.approx(sum(result["repeats"]) / 2)
        has_drafts = result["mode"] != "standard"
        assert (result["acceptance_rate"] is not None) == has_drafts
        assert (result["limit_fraction"] is not None) == has_drafts
        assert (result["step_bytes"] > result["standard_step_bytes"]) == has_drafts


def test_phases_add_up_to_the_step(whole_run):
    _, report = whole_run
    for result in report["results"]:
        parts = {(row["part"], row["phase"]) for row in result["phases"]}
        assert {("base", "qkv"), ("base", "head"), ("", "call")} <= parts
        assert ("module" in {part for part, _ in parts}) == (result["mode"] != "standard")
        assert sum(row["share"] for row in result["phases"]) == pytest.approx(1, abs=0.05)


def test_the_tables_are_markdown(whole_run):
    done, _ = whole_run
    lines = done.stdout.splitlines()
    tables = [index for index, line in enumerate(lines) if set(line) == set("|-: ")]
    assert len(tables) == 1 + 6  # the results, and the phases of each
    assert [lines[tables[0] + i].split("|")[2].strip() for i in range(1, 7)] == [
        "standard",
        "verify",
        "alternate",
    ] * 2
    assert "tokens/s" in lines[tables[0] - 1]
    assert "base: 6 tokens after 5, a prompt of 20, medians of 2" in done.stdout
    assert "Phases of alternate q8, threads 1, batch 2:" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_plot_is_drawn(whole_run, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` brings it")
    _, report = whole_run
    plot(report, "title", str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_beside_ours(model, tmp_path, capsys):
    pytest.importorskip("transformers", reason="the extra `test` brings it")
    out = tmp_path / "out.json"
    options = ["--module", "none", "--modes", "standard", "--dtypes", "bf16", "--batch", "2"]
    options += ["--peers", "transformers", "--threads", "1", "--json", str(out)]
    assert main(["--model", str(model), *options, *SMALL]) == 0, capsys.readouterr().err
    ours, theirs = json.loads(out.read_text())["results"]
    assert (ours["system"], theirs["system"]) == ("recycle_ext", "transformers")
    assert theirs["tokens_per_second"] > 0
    assert theirs["prefill_tokens_per_second"] > 0
    # The same matrices in the same width; ours has the vectors and what alignment adds, too.
    assert theirs["step_bytes"] <= ours["step_bytes"] < 1.1 * theirs["step_bytes"]


def test_torch_compile_writes_what_transformers_writes(model):
    pytest.importorskip("transformers", reason="the extra `test` brings it")
    prompt = list(range(5, 25))
    written = {}
    for system in ("transformers", "torch.compile"):
        contender = Contender(system, "standard", "bf16", 1, 1, 0)
        peer = open_system(Job(contender, str(model), None, prompt, [prompt], 6, 1))
        tokens = []

        def note(logits, tokens=tokens):
            tokens.append(int(logits[0, -1].argmax()))
            return logits

        peer._model.lm_head.register_forward_hook(lambda _, __, logits: note(logits))
        assert peer.decode(6).tokens == 6
        written[system] = tokens
    assert len(written["transformers"]) == 7
    assert written["torch.compile"] == written["transformers"]


# ---- What one measurement counts -----------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_of_all_sequences_count(model, batch):
    standard, verify, alternate = (Ours(job) for job in jobs_of(model, batches=[batch]))
    decoded = standard.decode(6)
    assert (decoded.steps, decoded.tokens) == (6, 6 * batch)
    assert decoded.acceptance_rate is None
    decoded = alternate.decode(6)
    assert (decoded.steps, decoded.tokens) == (3, 6 * batch)
    assert decoded.acceptance_rate == 1
    decoded = verify.decode(6)
    assert 6 * batch <= decoded.tokens < 6 * batch + 2 * batch
    assert decoded.tokens == round(decoded.steps * batch * (1 + decoded.acceptance_rate))


def test_cache_bytes_are_those_of_the_positions_read(model):
    standard, _, alternate = jobs_of(model, batches=[2])
    assert [len(ids) for ids in standard.sequences] == [5, 6]
    position = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, head_dim, bytes
    positions = (5 + 3) + (6 + 3)  # in the middle of six steps
    assert standard.cache_values * 2 == position
    assert Ours(standard).decode(6).cache_bytes == positions * position
    assert Ours(alternate).decode(6).cache_bytes == positions * position * 1.5  # its one layer too
    in_8_bits = dataclasses.replace(standard, cache_dtype="q8")
    # A head's 16 values in a byte each, and a scale of four.
    assert Ours(in_8_bits).decode(6).cache_bytes == positions * position * 20 / 32


def test_a_step_may_fill_the_capacity_to_the_last_position(model):
    """Four drafts that always count are the fastest that a sequence may grow."""
    for batch in (1, 3):
        (job,) = jobs_of(model, modes=["alternate"], drafts=4, batches=[batch])
        decoded = Ours(job).decode(6)
        assert decoded.tokens == batch * growth(6, batch, 4) or batch > 1
        assert decoded.tokens >= 6 * batch


def test_auto_is_for_verify_and_what_its_steps_read_is_counted(model):
    jobs = jobs_of(model, drafts="auto")
    assert [job.contender.drafts for job in jobs] == [0, "auto", 1]
    system = Ours(jobs[1])
    decoded = system.decode(60)
    module_bytes = system._model.packed.module_bytes
    drafts = (decoded.step_bytes - system.standard_step_bytes) / module_bytes  # on average
    assert 0 < drafts <= 4
    accepted = decoded.acceptance_rate * drafts * decoded.steps
    assert decoded.tokens == round(decoded.steps + accepted)


def test_sequences_differ_and_go_around_the_story(model):
    (job,) = jobs_of(model, modes=["standard"], batches=[3])
    assert [len(ids) for ids in job.sequences] == [5, 6, 7]
    assert len({tuple(ids[:5]) for ids in job.sequences}) == 3
    assert job.prompt[:5] == job.sequences[0]
    assert part([1, 2, 3], 2, 5) == [3, 1, 2, 3, 1]


def test_a_job_survives_json(model):
    for job in jobs_of(model):
        assert Job.from_dict(json.loads(json.dumps(job.as_dict()))) == job


# ---- Order, medians, deaths: with workers that only pretend ----------------------------------------------

PRETENDER = """
import json, os, signal, sys, time
log = open(sys.argv[1], "a")
mode = json.loads(sys.stdin.readline())["contender"]["mode"]
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
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Makes the workers pretenders; returns a function that reads the order in which they were asked."""

    def install(*deeds: str):
        log = tmp_path / "log"
        command = [sys.executable, "-c", PRETENDER, str(log), *deeds]
        monkeypatch.setattr(worker, "COMMAND", command)
        return lambda: [mode[0] for mode in log.read_text().split()]

    return install


def test_rounds_alternate():
    assert ["".join(order) for order in rounds("ABC", 3)] == ["ABC", "CBA", "ABC"]


def test_the_race_alternates(model, pretend):
    order = pretend()
    entries = [Entry(job) for job in jobs_of(model)]
    assert race(entries, 3, phases=False)
    assert order() == ["s", "v", "a", "a", "v", "s", "s", "v", "a"]
    assert [len(entry.measurements) for entry in entries] == [3, 3, 3]


@pytest.mark.parametrize(
    ("deed", "reason"), [("fall", "out of luck"), ("shot", "ended by signal 9: no reason given")]
)
def test_a_worker_that_dies_is_left_out(model, pretend, capsys, deed, reason):
    order = pretend(f"verify:{deed}")
    assert main(["--model", str(model), "--module", str(model.parent / "module"), *SMALL]) == 0
    out, error = capsys.readouterr()
    for width in ("bf16", "q8", "q4"):
        assert f"recycle_ext verify {width}, " in error
    assert error.count(f"is left out: {reason}\n") == 3
    assert "| recycle_ext | standard  | bf16 " in out
    assert "| verify" not in out
    assert order().count("v") == 3


def test_nothing_left_is_a_failure(model, pretend, capsys):
    pretend("standard:fall")
    assert main(["--model", str(model), "--modes", "standard", "--dtypes", "q8", *SMALL]) == 1
    assert capsys.readouterr().out == ""


def test_ctrl_c_shows_what_there_is(model, pretend, capsys, tmp_path):
    pretend("alternate:interrupt")
    options = ["--module", str(model.parent / "module"), "--dtypes", "q8", "--repeats", "4"]
    options += ["--json", str(tmp_path / "out.json")]
    assert main(["--model", str(model), *SMALL, *options]) == 130
    out = capsys.readouterr().out
    assert "| recycle_ext | alternate | q8 " in out
    assert "medians of 1\n" in out
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [len(result["repeats"]) for result in results] == [1, 1, 1]


def test_the_median_counts(model):
    (job,) = jobs_of(model, modes=["verify"])
    names = ["gigabytes_per_second", "read_bandwidth_gigabytes_per_second", "roofline_fraction"]
    names += ["first_token_seconds", "prefill_tokens_per_second", "acceptance_rate"]
    rates = [90.0, 10.0, 40.0]
    measurements = [
        dict.fromkeys(names, rate / 100) | {"tokens_per_second": rate, "peak_memory_bytes": 7 + i}
        for i, rate in enumerate(rates)
    ]
    result = summary(Entry(job, measurements=measurements))
    assert result["tokens_per_second"] == 40
    assert all(result[name] == 0.4 for name in names)
    assert result["repeats"] == rates
    assert result["peak_memory_bytes"] == 7  # later ones have seen the probe's buffer


def test_the_limit_is_that_of_the_bytes():
    def result(mode, rate, acceptance, drafts=1, threads=2):
        values = {"system": "recycle_ext", "width": "q8", "threads": threads, "batch": 1}
        values |= {"mode": mode, "tokens_per_second": rate, "acceptance_rate": acceptance}
        return values | {
            "drafts": drafts,
            "standard_step_bytes": 100,
            "step_bytes": 100 + 25 * drafts,
        }

    standard = result("standard", 50.0, None, drafts=0)
    # Two tokens for 1.25 times the bytes: 1.6 times the rate, 80 tokens a second.
    assert limit_fraction(result("alternate", 60.0, 1.0), [standard]) == pytest.approx(60 / 80)
    assert limit_fraction(result("verify", 45.0, 0.5), [standard]) == pytest.approx(45 / 60)
    assert limit_fraction(result("alternate", 75.0, 1.0, 2), [standard]) == pytest.approx(75 / 100)
    assert limit_fraction(standard, [standard]) is None
    auto = result("verify", 45.0, 0.5) | {"drafts": "auto"}
    assert limit_fraction(auto, [standard]) is None
    assert limit_fraction(result("verify", 45.0, 0.5, threads=1), [standard]) is None


# ---- Peers -------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_is_left_out(model, monkeypatch):
    for package in ("llama_cpp", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    notes = []
    found = jobs_of(model, notes, peers=["transformers", "llama.cpp"])
    assert [job.contender.system for job in found] == ["recycle_ext"] * 3
    assert len(notes) == 2
    assert "transformers is left out: it is not installed; `pip install transformers" in notes[0]
    assert "llama.cpp is left out: it is not installed; `pip install llama-cpp-python`" in notes[1]


def test_peers_that_do_not_fit_the_model_are_left_out(model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    notes = []
    jobs_of(model, notes, peers=["llama.cpp", "transformers"], dtypes=["q8"])
    assert "llama.cpp is left out: it needs a GGUF file" in notes[0]
    assert "transformers is left out: it runs in bf16" in notes[1]


def write_gguf(file: Path, kind: str) -> dict[str, np.ndarray]:
    """Matrices of a kind and a vector, without the sizes that a model has; returns their values."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ü"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    generator = np.random.default_rng(0)
    values = {}
    for name, shape in {
        "token_embd.weight": (48, 64),
        "blk.0.attn_q.weight": (32, 64),
        "blk.0.ffn_down.weight": (16, 80),  # no whole blocks
        "output_norm.weight": (64,),
    }.items():
        array = generator.standard_normal(shape, dtype=np.float32)
        blocks = len(shape) == 2 and shape[1] % 32 == 0
        type_ = gguf.GGMLQuantizationType[kind if blocks else "F32"]
        data = gguf.quants.quantize(array, type_)
        values[name] = gguf.quants.dequantize(data, type_)
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize(
    ("width", "types"),
    [
        ("bf16", "F16 F16 F16"),
        ("q8", "Q8_0 Q8_0 F16"),
        ("q4", "Q8_0 Q4_0 F16"),
        ("f32", "F32 F32 F32"),
    ],
)
def test_a_gguf_file_in_another_width(tmp_path, width, types):
    values = write_gguf(tmp_path / "model.gguf", "F16")
    (tmp_path / "scratch").mkdir()
    file = write_same_width(tmp_path / "model.gguf", width, tmp_path / "scratch", print)
    reader = gguf.GGUFReader(file)
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "ü"]
    assert reader.fields["tokenizer.ggml.scores"].contents() == [0.5, 1.5, 2.5]
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert [tensor.name for tensor in reader.tensors] == list(values)
    for tensor, kind in zip(reader.tensors, [*types.split(), "F32"], strict=True):
        assert tensor.tensor_type.name == kind
        there = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        error = 0.3 if kind == "Q4_0" else 0.02
        assert np.abs(there - values[tensor.name]).max() < error


def test_a_gguf_file_that_has_the_width_is_taken_as_it_is(tmp_path):
    for kind, width in (("Q4_1", "q4"), ("Q4_0", "native"), ("Q8_0", "native")):
        file = tmp_path / f"{kind}.gguf"
        write_gguf(file, kind)
        assert write_same_width(file, width, tmp_path, print) == str(file)


def test_the_bytes_of_a_gguf_file_are_those_of_its_matrices(tmp_path):
    write_gguf(tmp_path / "model.gguf", "Q8_0")
    size, types = matrix_bytes(GgufHeader(tmp_path / "model.gguf"))
    assert size == (48 + 32) * 64 // 32 * 34 + 16 * 80 * 4
    assert types == "q8_0, f32"


def test_llama_cpp_reads_and_decodes(default_model):
    pytest.importorskip("llama_cpp", reason="the extra `bench` brings it")
    (job,) = (
        job
        for job in jobs(
            request(dtypes=["native"], modes=["standard"], threads=[1], peers=["llama.cpp"]),
            open_checkpoint(default_model),
            None,
            default_model.parent,
            print,
        )
        if job.contender.system == "llama.cpp"
    )
    system = open_system(job)
    assert isinstance(system, LlamaCpp)
    assert system.prefill(job.prompt) > 0
    decoded = system.decode(4)
    assert (decoded.steps, decoded.tokens) == (4, 4)
    assert 0.9 * default_model.stat().st_size < system.step_bytes < default_model.stat().st_size


# ---- The user's mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--module", "nowhere"], "nowhere: no such directory"),
        (["--module", "none", "--modes", "verify"], "--modes is verify, which needs a module"),
        (["--modes", "fast"], "--modes has 'fast'; it must be of standard, verify, alternate"),
        (["--modes", ","], "--modes is empty"),
        (["--dtypes", "q8,q5"], "--dtypes has 'q5'; it must be of native, f32, bf16, q8, q4"),
        (
            ["--peers", "vllm"],
            "--peers has 'vllm'; it must be of transformers, torch.compile, llama.cpp",
        ),
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
def test_a_users_mistake_is_one_line(model, pretend, capsys, arguments, message):
    pretend()
    assert main(["--model", str(model), *SMALL, *arguments]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert out == ""


def test_a_missing_matplotlib_is_one_line(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--model", str(model), "--plot", "bars.png"]) == 2
    error = capsys.readouterr().err
    assert error == "error: --plot needs matplotlib: `pip install matplotlib`\n"


def test_without_a_module_only_standard_is_measured(model, pretend, capsys):
    order = pretend()
    assert main(["--model", str(model), "--dtypes", "q8", *SMALL]) == 0
    assert "verify and alternate are left out: there is no module" in capsys.readouterr().err
    assert set(order()) == {"s"}
