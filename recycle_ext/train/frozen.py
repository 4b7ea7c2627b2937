"""A module for a base that stays as it is: the default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.reference.model import BaseModel, RecyclableModule
from recycle_ext.train.chain import acceptance_by_draft, chain
from recycle_ext.train.losses import head_loss, regression_loss
from recycle_ext.train.rounding import BLOCK, straight_through
from recycle_ext.train.states import States, batches
from recycle_ext.train.trainer import Task
from recycle_ext.train.workers import Workers

MEASURED_DRAFTS = 4


@dataclass(frozen=True)
class Targets:
    """What a module is trained on."""

    soft: float = 1.0  # weight of the base's distribution
    hard: float = 0.0  # weight of the text's own token
    regression: float = 0.0  # weight of the distance to the base's state
    drafts: int = 1  # that follow from each row
    chain_from: float = 0.0  # share of the training after which drafts 2 and on are trained too
    decay: float = 0.7  # weight of a draft over the one before


def initial_module(config: ModuleConfig, base: BaseModel, seed: int) -> RecyclableModule:
    """A module that starts near passing its inputs through.

    W_in starts as identity on the hidden half and half of one on the embedding half, and the layers as the
    base's last ones, where they have the same sizes, but with a tenth of their output: at that scale
    of the input they would drown it.
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
        same_shape = all(
            getattr(config, name) == getattr(base.config, name)
            for name in (
                "intermediate_size",
                "n_heads",
                "n_kv_heads",
                "head_dim",
                "qkv_bias",
                "qk_norm",
            )
        )
        if same_shape:
            for layer, source in zip(
                reversed(module.layers), reversed(base.model.layers), strict=False
            ):
                layer.load_state_dict(
                    {
                        k: v.float()
                        for k, v in source.state_dict().items()
                        if k in layer.state_dict()
                    }
                )
        for layer in module.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        if config.output_norm:
            # The scale the head is used to.
            module.output_norm.weight.fill_(float(base.model.norm.weight.abs().mean()))
    return module


class FrozenBase(Task):
    """Trains the module on states of the base.

    The target of row i is the base's distribution after x_{i+1}, softmax(head(h_{i+1})), over the draft
    vocabulary (RecycleGPT, arXiv 2308.03421, section 3, with the base's distribution in place of the next
    token), the token x_{i+2} itself, or both; and, where asked for, the state h_{i+1}.

    base: in bfloat16, frozen. states: the last ``held_out`` sequences are not trained on. draft_vocab
    [n] int64 ascending, or None. module_format: of packing.FORMATS, in which the module's matrices will run.
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
        self.fingerprint = module.config.base_fingerprint
        # In a list: its weights are not this task's, to be saved, averaged or sent around.
        self._base = [base]
        self.states = states
        self.n_train = len(states) - held_out
        self.targets = targets
        self.workers = workers
        self.drafts = 1
        self.dtype = base.lm_head.weight.dtype
        self.full_head = base.lm_head.weight.detach()
        self.embedding = base.model.embed_tokens.weight.detach()
        self.draft_vocab = draft_vocab
        self.head = self.full_head
        index = torch.arange(len(self.full_head), device=workers.device)
        if draft_vocab is not None:
            self.draft_vocab = draft_vocab.to(workers.device)
            self.head = self.full_head[self.draft_vocab].contiguous()
            index = index.new_full((len(self.full_head),), -1)
            index[self.draft_vocab] = torch.arange(len(self.draft_vocab), device=workers.device)
        self._label = index  # of every token, its row in the module's head

    def begin_step(self, done: float) -> None:
        """Drafts after the first are trained from ``chain_from`` on."""
        self.drafts = self.targets.drafts if done >= self.targets.chain_from else 1

    def rows(self, index: list[int] | range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of some sequences, at rows i = 0 .. T - 2: x_{i+1} [n, T - 1], its embedding, h_i and h_{i+1}
        [n, T - 1, d].
        """
        device = self.workers.device
        tokens = self.states.tokens(index).to(device)
        hidden = self.states.hidden(index)
        if hidden is None:
            with torch.no_grad():
                hidden = self._base[0](tokens)
        hidden = hidden.to(device, self.dtype)
        return (
            tokens[:, 1:],
            F.embedding(tokens[:, 1:], self.embedding),
            hidden[:, :-1],
            hidden[:, 1:],
        )

    def _module_as_it_runs(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The module, its matrices rounded."""
        if self.module_format == "f32":
            return self.module
        weights = {
            name: straight_through(parameter, self.module_format)
            for name, parameter in self.module.named_parameters()
            if parameter.dim() == 2 and parameter.shape[1] % BLOCK == 0
        }
        return lambda *inputs: functional_call(self.module, weights, inputs)

    def _autocast(self) -> torch.autocast:
        kind = self.workers.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def forward(self, index: list[int]) -> Tensor:
        """The loss of some sequences, nats a row."""
        targets = self.targets
        tokens, embedding, hidden, wanted = self.rows(index)
        # The last row's x_{i+2} is beyond the text.
        labels = F.pad(self._label[tokens[:, 1:]], (0, 1), value=-1)
        total = 0.0
        parts = 0.0
        with self._autocast():
            drafts = chain(self._module_as_it_runs(), embedding, hidden, self.drafts)
            for number, draft in enumerate(drafts):
                share = targets.decay**number
                guess = draft.states[:, draft.first :].flatten(0, 1).to(self.dtype)
                want = wanted[:, draft.first :].flatten(0, 1)
                weight = torch.full(
                    (len(guess),), share / len(guess), dtype=torch.float32, device=guess.device
                )
                total = total + head_loss(
                    guess,
                    self.head,
                    wanted=want,
                    labels=labels[:, draft.first :].flatten(),
                    weight=weight,
                    soft=targets.soft,
                    hard=targets.hard,
                )
                if targets.regression:
                    total = total + targets.regression * regression_loss(guess, want, weight)
                parts += share
        return total / parts

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Acceptance at k = 1 .. 4 on what is held out: the share of drafts that greedy verify mode keeps,
        of those it gets to see.
        """
        counts = torch.zeros(2, MEASURED_DRAFTS, dtype=torch.int64, device=self.workers.device)
        n_held = len(self.states) - self.n_train
        module = self._module_as_it_runs()
        for number, part in enumerate(batches(n_held, 8)):
            if number % self.workers.count != self.workers.rank:
                continue
            tokens, embedding, hidden, target = self.rows([self.n_train + i for i in part])
            wanted = self._picks(target, self.full_head)
            picks = []
            with self._autocast():
                for draft in chain(module, embedding, hidden, MEASURED_DRAFTS):
                    pick = self._picks(draft.states.to(self.dtype), self.head)
                    picks.append(pick if self.draft_vocab is None else self.draft_vocab[pick])
            following = F.pad(tokens[:, 1:], (0, 1), value=-1)
            counts += torch.tensor(
                acceptance_by_draft(picks, wanted, following), device=counts.device
            )
        accepted, seen = self.workers.sum(counts).tolist()
        return {
            f"acceptance_{k + 1}": accepted[k] / max(1, seen[k]) for k in range(MEASURED_DRAFTS)
        }

    @staticmethod
    def _picks(states: Tensor, head: Tensor) -> Tensor:
        """The most likely rows of the head, [n, T] of states [n, T, d]."""
        rows = states.flatten(0, 1).split(1024)
        return torch.cat([(part @ head.T).max(-1).indices for part in rows]).view(states.shape[:2])
