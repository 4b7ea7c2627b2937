"""Training for several draft tokens sees what decoding them sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import reference_base, reference_module, write_base, write_module

from recycle_ext.reference.model import KvCache
from recycle_ext.train.chain import chain, count_accepted


@pytest.mark.parametrize("n_layers", [1, 2])
def test_chain_at_once_equals_module_step_by_step(tmp_path, n_layers):
    base = write_base(tmp_path / "base")
    module = reference_module(write_module(tmp_path / "module", base, n_layers=n_layers))
    model = reference_base(base)
    tokens = torch.randint(0, 101, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(tokens)[:, :-1]
        embedding = F.embedding(tokens[:, 1:], model.model.embed_tokens.weight)
        at_once = list(chain(module, embedding, hidden, 4))
        for row in range(10):  # the last true row of a step
            cache = KvCache()
            states, normed = module(embedding[:, : row + 1], hidden[:, : row + 1], cache)
            for draft in range(4):
                p = row + draft
                if p >= 10:
                    break
                if draft > 0:
                    states, normed = module(embedding[:, p : p + 1], states[:, -1:], cache)
                assert at_once[draft].first <= p
                torch.testing.assert_close(at_once[draft].states[:, p], normed[:, -1])


def test_draft_token_after_a_rejected_one_is_not_counted():
    # One sequence of five rows; the base's tokens and the text differ at row 3 alone.
    base_tokens = torch.tensor([[1, 2, 3, 4, 5]])
    text_tokens = torch.tensor([[1, 2, 3, 9, 5]])
    first = torch.tensor([[1, 2, 0, 4, 5]])  # accepted at rows 0, 1, 3, 4
    second = torch.tensor([[0, 2, 0, 4, 5]])
    # A second draft token at row p follows a first one at row p - 1. Rows 0 and 1 are accepted and equal the text, so
    # rows 1 and 2 are verified. Row 3 is accepted, but the text differs there, and row 4 is the last.
    accepted, verified = count_accepted([first, second], base_tokens, text_tokens)
    assert (accepted[0], verified[0]) == (4, 5)
    assert (accepted[1], verified[1]) == (1, 2)  # accepted at row 1, rejected at row 2
