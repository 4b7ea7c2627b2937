"""The prompts that the modes run on: those of this package, or the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recycle_ext.checkpoint.json_file import read_text
from recycle_ext.errors import RecycleError
from recycle_ext.eval.jsonl import read_objects
from recycle_ext.text.tokenizer import Tokenizer

# Eight prompts per category, written for this file. The file shares no prompt with the training prompts
# (recycle_ext/train/prompts.txt), so that acceptance is measured on unseen text.
SHIPPED = Path(__file__).parent / "prompts.jsonl"
_UNNAMED = "prompts"  # the category of prompts that come without one


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a request to answer.

    chat: the text is a user's message for the model's chat template. where: the place of the prompt, for error messages.
    """

    text: str
    category: str = _UNNAMED
    chat: bool = False
    where: str = "PROMPT"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise RecycleError(f"{self.where}: the prompt is empty")

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids. Without a chat template in the model, a request becomes plain text."""
        if self.chat and tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": self.text}]
            return tokenizer.encode(tokenizer.apply_chat_template(messages), add_bos=False)
        return tokenizer.encode(self.text)


def read_prompts(file: Path, chat: bool = False) -> list[Prompt]:
    """Reads a .jsonl file of {"prompt": text, "category": text, "chat": true or false}, the last two keys optional;
    any other file has one prompt per line, and empty lines are skipped.

    chat: for prompts without the key. Raises RecycleError for another content.
    """
    if file.suffix == ".jsonl":
        prompts = []
        kinds = {"prompt": str, "category": str, "chat": bool}
        for where, values in read_objects(file, kinds):
            if "prompt" not in values:
                raise RecycleError(f"{where}: there is no prompt")
            category = values.get("category", _UNNAMED)
            prompts.append(Prompt(values["prompt"], category, values.get("chat", chat), where))
    else:
        prompts = [
            Prompt(line, chat=chat, where=f"{file}:{number}")
            for number, line in enumerate(read_text(file).splitlines(), 1)
            if line.strip()
        ]
    if not prompts:
        raise RecycleError(f"{file}: holds no prompts")
    return prompts


def categories(prompts: Sequence[Prompt]) -> list[str]:
    """The names of the categories, in the order of their first prompts."""
    return list(dict.fromkeys(prompt.category for prompt in prompts))


def first_of_each(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first ``count`` prompts of each category."""
    return [
        prompt for category in categories(prompts) for prompt in [p for p in prompts if p.category == category][:count]
    ]
