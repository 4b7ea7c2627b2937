"""Training of a module for a frozen base: the default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.checkpoint.module import save_module
from recycle_ext.reference.model import BaseModel, RecyclableModule
from recycle_ext.train.chain import chain, count_accepted
from recycle_ext.train.losses import head_loss, regression_loss
from recycle_ext.train.rounding import BLOCK, straight_through
from recycle_ext.train.states import States, batches
from recycle_ext.train.trainer import Task
from recycle_ext.train.workers import Workers

MEASURED_DRAFT_TOKENS = 4


@dataclass(frozen=True)
class Targets:
    """The loss of a module: weights of its terms and the number of draft tokens."""

    soft: float = 1.0  # weight of the base's distribution
    hard: float = 0.0  # weight of the text's own token
    regression: float = 0.0  # weight of the distance to the base's state
    num_draft_tokens: int = 1  # from each row
    chain_from: float = 0.0  # share of the steps after which draft tokens 2 and on are trained
    decay: float = 0.7  # weight of a draft token relative to the one before


_LAYER_SIZES = ("intermediate_size", "n_heads", "n_kv_heads", "head_dim", "qkv_bias", "qk_norm")


def initial_module(config: ModuleConfig, base: BaseModel, seed: int) -> RecyclableModule:
    """A module that starts near passing its inputs through.

    W_in starts as the identity on the hidden half and half the identity on the embedding half. The layers start as the
    base's last ones where all sizes agree, with a tenth of their output: the whole output would be far larger than the
    module's input.
    """
    torch.manual_seed(seed)
    module = RecyclableModule(config)
    d = config.hidden_size
    with torch.no_grad():
        module.input_proj.weight.normal_(std=0.01)
        module.input_proj.weight[:, d:] += torch.eye(d)
        module.input_proj.weight[:, :d] += 0.5 * torch.eye(d)
        if module.input_proj.bias is not None:
            module.input_proj.bias.zero_()
        if all(getattr(config, name) == getattr(base.config, name) for name in _LAYER_SIZES):
            layers = zip(reversed(module.layers), reversed(base.model.layers), strict=False)
            for layer, source in layers:
                names = layer.state_dict().keys()  # The first input norm may be missing.
                weights = {k: v.float() for k, v in source.state_dict().items() if k in names}
                layer.load_state_dict(weights)
        for layer in module.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        if config.output_norm:
            # The head was trained for inputs of this scale.
            module.output_norm.weight.fill_(float(base.model.norm.weight.abs().mean()))
    return module


class FrozenBase(Task):
    """Trains the module on hidden states of the base.

    The target of row i is the base's distribution after x_{i+1}, softmax(head(h_{i+1})), over the draft vocabulary
    (RecycleGPT, arXiv 2308.03421, section 3, with the base's distribution in place of the next token), the token
    x_{i+2} itself, or both. ``targets.regression`` adds the distance to the state h_{i+1}.

    base: in bfloat16. held_out: sequences at the end of ``states`` that are not trained on. draft_vocab: [n] int64
    ascending; None: all tokens. module_format: GGUF format that the module's matrices are rounded to.
    """

    def __init__(
        self,
        module: RecyclableModule,
        base: BaseModel,
        states: States,
        held_out: int,
        draft_vocab: Tensor | None,
        targets: Targets,
        workers: Workers,
        module_format: str = "f32",
    ) -> None:
        super().__init__()
        self.module = module
        self.module_format = module_format
        # A list hides the base from nn.Module: its weights are neither trained, averaged, saved nor broadcast.
        self._base = [base]
        self.states = states
        self.n_train = len(states) - held_out
        self.targets = targets
        self.workers = workers
        self.num_draft_tokens = 1
        self.dtype = base.lm_head.weight.dtype
        self.full_head = base.lm_head.weight.detach()
        self.embedding = base.model.embed_tokens.weight.detach()
        self.draft_vocab = draft_vocab
        self.head = self.full_head
        labels = torch.arange(len(self.full_head), device=workers.device)
        if draft_vocab is not None:
            self.draft_vocab = draft_vocab.to(workers.device)
            self.head = self.full_head[self.draft_vocab].contiguous()
            labels = labels.new_full((len(self.full_head),), -1)
            labels[self.draft_vocab] = torch.arange(len(self.draft_vocab), device=workers.device)
        self._labels = labels  # each token's row in the module's head, -1: none

    def begin_step(self, done: float) -> None:
        """Trains draft tokens after the first from ``chain_from`` on."""
        targets = self.targets
        self.num_draft_tokens = targets.num_draft_tokens if done >= targets.chain_from else 1

    def rows(self, index: list[int] | range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The module's inputs and targets at rows i = 0 .. T - 2 of the sequences ``index``.

        Returns x_{i+1} [n, T - 1] int64, its embedding, h_i and h_{i+1}, the last three [n, T - 1, d] in the base's dtype.
        """
        device = self.workers.device
        tokens = self.states.tokens(index).to(device)
        hidden = self.states.hidden(index)
        if hidden is None:
            with torch.no_grad():
                hidden = self._base[0](tokens)
        hidden = hidden.to(device, self.dtype)
        following = tokens[:, 1:]
        return following, F.embedding(following, self.embedding), hidden[:, :-1], hidden[:, 1:]

    def _rounded_module(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The module with its matrices rounded to ``module_format``."""
        if self.module_format == "f32":
            return self.module
        weights = {
            name: straight_through(parameter, self.module_format)
            for name, parameter in self.module.named_parameters()
            if parameter.dim() == 2 and parameter.shape[1] % BLOCK == 0
        }
        return lambda *inputs: functional_call(self.module, weights, inputs)

    def _autocast(self) -> torch.autocast:
        device = self.workers.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def forward(self, index: list[int]) -> Tensor:
        """The loss of the sequences ``index``, nats a row, averaged over the draft tokens by their weights."""
        targets = self.targets
        tokens, embedding, hidden, target_hidden = self.rows(index)
        # The last row's x_{i+2} is beyond the text.
        labels = F.pad(self._labels[tokens[:, 1:]], (0, 1), value=-1)
        total = 0.0
        total_weight = 0.0
        with self._autocast():
            drafts = chain(self._rounded_module(), embedding, hidden, self.num_draft_tokens)
            for number, draft in enumerate(drafts):
                draft_weight = targets.decay**number
                states = draft.states[:, draft.first :].flatten(0, 1).to(self.dtype)
                target_states = target_hidden[:, draft.first :].flatten(0, 1)
                weight = torch.full(
                    (len(states),), draft_weight / len(states), dtype=torch.float32, device=states.device
                )
                total = total + head_loss(
                    states,
                    self.head,
                    target_states=target_states,
                    labels=labels[:, draft.first :].flatten(),
                    weight=weight,
                    soft=targets.soft,
                    hard=targets.hard,
                )
                if targets.regression:
                    distance = regression_loss(states, target_states, weight)
                    total = total + targets.regression * distance
                total_weight += draft_weight
        return total / total_weight

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """acceptance_1 .. acceptance_4 on the held-out sequences.

        acceptance_k is the share of k-th draft tokens that greedy verify mode accepts, of those that it verifies.
        """
        counts = torch.zeros(2, MEASURED_DRAFT_TOKENS, dtype=torch.int64)
        counts = counts.to(self.workers.device)
        n_held_out = len(self.states) - self.n_train
        module = self._rounded_module()
        for number, part in enumerate(batches(n_held_out, 8)):
            if number % self.workers.count != self.workers.rank:
                continue
            tokens, embedding, hidden, target_hidden = self.rows([self.n_train + i for i in part])
            base_tokens = self._argmax(target_hidden, self.full_head)
            draft_tokens = []
            with self._autocast():
                for draft in chain(module, embedding, hidden, MEASURED_DRAFT_TOKENS):
                    best = self._argmax(draft.states.to(self.dtype), self.head)
                    draft_tokens.append(best if self.draft_vocab is None else self.draft_vocab[best])
            text_tokens = F.pad(tokens[:, 1:], (0, 1), value=-1)
            counts += torch.tensor(count_accepted(draft_tokens, base_tokens, text_tokens), device=counts.device)
        accepted, verified = self.workers.sum(counts).tolist()
        return {f"acceptance_{k + 1}": accepted[k] / max(1, verified[k]) for k in range(MEASURED_DRAFT_TOKENS)}

    @staticmethod
    def _argmax(states: Tensor, head: Tensor) -> Tensor:
        """The head's rows of the largest logits, [n, T] int64, of states [n, T, d]."""
        rows = states.flatten(0, 1).split(1024)
        return torch.cat([(part @ head.T).max(-1).indices for part in rows]).view(states.shape[:2])

    def save(self, folder: Path) -> None:
        """Writes the module, its matrices as they are before rounding."""
        tensors = {name: value.cpu() for name, value in self.module.state_dict().items()}
        if self.draft_vocab is not None:
            tensors["draft_vocab"] = self.draft_vocab.cpu()
        save_module(folder, self.module.config, tensors)
