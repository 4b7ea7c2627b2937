"""The tokens that end a text: one rule for Hugging Face directories and for GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Iterable

# Texts of tokens that end a turn, a message or a document, in one family of models or another. They are those that
# llama.cpp ends at (src/llama-vocab.cpp).
MESSAGE_ENDS = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<\uff5cend▁of▁sentence\uff5c>"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
    *("<end_of_turn>", "<turn|>", "<|tool_response>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[e~["),
)
# And of those that end a completion of code, or start the next file of a repository, by GGUF's names of their roles.
CODE_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
END_TEXTS = (*MESSAGE_ENDS, *(text for texts in CODE_ENDS.values() for text in texts))
# Texts that are no ends where the vocabulary has one text of each group, as in llama.cpp: the model goes on after a
# message's <|end|> there, or writes </s> (struck text) as plain text.
_NO_ENDS = {"<|end|>": (("<|call|>", "<|calls|>"), ("<|return|>", "<|flush|>")), "</s>": (("<|tool_response>",),)}


def end_tokens(named: Iterable[int | None], token_id: Callable[[str], int | None], vocab_size: int) -> tuple[int, ...]:
    """Every token that a text can end with, each once: the named ones first, in their order.

    The files of a model often disagree: a config keeps the end of the model that was fine-tuned, the tokenizer names
    the end of a turn. The union is right, because no model writes one of these tokens in the middle of an answer.

    named: ids that the model's files call ends; None and ids outside the vocabulary are left out. token_id: the id of
    a text that is one token of the vocabulary, else None.
    """
    ids = {text: token_id(text) for text in END_TEXTS}
    for text in no_ends(lambda other: ids[other] is not None):
        del ids[text]
    union = dict.fromkeys([*named, *ids.values()])
    return tuple(i for i in union if i is not None and 0 <= i < vocab_size)


def no_ends(has: Callable[[str], bool]) -> list[str]:
    """Those of END_TEXTS that are no ends in a vocabulary. has: whether a text is one token of the vocabulary."""
    return [text for text, groups in _NO_ENDS.items() if all(any(map(has, group)) for group in groups)]
