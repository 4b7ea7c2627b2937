"""Models, texts and runs that the tests of recycle_ext.train share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from models import reference_base, write_base

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.train import __main__ as command
from recycle_ext.train.frozen import FrozenBase, Targets, initial_module
from recycle_ext.train.states import States
from recycle_ext.train.trainer import Trainer, TrainOptions
from recycle_ext.train.workers import Workers

VOCAB = 40
N_HELD_OUT = 24
ONE_PROCESS = Workers(0, 1, torch.device("cpu"))

SMALL = ["--length", "24", "--held-out", "0.1", "--batch-sequences", "8"]
SMALL += ["--evaluate-every", "20", "--warmup", "5", "--layers", "1"]

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
SENTENCE = "the cat sat on the mat and the dog ran to the cat by the red door"


def write_small_base(folder: Path) -> Checkpoint:
    return write_base(folder, vocab_size=VOCAB, n_layers=3)


def sampled_states(base: Checkpoint) -> States:
    """Sequences that the base writes at temperature 1, with its states."""
    model = reference_base(base, torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (200, 1), generator=generator)
    with torch.no_grad():
        for _ in range(24):
            probs = model.logits(model(tokens)[:, -1]).softmax(-1)
            tokens = torch.cat((tokens, probs.multinomial(1, generator=generator)), dim=1)
        hidden = model(tokens).bfloat16()
    return States([(tokens[:120], hidden[:120]), (tokens[120:], hidden[120:])])


def frozen_trainer(base: Checkpoint, states: States, targets: Targets | None = None, **options) -> Trainer:
    """A trainer of a new one-layer module."""
    config = ModuleConfig.like(base.config, 1, fingerprint=base.fingerprint)
    module = initial_module(config, reference_base(base, torch.float32), 0)
    reader = reference_base(base, torch.bfloat16).requires_grad_(False)
    targets = targets or Targets()
    task = FrozenBase(module, reader, states, N_HELD_OUT, None, targets, ONE_PROCESS)
    given = {"batch_sequences": 16, "warmup_steps": 5, "ema": 0.9}
    return Trainer(task, TrainOptions(**{**given, **options}), ONE_PROCESS)


def finish(trainer: Trainer, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Trains to the end; returns the module's weights."""
    for _ in trainer.run(checkpoint):
        pass
    return {name: value.clone() for name, value in trainer.task.module.state_dict().items()}


def write_text(folder: Path) -> Path:
    """A file of text that a byte-level tokenizer of a tiny vocabulary can learn."""
    file = folder / "text.txt"
    generator = torch.Generator().manual_seed(0)
    words = SENTENCE.split()
    order = torch.randint(len(words), (6000,), generator=generator).tolist()
    file.write_text(" ".join(words[i] for i in order), "utf-8")
    return file


def write_joint_config(folder: Path) -> Path:
    """A config.json with the sizes of a tiny Llama."""
    file = folder / "tiny.json"
    file.write_text(json.dumps(TINY_LLAMA), "utf-8")
    return file


def train_joint(folder: Path, output: Path, *more: str) -> int:
    """Runs the command with --joint on the files of write_text and write_joint_config; returns its exit status."""
    arguments = ["--joint", str(write_joint_config(folder)), "--text", str(write_text(folder))]
    return command.main([*arguments, "--output", str(output), *SMALL, "--lr", "5e-3", *more])


def log_rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
