"""python -m recycle_ext.train.draft_vocab: the size with the most tokens a second is saved."""

from __future__ import annotations

import json

import pytest
import torch
from train_model import SMALL, train_joint, write_text

from recycle_ext.train import __main__ as command
from recycle_ext.train import draft_vocab
from recycle_ext.train.draft_vocab import Candidate, frequent_tokens


def test_draft_vocab_has_the_most_frequent_tokens():
    tokens = torch.tensor([[3, 3, 3, 9, 9, 1]])
    ids, coverage = frequent_tokens(tokens, 2, 10)
    assert ids.tolist() == [3, 9]
    assert coverage == pytest.approx(5 / 6)


def test_candidate_counts_decode_steps_without_the_prefill():
    class TwoSteps:
        def decode(self, prompt, new_tokens, end_tokens):
            from recycle_ext.decoding.step import SequenceStep

            yield SequenceStep([5], 0, 0, 100.0)
            yield SequenceStep([6, 7], 1, 1, 0.25)
            yield SequenceStep([8], 1, 0, 0.25)

    candidate = Candidate(torch.arange(3), 1.0, 0, TwoSteps())
    candidate.decode([1, 2], 4, ())
    assert (candidate.drafted, candidate.accepted, candidate.tokens) == (2, 1, 3)
    assert candidate.tokens_per_second == 6


def test_fastest_draft_vocab_is_saved(tmp_path, capsys):
    assert train_joint(tmp_path, tmp_path / "out", "--steps", "40") == 0
    base = str(tmp_path / "out" / "base")
    output = str(tmp_path / "attached")
    text = str(write_text(tmp_path))
    arguments = ["--base", base, "--text", text, "--output", output, *SMALL]
    assert command.main([*arguments, "--steps", "10", "--draft-vocab", "32"]) == 0
    common = ["--base", base, "--held-out", "0.1", "--prompts", "4"]
    assert draft_vocab.main([output, *common, "--sizes", "16,64"]) == 0
    printed = capsys.readouterr().out
    rates = {
        int(row.split("|")[1]): float(row.split("|")[5])
        for row in printed.splitlines()
        if row.startswith("| 16 ") or row.startswith("| 64 ")
    }
    assert rates.keys() == {16, 64}
    saved = json.loads((tmp_path / "attached" / "config.json").read_text())["draft_vocab_size"]
    assert rates[saved] == max(rates.values())
    assert draft_vocab.main([output, *common, "--sizes", "300"]) == 2
    assert "--sizes has 300; the base's vocabulary has 280" in capsys.readouterr().err
    assert draft_vocab.main([base, *common]) == 2
