"""python -m recycle_ext.bench --rows: what a further row of a step costs."""

from __future__ import annotations

import json

import pytest
from bench_model import SMALL, jobs_of, write_model

from recycle_ext.bench.__main__ import main
from recycle_ext.bench.rows import price, row_table
from recycle_ext.bench.systems import Ours


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("rows") / "base")


def test_rows_are_timed_and_compared_with_one_row(model, capsys, tmp_path):
    out = tmp_path / "rows.json"
    options = ["--module", "none", "--dtypes", "q8", "--threads", "1", "--rows", "1,2,5", "--json", str(out)]
    assert main(["--model", str(model), *options, *SMALL]) == 0
    results = json.loads(out.read_text())["rows"]
    assert [result["rows"] for result in results] == [1, 2, 5]
    assert all(len(result["repeats"]) == 2 and min(result["repeats"]) > 0 for result in results)
    assert results[0]["price"] is None
    for result in results[1:]:
        assert result["price_range"][0] <= result["price"] <= result["price_range"][1]
    assert capsys.readouterr().out.count("| recycle_ext") == 3


def test_steps_of_some_rows_advance_as_many_sequences(model, monkeypatch):
    (job,) = jobs_of(model, modes=["standard"], sequences=3)
    assert len(job.sequences) == 3
    system, batches = Ours(job), []
    made = system._decoder
    monkeypatch.setattr(
        system, "_decoder", lambda batch, capacity: batches.append(made(batch, capacity)) or batches[-1]
    )
    assert system.step_seconds(2, 4) > 0
    lengths = batches[0].lengths[0].tolist()
    assert lengths == [len(ids) + 5 for ids in job.sequences[:2]]  # 4 steps and one that is not timed


def test_price_of_a_row_is_relative_to_one_row_of_the_same_repeat():
    seconds = {1: [1.0, 2.0, 1.0], 3: [1.5, 2.0, 2.0]}
    assert price(seconds, 3) == (0.25, 0.0, 0.5)
    assert price(seconds, 1) is None
    assert price({3: [1.0]}, 3) is None


def test_price_whose_sign_the_repeats_do_not_agree_on_is_none_seen():
    result = {
        "system": "recycle_ext",
        "dtype": "q8",
        "formats": "q8_0",
        "threads": 2,
        "rows": 2,
        "seconds": 0.01,
        "price": 0.02,
        "price_range": [-0.01, 0.05],
        "repeats": [0.01, 0.011],
    }
    assert "none seen (-0.01 to 0.05)" in row_table([result])
    assert "0.02 (0.01 to 0.05)" in row_table([result | {"price_range": [0.01, 0.05]}])


def test_rows_without_one_row_are_refused(model, capsys):
    assert main(["--model", str(model), "--module", "none", "--rows", "2,3", *SMALL]) == 2
    assert "--rows is 2,3; it must have 1" in capsys.readouterr().err
