"""The paper's recipe: base and module trained together, from scratch (RecycleGPT, arXiv 2308.03421, section 3).

    L = mean_i -log p(x_{i+1} | x_{<=i})  +  w mean_i -log q(x_{i+2} | x_{<=i+1})

p comes from the base's state h_i and q from the module's n(g_i), both through the one output head. Gradients of the
module's loss go through h into the base. w = 0 trains the base alone, as a control.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.config import ModelConfig, ModuleConfig
from recycle_ext.checkpoint.huggingface import llama_json
from recycle_ext.checkpoint.module import save_module, write_directory
from recycle_ext.files import make_directory, write_whole
from recycle_ext.reference.model import BaseModel, RecyclableModule
from recycle_ext.train.documents import pieces
from recycle_ext.train.losses import head_loss
from recycle_ext.train.states import batches
from recycle_ext.train.trainer import Task
from recycle_ext.train.workers import Workers

END = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> Backend:
    """Byte-level BPE from the training text with at most ``vocab_size`` tokens; ``<|endoftext|>`` is token 0."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return backend


def initial_weights(model: torch.nn.Module, n_layers: int, seed: int) -> None:
    """Initializes matrices as GPT-2 does (Radford et al. 2019, section 2.3).

    Normal with standard deviation 0.02; matrices that write to the residual stream have 0.02 / sqrt(2 n_layers).
    """
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        torch.nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * n_layers) if is_residual else 1))


class Joint(Task):
    """Trains a base and its module (None: the base alone) on sequences.

    backend: the base's tokenizer. tokens: [n, T] int32, of which the last ``held_out`` are not trained on. module_weight: w of this file's docstring.
    """

    def __init__(
        self,
        base: BaseModel,
        module: RecyclableModule | None,
        backend: Backend,
        tokens: Tensor,
        held_out: int,
        module_weight: float,
        workers: Workers,
    ) -> None:
        super().__init__()
        self.base = base
        self.module = module
        self.backend = backend
        self.n_train = len(tokens) - held_out
        self.tokens = tokens
        self.module_weight = module_weight
        self.workers = workers

    def _states(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """h_i [n, T, d] at rows 0 .. T - 1, and n(g_i) [n, T - 1, d] at rows 0 .. T - 2."""
        with torch.autocast(self.workers.device.type, dtype=torch.bfloat16):
            hidden = self.base(tokens)
            if self.module is None:
                return hidden, None
            embedding = F.embedding(tokens[:, 1:], self.base.model.embed_tokens.weight)
            return hidden, self.module(embedding, hidden[:, :-1])[1]

    def _losses(self, tokens: Tensor) -> list[Tensor]:
        """The loss of the base, then of the module, nats a token."""
        hidden, draft_states = self._states(tokens)
        head = self.base.lm_head.weight
        losses = []
        for states, labels in ((hidden[:, :-1], tokens[:, 1:]), (draft_states, tokens[:, 2:])):
            if states is None:
                continue
            rows = states[:, : labels.shape[1]].flatten(0, 1).to(torch.bfloat16)
            weight = torch.full((len(rows),), 1 / len(rows), device=rows.device)
            losses.append(head_loss(rows, head, labels=labels.flatten(), weight=weight, hard=1.0))
        return losses

    def forward(self, index: list[int]) -> Tensor:
        """The loss of the sequences ``index``."""
        losses = self._losses(self.tokens[index].long().to(self.workers.device))
        return losses[0] if self.module is None else losses[0] + self.module_weight * losses[1]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """held_out_loss, held_out_module_loss (nats a token) and acceptance_1 on the held-out sequences.

        acceptance_1 is the share of rows where the module's argmax is the base's.
        """
        device = self.workers.device
        # Sums of: sequences, base loss, module loss, draft tokens, accepted draft tokens.
        sums = torch.zeros(5, dtype=torch.float64)
        for number, part in enumerate(batches(len(self.tokens) - self.n_train, 8)):
            if number % self.workers.count != self.workers.rank:
                continue
            tokens = self.tokens[[self.n_train + i for i in part]].long().to(device)
            sums[0] += len(tokens)
            for index, loss in enumerate(self._losses(tokens), 1):
                sums[index] += float(loss) * len(tokens)
            if self.module is not None:
                hidden, draft_states = self._states(tokens)
                head = self.base.lm_head.weight.to(torch.bfloat16)
                base_tokens = (hidden[:, 1:].to(torch.bfloat16) @ head.T).argmax(-1)
                draft_tokens = (draft_states.to(torch.bfloat16) @ head.T).argmax(-1)
                sums[3] += draft_tokens.numel()
                sums[4] += int((draft_tokens == base_tokens).sum())
        n, base_loss, module_loss, drafted, accepted = self.workers.sum(sums.to(device)).tolist()
        figures = {"held_out_loss": base_loss / n}
        if self.module is not None:
            figures |= {"held_out_module_loss": module_loss / n, "acceptance_1": accepted / drafted}
        return figures

    def save(self, folder: Path) -> None:
        """Writes the base with its tokenizer to ``folder``/base and the module to ``folder``/module."""
        save_base(folder / "base", self.base.config, self.base, self.backend)
        if self.module is None:
            return
        trained = open_checkpoint(folder / "base")
        config = self.module.config
        shape = "recycle" if config.embed_norm else "eagle"
        config = ModuleConfig.like(trained.config, config.n_layers, 0, trained.fingerprint, shape)
        tensors = {name: value.cpu() for name, value in self.module.state_dict().items()}
        save_module(folder / "module", config, tensors)


def save_base(folder: Path, config: ModelConfig, base: BaseModel, backend: Backend) -> None:
    """Writes a base model and its tokenizer as a Hugging Face directory, in bfloat16."""
    make_directory(folder)
    write_whole(folder / "tokenizer.json", backend.to_str(pretty=True))
    tensors = {
        name: value.to("cpu", torch.bfloat16).contiguous()
        for name, value in base.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    fields = llama_json(config) | {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    write_directory(folder, fields, "model.safetensors", tensors)
