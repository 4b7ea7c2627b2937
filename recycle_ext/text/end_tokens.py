"""The tokens that end a text: one rule for Hugging Face directories and for GGUF files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable

# Texts of tokens that end a turn, a message or a document, in one family of models or another: those that llama.cpp
# ends at (src/llama-vocab.cpp).
TURN_ENDS = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<\uff5cend▁of▁sentence\uff5c>"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
    *("<end_of_turn>", "<turn|>", "<|tool_response>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[e~["),
)
# The same for completions of code, by the role that a GGUF file has for the token.
CODE_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
END_TEXTS = (*TURN_ENDS, *itertools.chain.from_iterable(CODE_ENDS.values()))
# Texts that are no ends where the vocabulary has one text of each group, as in llama.cpp: the model goes on after a
# message's <|end|> there, or writes </s> (struck text) as plain text.
_NO_ENDS = {"<|end|>": (("<|call|>", "<|calls|>"), ("<|return|>", "<|flush|>")), "</s>": (("<|tool_response>",),)}


def no_ends(texts: Container[str]) -> set[str]:
    """Those of END_TEXTS that end nothing in a vocabulary of ``texts``."""
    return {
        text for text, groups in _NO_ENDS.items() if all(any(other in texts for other in group) for group in groups)
    }


def end_tokens(named: Iterable[int | None], token_id: Callable[[str], int | None], vocab_size: int) -> tuple[int, ...]:
    """Every token that a text can end with, each once: the named ones first, in their order.

    The files of a model often disagree: a config keeps the end of the model that was fine-tuned, the tokenizer names
    the end of a turn. The union is right, because no model writes one of these tokens in the middle of an answer.

    named: ids that the model's files call ends; None and ids outside the vocabulary are left out. token_id: the id of
    a text that is one token of the vocabulary, else None.
    """
    ids = {text: found for text in END_TEXTS if (found := token_id(text)) is not None}
    for text in no_ends(ids):
        ids.pop(text, None)
    union = dict.fromkeys([*named, *ids.values()])
    return tuple(i for i in union if i is not None and 0 <= i < vocab_size)
