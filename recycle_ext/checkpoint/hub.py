"""Models from the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from recycle_ext.errors import RecycleError

# Everything that is read of a model, and nothing else a repository may hold.
_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]


def download(model_id: str, into: Path | None = None) -> Path:
    """Directory with the files of the model ``model_id`` ("org/name").

    Files that are there already are not fetched again, and without a network they are enough.
    into: a directory of one's own in place of the hub's cache.
    """
    # Imported here: it takes a while, and a model on disk does without.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model_id, allow_patterns=_FILES, local_dir=into))
    except GatedRepoError:
        reason = "its owner asks for an account; accept the terms on its page, then `hf auth login`"
    except RepositoryNotFoundError:
        reason = "there is no such file or directory here and no such public model on the hub"
    except LocalEntryNotFoundError as error:
        reason = (
            f"it is not in the hub's cache and the hub cannot be reached ({_first_line(error)})"
        )
    except (OSError, ValueError) as error:
        reason = _first_line(error)
    raise RecycleError(f"model {model_id}: {reason}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
