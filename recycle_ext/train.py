"""Trains a recyclable module for a frozen base model.

    python -m recycle_ext.train --output DIR                          the default base, on its own text
    python -m recycle_ext.train --base MODEL --text FILE... --output DIR

The module learns to say what the base says: at row i it sees the embedding of x_{i+1} and the base's
state h_i, and is trained on the cross-entropy to the base's own distribution after x_{i+1},
softmax(head(h_{i+1})) (RecycleGPT, arXiv 2308.03421, section 3, with the base's distribution in place of the
next token). Both distributions are taken over the draft vocabulary, the tokens most frequent in the
text; rows where the base's choice lies outside of it don't count in the loss.

Reported is the acceptance: how often, on text held out, the module's first choice is the base's first choice
of the whole vocabulary. That is the share of drafts that greedy verify mode keeps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from recycle_ext.config import ModuleConfig
from recycle_ext.errors import RecycleError
from recycle_ext.reference import BaseModel, RecyclableModule


@dataclass(frozen=True)
class TrainOptions:
    """What can be set; defaults are those of the shipped module."""

    steps: int = 2400
    batch_sequences: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    evaluate_every: int = 100
    save_seconds: float = 240.0


@dataclass
class Text:
    """Sequences with the base's states: tokens [N, T] int, hidden [N, T, d] bfloat16.

    ``held_out`` sequences at the end are not trained on.
    """

    tokens: Tensor
    hidden: Tensor
    held_out: int

    @property
    def n_train(self) -> int:
        """Sequences that are trained on."""
        return len(self.tokens) - self.held_out


def frequent_tokens(tokens: Tensor, size: int, vocab_size: int) -> tuple[Tensor, float]:
    """The ``size`` most frequent token ids, ascending, and the share of the text they make up."""
    counts = torch.bincount(tokens.flatten().long(), minlength=vocab_size)
    kept = counts.topk(size).indices.sort().values
    return kept, float(counts[kept].sum() / counts.sum())


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
        same_shape = all(
            getattr(config, name) == getattr(base.config, name)
            for name in ("intermediate_size", "n_heads", "n_kv_heads", "head_dim", "qkv_bias", "qk_norm")
        )
        if same_shape:
            for layer, source in zip(reversed(module.layers), reversed(base.model.layers), strict=False):
                layer.load_state_dict(
                    {k: v.float() for k, v in source.state_dict().items() if k in layer.state_dict()}
                )
        for layer in module.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        if config.output_norm:
            # The scale the head is used to.
            module.output_norm.weight.fill_(float(base.model.norm.weight.abs().mean()))
    return module


class Trainer:
    """The training loop over prepared text."""

    def __init__(
        self,
        module: RecyclableModule,
        base: BaseModel,
        text: Text,
        draft_vocab: Tensor | None,
        options: TrainOptions,
    ) -> None:
        self.module = module
        self.base = base
        self.text = text
        self.options = options
        self.draft_vocab = draft_vocab
        head = base.lm_head.weight.detach().to(torch.bfloat16)
        self.full_head = head
        self.head = head if draft_vocab is None else head[draft_vocab].contiguous()
        self.is_draft = torch.ones(head.shape[0], dtype=torch.bool)
        if draft_vocab is not None:
            self.is_draft[:] = False
            self.is_draft[draft_vocab] = True
        decayed = [p for p in module.parameters() if p.dim() == 2]
        plain = [p for p in module.parameters() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": options.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=options.learning_rate,
            betas=(0.9, 0.95),
        )
        self.step = 0

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine down to a twentieth."""
        options = self.options
        if step < options.warmup_steps:
            return options.learning_rate * (step + 1) / options.warmup_steps
        done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
        return options.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))

    def order(self, epoch: int) -> Tensor:
        """The sequences of an epoch, shuffled; the same after a resume."""
        generator = torch.Generator().manual_seed(self.options.seed * 1000 + epoch)
        return torch.randperm(self.text.n_train, generator=generator)

    def batch(self, step: int) -> Tensor:
        """Indices of the sequences of a step."""
        size = min(self.options.batch_sequences, self.text.n_train)
        a_epoch = self.text.n_train // size
        order = self.order(step // a_epoch)
        start = step % a_epoch * size
        return order[start : start + size]

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """e(x_{i+1}), h_i and h_{i+1} of some sequences, [n, T - 1, d] each."""
        tokens = self.text.tokens[index].long()
        hidden = self.text.hidden[index]
        embedding = F.embedding(tokens[:, 1:], self.base.model.embed_tokens.weight)
        return embedding.to(torch.bfloat16), hidden[:, :-1], hidden[:, 1:]

    def train_step(self) -> float:
        """One step; returns its loss, nats per row."""
        embedding, hidden, target = self.rows(self.batch(self.step))
        with torch.no_grad():
            wanted = target.flatten(0, 1) @ self.head.T
            probs = wanted.float().softmax(-1).to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            guess = self.module(embedding, hidden)[1].flatten(0, 1)
            logits = guess.to(torch.bfloat16) @ self.head.T
        loss = DistillLoss.apply(logits, probs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.options.clip)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def acceptance(self, sequences: int | None = None) -> float:
        """Share of held-out rows where the module's first choice is the base's."""
        first = self.text.n_train
        last = len(self.text.tokens) if sequences is None else first + sequences
        right = total = 0
        for start in range(first, last, 8):
            index = torch.arange(start, min(start + 8, last))
            embedding, hidden, target = self.rows(index)
            wanted = (target.flatten(0, 1) @ self.full_head.T).argmax(-1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                guess = self.module(embedding, hidden)[1].flatten(0, 1)
                picks = (guess.to(torch.bfloat16) @ self.head.T).argmax(-1)
            if self.draft_vocab is not None:
                picks = self.draft_vocab[picks]
            right += int((picks == wanted).sum())
            total += len(wanted)
        return right / total

    def save(self, path: Path) -> None:
        """All that a resumed run needs."""
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Continues from save()."""
        state = torch.load(path, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def run(self, checkpoint: Path) -> Iterator[tuple[int, float, float | None]]:
        """Trains to the last step, saving on the way; yields step, loss and, at times, acceptance."""
        options = self.options
        saved = time.monotonic()
        while self.step < options.steps:
            loss = self.train_step()
            if not math.isfinite(loss):
                raise RecycleError(
                    f"training: the loss is {loss} at step {self.step}; the last good state is "
                    f"{checkpoint}. A smaller --lr may help."
                )
            last = self.step == options.steps
            evaluate = self.step % options.evaluate_every == 0 or last
            if last or time.monotonic() - saved > options.save_seconds:
                self.save(checkpoint)
                saved = time.monotonic()
            yield self.step, loss, self.acceptance() if evaluate else None


class DistillLoss(torch.autograd.Function):
    """Mean cross-entropy of softmax(logits) to given probabilities, [rows, vocabulary] bfloat16 both.

    Written out because its gradient, softmax - probs, takes one more array of that size in place of
    autograd's four: on a CPU the loss is otherwise most of a step.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, probs: Tensor) -> Tensor:
        log_probs = logits.float().log_softmax(-1)
        loss = -(log_probs * probs).sum() / len(logits)
        ctx.save_for_backward(log_probs, probs)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        log_probs, probs = ctx.saved_tensors
        return (log_probs.exp_().sub_(probs).mul_(grad / len(probs))).to(torch.bfloat16), None
