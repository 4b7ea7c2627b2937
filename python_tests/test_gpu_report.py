"""The parts of python -m recycle_ext.bench --device cuda that run without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch
from models import reference_base, write_base

from recycle_ext.bench import gpu_report
from recycle_ext.bench.__main__ import main
from recycle_ext.bench.gpu_report import GpuRunner, bars, figures, heading, table
from recycle_ext.bench.plain_torch import StaticDecoder
from recycle_ext.bench.plot import draw, plot
from recycle_ext.bench.random_model import SHAPES, random_model
from recycle_ext.checkpoint.shapes import base_shapes, module_shapes
from recycle_ext.decoding.cuda_graph import GraphedStep
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.weights.pack import pack_model


@pytest.mark.parametrize("dtype", ["bf16", "q8", "q4"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_random_models_decode_in_every_dtype(shape, dtype):
    """Fewer layers and a smaller vocabulary than in the report, so that the test takes seconds."""
    base = dataclasses.replace(shape.base, n_layers=2, vocab_size=9000)
    for module in shape.modules.values():
        module = dataclasses.replace(module, n_layers=1, vocab_size=9000)
        packed = random_model(base, module, dtype, torch.device("cpu"))
        decoder = Decoder(packed, "alternate", capacity=40)
        decoder.prefill([1, 2, 3])
        assert decoder.step()[1].tolist() == [2]


def test_paper_shape_has_the_sizes_of_the_paper():
    """1.3 billion parameters, and a module of 6 layers with 15% as many."""
    paper = SHAPES[0]
    base = sum(map(math.prod, base_shapes(paper.base).values()))
    module = sum(map(math.prod, module_shapes(paper.modules["module +15%"]).values()))
    assert base == pytest.approx(1.3e9, rel=0.02)
    assert module / base == pytest.approx(0.15, abs=0.005)


def test_pytorch_peer_gives_the_token_of_the_reference(tmp_path):
    base = write_base(tmp_path)
    plain = StaticDecoder(base.config, 32, torch.device("cpu"))
    reference = reference_base(base, torch.bfloat16)
    plain.base.load_state_dict(reference.state_dict())
    tokens = [5, 17, 3, 99]
    for position, token in enumerate(tokens):
        given = plain(torch.tensor([token]), torch.tensor([position]))
    expected = reference.logits(reference(torch.tensor([tokens])))[0, -1].argmax()
    assert int(given) == int(expected)


def runners() -> list[GpuRunner]:
    common = ("Tiny", "recycle_ext")
    prefill = 1000.0
    return [
        GpuRunner(*common, "standard", "bf16", None, 1.0, 100, 100, [2e-3, 1e-3, 3e-3], prefill),
        GpuRunner(*common, "verify", "bf16", None, None, 125, 100, [2.4e-3], prefill),
        GpuRunner(*common, "alternate", "bf16", None, 2.0, 125, 100, [2.5e-3], prefill),
        GpuRunner("Tiny", "torch.compile", "standard", "bf16", None, 1.0, 100, 100, [5e-3]),
    ]


def test_table_shows_the_speed_up_and_its_limit():
    results = [figures(runner, 1e5) for runner in runners()]
    assert [r["step_microseconds"] for r in results] == pytest.approx([2000, 2400, 2500, 5000])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(results).splitlines()[2:]]
    ours = ["Tiny", "recycle_ext"]
    assert rows[0] == [*ours, "standard", "bf16", "2000", "500", "0", "50%", "", "", "1000"]
    assert rows[1] == [*ours, "verify", "bf16", "2400", "", "0", "52%", "", "", "1000"]
    # Two steps of standard in the time of one and a quarter, where the bytes would allow 1.6.
    assert rows[2] == ([*ours, "alternate", "bf16", "2500", "800", "0", "50%", "1.60x", "100%", "1000"])
    peer = ["Tiny", "torch.compile", "standard", "bf16", "5000", "200", "0", "20%", "", "", ""]
    assert rows[3] == peer


def test_plot_shows_the_rates_in_bf16_by_shape(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the extra `bench`")
    results = [figures(runner, 1e5) for runner in runners()]
    report = {
        "machine": {"gpu": "G", "driver": "1", "torch": "2", "cuda": "13", "date": "today"},
        "checks": {"tests": "passed"},
    }
    (axes,) = draw(bars(results), heading(report), group="shape").axes
    heights = [bar.get_height() for series in axes.containers for bar in series]
    assert heights == pytest.approx([500, 800, 200])  # verify depends on the module
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["Tiny"]
    assert [line.get_ydata()[0] for line in axes.lines] == pytest.approx([1000, 1600, 1000])
    plot(bars(results), heading(report), str(tmp_path / "gpu.png"), group="shape")
    assert (tmp_path / "gpu.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["gpu.md", "gpu.png", "memcheck.txt"])
def test_report_replaces_only_files_of_an_earlier_report(tmp_path, name):
    gpu_report.check_folder(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(RecycleError, match=rf"{name} is there already, without a gpu\.json"):
        gpu_report.check_folder(tmp_path)
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(RecycleError, match=r"gpu\.json: is there already and was not made by this command"):
        gpu_report.check_folder(tmp_path)
    (tmp_path / "gpu.json").write_text('{"machine": "", "checks": {}, "results": []}')
    gpu_report.check_folder(tmp_path)


def test_checks_go_from_what_is_simplest_to_what_is_fastest(tmp_path, monkeypatch):
    ran = []

    def logged(command, log, seconds, environment):
        off = [name for name in ("RECYCLE_CUDA_OVERLAP", "RECYCLE_CUDA_GRAPH") if environment.get(name) == "0"]
        ran.append((command[2], off, log.name))
        return "passed"

    monkeypatch.setattr(gpu_report, "_logged", logged)
    monkeypatch.setattr(gpu_report.shutil, "which", lambda *_, **__: "compute-sanitizer")
    statuses = gpu_report.run_checks(tmp_path)
    neither = ["RECYCLE_CUDA_OVERLAP", "RECYCLE_CUDA_GRAPH"]
    assert ran == [
        ("pytest", neither, "tests_without_graph_and_overlap.txt"),
        ("memcheck", neither, "memcheck.txt"),
        ("synccheck", neither, "synccheck.txt"),
        ("racecheck", neither, "racecheck.txt"),
        ("pytest", ["RECYCLE_CUDA_OVERLAP"], "tests_with_graph.txt"),
        ("pytest", [], "tests_with_graph_and_overlap.txt"),
    ]
    assert set(statuses.values()) == {"passed"}


def test_step_without_a_cuda_graph_equals_step(tmp_path, monkeypatch):
    """RECYCLE_CUDA_GRAPH=0, on the CPU: the calls of torch.cuda that remain do nothing."""
    monkeypatch.setenv("RECYCLE_CUDA_GRAPH", "0")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    packed = pack_model(write_base(tmp_path), None, "f32")
    graphed, plain = (Decoder(packed, "standard", capacity=40) for _ in range(2))
    for decoder in (graphed, plain):
        decoder.prefill([5, 17, 3])
    arguments = graphed.arguments()
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **kwargs: torch.zeros(*args, **kwargs))
    step = GraphedStep(arguments)
    for _ in range(4):
        step.replay()
        assert torch.equal(step._results[0], plain.step().tokens)
    assert torch.equal(graphed.lengths, plain.lengths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device cuda needs --report DIR"),
        (["--report", "out"], "--report needs a GPU: --device is cpu"),
        (["--device", "cuda:77", "--report", "out"], "device is 'cuda:77', but "),
        (["--device", "tpu", "--report", "out"], "device is 'tpu'; it must be"),
    ],
)
def test_impossible_device_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
