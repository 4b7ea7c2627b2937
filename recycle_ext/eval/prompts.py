"""What the modes are run on: the prompts of this package, or the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recycle_ext.errors import RecycleError
from recycle_ext.eval.jsonl import read_objects, read_text
from recycle_ext.text.tokenizer import Tokenizer

# Eight of each category, written for this file. None is among what modules are trained on
# (recycle_ext/train/prompts.txt); who adds to either keeps it so.
SHIPPED = Path(__file__).parent / "prompts.jsonl"
_UNNAMED = "prompts"  # the category of prompts that come without one


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a request to answer."""

    text: str
    category: str = _UNNAMED
    chat: bool = False  # a user's message, for the model's chat template
    where: str = "PROMPT"  # for error messages

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise RecycleError(f"{self.where}: the prompt is empty")

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids. A request to a model without a chat template is given as plain text."""
        if self.chat and tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": self.text}]
            return tokenizer.encode(tokenizer.apply_chat_template(messages), add_bos=False)
        return tokenizer.encode(self.text)


def read_prompts(file: Path, chat: bool = False) -> list[Prompt]:
    """A .jsonl file of {"prompt": text, "category": text, "chat": true or false}, the last two as you like;
    any other file: a prompt a line, empty lines left out.

    chat: for the prompts that don't say. Raises RecycleError for a file that is not so.
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
    """Their names, in the order in which they come."""
    return list(dict.fromkeys(prompt.category for prompt in prompts))


def first_of_each(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first ``count`` prompts of each category."""
    return [
        prompt
        for category in categories(prompts)
        for prompt in [p for p in prompts if p.category == category][:count]
    ]
