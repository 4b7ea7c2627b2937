"""Trains a recyclable module for a frozen base model.

    python -m recycle_ext.train --output DIR                          the default base, on its own text
    python -m recycle_ext.train --base MODEL --text FILE... --output DIR

The module learns to say what the base says: at row i it sees the embedding of x_{i+1} and the base's
state h_i, and is trained on the cross-entropy to the base's own distribution after x_{i+1},
softmax(head(h_{i+1})) (RecycleGPT, arXiv 2308.03421, section 3, with the base's distribution in place of the
next token). Both distributions are taken over the draft vocabulary, the tokens most frequent in the
text.

Reported is the acceptance: how often, on text held out, the module's first choice is the base's first choice
of the whole vocabulary. That is the share of drafts that greedy verify mode keeps.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from recycle_ext.checkpoint import Checkpoint, open_checkpoint
from recycle_ext.config import ModuleConfig
from recycle_ext.errors import RecycleError
from recycle_ext.module_checkpoint import save_module
from recycle_ext.reference import BaseModel, RecyclableModule
from recycle_ext.self_text import Prompts, write_text

# Sequences the base writes at once; a file of text holds as many.
TEXT_BATCH = 256


@dataclass(frozen=True)
class TrainOptions:
    """What can be set; defaults are those of the shipped module."""

    steps: int = 1000
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


class DistillLoss(torch.autograd.Function):
    """Mean cross-entropy of softmax(logits) to given probabilities, [rows, vocabulary] bfloat16 both.

    Written out because its gradient, softmax - probs, takes one more array of that size in place of
    autograd's four: on a CPU the loss is otherwise most of a step.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, probs: Tensor) -> Tensor:
        """-> [] float32"""
        log_probs = logits.float().log_softmax(-1)
        loss = -(log_probs * probs).sum() / len(logits)
        ctx.save_for_backward(log_probs, probs)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """Of the logits, [rows, vocabulary] bfloat16; the probabilities are given."""
        log_probs, probs = ctx.saved_tensors
        return (log_probs.exp_().sub_(probs).mul_(grad / len(probs))).to(torch.bfloat16), None


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


# ---- the command ---------------------------------------------------------------------------------


def self_written(
    checkpoint: Checkpoint, base: BaseModel, folder: Path, n_tokens: int, length: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of text by the base itself, at least ``n_tokens`` in all; kept in ``folder``."""
    tokenizer = checkpoint.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False)

    ends = set(tokenizer.eos_token_ids)
    if len(end := encode("<|endoftext|>")) == 1:
        ends |= set(end)
    batches = -(-n_tokens // (TEXT_BATCH * length))
    with tqdm(total=batches * TEXT_BATCH * length, desc="writing text", unit=" tokens") as bar:
        for batch in range(batches):
            file = folder / f"text-{seed}-{length}-{batch:03d}.pt"
            if file.exists():
                part = torch.load(file, weights_only=True)
                bar.update(part[0].numel())
            else:
                batch_seed = 1000 + 1000 * seed + batch
                prompts = Prompts(encode, batch_seed)
                tokens, hidden = write_text(
                    base, prompts, ends, TEXT_BATCH, length, batch_seed, bar.update
                )
                part = tokens.int(), hidden
                torch.save(part, file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)
            yield part


@torch.no_grad()
def states_of_text(
    checkpoint: Checkpoint, base: BaseModel, files: Sequence[str], length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the given text, cut into sequences, with the states the base reads them in."""
    ids: list[int] = []
    for file in files:
        try:
            text = Path(file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecycleError(f"--text {file}: cannot be read as UTF-8 text: {error}") from None
        ids += checkpoint.tokenizer.encode(text)
    count = len(ids) // length
    if count < 2:
        raise RecycleError(
            f"--text has {len(ids)} tokens; at least two sequences of --length {length} are needed"
        )
    tokens = torch.tensor(ids[: count * length]).view(count, length)
    for part in tqdm(tokens.split(16), desc="reading text", unit=" batches"):
        yield part.int(), base(part)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, described by --help."""
    defaults = TrainOptions()
    parser = argparse.ArgumentParser(
        prog="python -m recycle_ext.train",
        description="Trains a recyclable module for a frozen base model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", required=True, help="directory of the module; a run's state is kept there too")
    add("--base", help=".gguf file, Hugging Face directory or hub id; none: SmolLM2-135M-Instruct")
    add(
        "--text", nargs="+", metavar="FILE", help="UTF-8 text to train on; none: the base writes it"
    )
    add(
        "--self-generate",
        type=int,
        default=409_600,
        metavar="TOKENS",
        help="text the base writes",
    )
    add("--length", type=int, default=320, help="tokens of a sequence")
    add("--held-out", type=float, default=0.03, help="share of the sequences kept for measuring")
    add("--draft-vocab", type=int, default=8192, help="tokens the module may draft; 0: all")
    add("--layers", type=int, default=1)
    add("--steps", type=int, default=defaults.steps)
    add("--batch-sequences", type=int, default=defaults.batch_sequences)
    add("--lr", type=float, default=defaults.learning_rate)
    add("--seed", type=int, default=defaults.seed)
    add("--resume", action="store_true", help="go on with the run in --output")
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Refuses numbers out of range, by name."""
    for name in ("steps", "batch_sequences", "layers", "self_generate"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise RecycleError(f"{flag} is {getattr(options, name)}; it must be at least 1")
    if options.length < 3:
        raise RecycleError(
            f"--length is {options.length}; a row needs two tokens after it: 3 or more"
        )
    if not 0 < options.held_out < 1:
        raise RecycleError(f"--held-out is {options.held_out}; it must be between 0 and 1")
    if not options.lr > 0:
        raise RecycleError(f"--lr is {options.lr}; it must be positive")
    if options.draft_vocab < 0:
        raise RecycleError(
            f"--draft-vocab is {options.draft_vocab}; it must be 0 (all) or positive"
        )


def train(options: argparse.Namespace) -> float:
    """The whole run; returns the acceptance on the text held out."""
    check_options(options)
    folder = Path(options.output)
    state = folder / "training.pt"
    if state.exists() and not options.resume:
        raise RecycleError(f"{state} is of an earlier run: give --resume, or another --output")
    if options.resume and not folder.is_dir():
        raise RecycleError(f"--resume: there is no {folder}")
    checkpoint = open_checkpoint(options.base)
    vocab_size = checkpoint.config.vocab_size
    if options.draft_vocab > vocab_size:
        raise RecycleError(
            f"--draft-vocab is {options.draft_vocab}; the base's vocabulary has {vocab_size}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecycleError(f"--output {folder}: {error.strerror}") from None

    base = BaseModel(checkpoint.config)
    base.load_state_dict(checkpoint.state_dict())
    inv_freq = base.inv_freq
    reader = BaseModel(checkpoint.config)
    reader.load_state_dict(base.state_dict())
    reader.to(torch.bfloat16).eval()
    reader.inv_freq = inv_freq  # RoPE's angles stay float32
    if options.text:
        parts = states_of_text(checkpoint, reader, options.text, options.length)
    else:
        parts = self_written(
            checkpoint, reader, folder, options.self_generate, options.length, options.seed
        )
    tokens, hidden = (torch.cat(part) for part in zip(*parts, strict=True))
    text = Text(tokens, hidden, held_out=max(1, int(len(tokens) * options.held_out)))

    draft_vocab, coverage = None, 1.0
    if options.draft_vocab:
        used = text.tokens[: text.n_train]
        draft_vocab, coverage = frequent_tokens(used, options.draft_vocab, vocab_size)
    config = ModuleConfig.like(
        checkpoint.config, options.layers, options.draft_vocab, checkpoint.fingerprint
    )
    trainer = Trainer(
        initial_module(config, base, options.seed),
        base,
        text,
        draft_vocab,
        TrainOptions(
            steps=options.steps,
            batch_sequences=options.batch_sequences,
            learning_rate=options.lr,
            seed=options.seed,
        ),
    )
    if state.exists():
        trainer.load(state)
    print(
        f"{text.n_train} sequences of {options.length} tokens, {text.held_out} held out; "
        f"the draft vocabulary covers {coverage:.2%} of the text",
        file=sys.stderr,
    )
    acceptance = trainer.acceptance()
    with tqdm(total=options.steps, initial=trainer.step, desc="training", unit=" steps") as bar:
        for step, loss, measured in trainer.run(state):
            bar.update()
            acceptance = acceptance if measured is None else measured
            bar.set_postfix(loss=f"{loss:.3f}", acceptance=f"{acceptance:.3f}")
            if measured is not None:
                tqdm.write(f"step {step}: loss {loss:.4f}, acceptance {measured:.4f}", sys.stderr)
    tensors = dict(trainer.module.state_dict())
    if draft_vocab is not None:
        tensors["draft_vocab"] = draft_vocab
    save_module(folder, config, tensors)
    return acceptance


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; errors of the user's become one line and exit status 2."""
    options = parse_arguments(arguments)
    try:
        acceptance = train(options)
    except RecycleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; go on with --resume --output {options.output}", file=sys.stderr)
        return 130
    print(f"{options.output}: held-out acceptance {acceptance:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
