"""The paper's recipe: base and module trained together, from scratch (RecycleGPT, arXiv 2308.03421, section 3).

    L = mean_i -log p(x_{i+1} | x_{<=i})  +  w mean_i -log q(x_{i+2} | x_{<=i+1})

p from the base's state h_i, q from the module's n(g_i), both through the one output head; gradients of the
module's loss go through h into the base. w = 0 trains the base alone: the control.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from recycle_ext.checkpoint.config import ModelConfig
from recycle_ext.checkpoint.huggingface import llama_json
from recycle_ext.reference.model import BaseModel, RecyclableModule
from recycle_ext.train.losses import head_loss
from recycle_ext.train.states import batches
from recycle_ext.train.trainer import Task
from recycle_ext.train.workers import Workers

END = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> Backend:
    """Byte-level BPE of a vocabulary's size, from the training text; ``<|endoftext|>`` is token 0."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def initial_weights(model: torch.nn.Module, n_layers: int, seed: int) -> None:
    """Normal with deviation 0.02, what adds to the residual stream by 1 / sqrt(2 layers) less (GPT-2)."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
        torch.nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * n_layers) if ends_branch else 1))


class Joint(Task):
    """Base and module on sequences tokens [n, T] int64, of which the last ``held_out`` are kept for measuring."""

    def __init__(
        self,
        base: BaseModel,
        module: RecyclableModule | None,
        tokens: Tensor,
        held_out: int,
        module_weight: float,
        workers: Workers,
    ) -> None:
        super().__init__()
        self.base = base
        self.module = module
        self.n_train = len(tokens) - held_out
        self.tokens = tokens
        self.module_weight = module_weight
        self.workers = workers

    def _states(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """h_i [n, T, d] at rows 0 .. T - 1, and n(g_i) [n, T - 1, d] at rows 0 .. T - 2."""
        kind = self.workers.device.type
        with torch.autocast(kind, dtype=torch.bfloat16):
            hidden = self.base(tokens)
            if self.module is None:
                return hidden, None
            embedding = F.embedding(tokens[:, 1:], self.base.model.embed_tokens.weight)
            return hidden, self.module(embedding, hidden[:, :-1])[1]

    def _losses(self, tokens: Tensor) -> list[Tensor]:
        """The base's loss and the module's, nats a token each."""
        hidden, guess = self._states(tokens)
        head = self.base.lm_head.weight
        losses = []
        for states, labels in ((hidden[:, :-1], tokens[:, 1:]), (guess, tokens[:, 2:])):
            if states is None:
                continue
            rows = states[:, : labels.shape[1]].flatten(0, 1).to(torch.bfloat16)
            weight = torch.full((len(rows),), 1 / len(rows), device=rows.device)
            losses.append(head_loss(rows, head, labels=labels.flatten(), weight=weight, hard=1.0))
        return losses

    def forward(self, index: list[int]) -> Tensor:
        """The loss of some sequences."""
        losses = self._losses(self.tokens[index].to(self.workers.device))
        return losses[0] if self.module is None else losses[0] + self.module_weight * losses[1]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On what is held out: loss of the base and of the module, nats a token, and the acceptance: how often
        the module's first choice is the base's.
        """
        device = self.workers.device
        # Sums of: sequences, base loss, module loss, guesses, guesses accepted.
        sums = torch.zeros(5, dtype=torch.float64)
        for number, part in enumerate(batches(len(self.tokens) - self.n_train, 8)):
            if number % self.workers.count != self.workers.rank:
                continue
            tokens = self.tokens[[self.n_train + i for i in part]].to(device)
            losses = self._losses(tokens)
            sums[0] += len(tokens)
            for kind, loss in enumerate(losses):
                sums[1 + kind] += float(loss) * len(tokens)
            if self.module is not None:
                hidden, guess = self._states(tokens)
                head = self.base.lm_head.weight.to(torch.bfloat16)
                wanted = (hidden[:, 1:].to(torch.bfloat16) @ head.T).argmax(-1)
                right = (guess.to(torch.bfloat16) @ head.T).argmax(-1) == wanted
                sums[3] += right.numel()
                sums[4] += int(right.sum())
        n, base_loss, module_loss, guesses, accepted = self.workers.sum(sums.to(device)).tolist()
        figures = {"held_out_loss": base_loss / n}
        if self.module is not None:
            figures |= {"held_out_module_loss": module_loss / n, "acceptance_1": accepted / guesses}
        return figures


def save_base(folder: Path, config: ModelConfig, base: BaseModel, backend: Backend) -> None:
    """Writes a base model as a Hugging Face directory, bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.to("cpu", torch.bfloat16).contiguous()
        for name, value in base.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = llama_json(config) | {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
    backend.save(str(folder / "tokenizer.json"))
