"""Training for several drafts sees what decoding them does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import reference_base, reference_module, write_base, write_module

from recycle_ext.reference.model import KvCache
from recycle_ext.train.chain import acceptance_by_draft, chain


@pytest.mark.parametrize("n_layers", [1, 2])
def test_every_draft_is_what_the_module_gives_step_by_step(tmp_path, n_layers):
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


def test_a_draft_counts_only_after_those_before_it():
    # One sequence of five rows; the base's choices and the text agree but at row 3.
    wanted = torch.tensor([[1, 2, 3, 4, 5]])
    text = torch.tensor([[1, 2, 3, 9, 5]])
    first = torch.tensor([[1, 2, 0, 4, 5]])  # right at rows 0, 1, 3, 4
    second = torch.tensor([[0, 2, 0, 4, 5]])
    # The second draft follows a first one at the row before: of rows 0 and 1, right and as the text
    # goes on; row 3's was right, but the text said something else; row 4 has no row after it.
    accepted, seen = acceptance_by_draft([first, second], wanted, text)
    assert (accepted[0], seen[0]) == (4, 5)
    assert (accepted[1], seen[1]) == (1, 2)  # at row 1 right, at row 2 wrong
