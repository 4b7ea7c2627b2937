"""The log of a training run: its file, its line on the screen, and what its plot draws."""

from __future__ import annotations

import json

import pytest

from recycle_ext.train.log import Log, screen_line

ROWS = [
    {
        "step": step,
        "loss": 6.0 - step / 100,
        "held_out_loss": 6.5 - step / 200,
        "acceptance_1": 0.4 + step / 1000,
        "acceptance_2": 0.2 + step / 1000,
        "learning_rate": 1e-3,
        "tokens_per_second": 1000.0 + step,
    }
    for step in (20, 40, 60)
]


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path, 0)
    for row in ROWS:
        log.add(row)
    return log


def test_log_file_has_one_json_line_for_each_row(log):
    assert [json.loads(line) for line in log.file.read_text().splitlines()] == ROWS


@pytest.mark.parametrize("broken", ['{"step": 80, "lo', "[1]", '{"steps": 80}'])
def test_log_of_resumed_run_drops_later_and_broken_rows(log, tmp_path, broken):
    with log.file.open("a") as stream:
        stream.write(broken)
    resumed = Log(tmp_path, 40)
    assert resumed.rows == ROWS[:2]
    assert [json.loads(line) for line in log.file.read_text().splitlines()] == ROWS[:2]


def test_screen_line_has_losses_acceptance_and_speed():
    assert screen_line(ROWS[0]) == ("step 20: loss 5.8000, held out loss 6.4000, acceptance 0.420 0.220, 1020 tokens/s")


def test_plot_draws_every_loss_and_acceptance_of_the_log(log):
    pytest.importorskip("matplotlib", reason="the extra `train` brings it")
    left, right = log.figure().axes
    drawn = {
        title: {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}
        for axes, title in ((left, "loss, nats a token"), (right, "held-out acceptance"))
        if axes.get_title() == title and axes.get_xlabel() == "step"
    }
    expected = {
        title: {name.replace("_", " "): [(row["step"], row[name]) for row in ROWS] for name in names}
        for title, names in (
            ("loss, nats a token", ("loss", "held_out_loss")),
            ("held-out acceptance", ("acceptance_1", "acceptance_2")),
        )
    }
    assert drawn == expected
    for axes in (left, right):
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend == [line.get_label() for line in axes.get_lines()]
    assert right.get_ylim()[0] == 0


def test_plot_file_shows_the_curves(log):
    """Each curve's color is in its half of the picture."""
    matplotlib = pytest.importorskip("matplotlib", reason="the extra `train` brings it")
    from matplotlib.image import imread

    picture = imread(log.plot())[:, :, :3]
    height, width = picture.shape[:2]
    assert (width, height) == (1080, 420)
    for color in ("C0", "C1"):
        is_color = abs(picture - matplotlib.colors.to_rgb(color)).max(-1) < 0.02
        for half in (is_color[:, : width // 2], is_color[:, width // 2 :]):
            assert half.sum() > 100


def test_plot_without_matplotlib_is_none(log, monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(log, "figure", missing)
    assert log.plot() is None
