"""From the command line's options to a task: opens or creates the models and the text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from recycle_ext.checkpoint.base_model import Checkpoint, open_checkpoint
from recycle_ext.checkpoint.config import MODULE_DTYPES, ModuleConfig
from recycle_ext.checkpoint.huggingface import read_config
from recycle_ext.checkpoint.module import ModuleCheckpoint, open_module
from recycle_ext.errors import RecycleError
from recycle_ext.reference.model import BaseModel, RecyclableModule
from recycle_ext.text.tokenizer import Tokenizer
from recycle_ext.train.documents import documents, packed
from recycle_ext.train.draft_vocab import frequent_tokens
from recycle_ext.train.frozen import FrozenBase, Targets, initial_module
from recycle_ext.train.joint import Joint, initial_weights, train_tokenizer
from recycle_ext.train.options import TARGETS
from recycle_ext.train.record import Record
from recycle_ext.train.states import States, count_held_out, count_written, shards_of_given_text, shards_of_written_text
from recycle_ext.train.workers import Workers
from recycle_ext.weights.pack import check_sizes


def frozen_task(
    options: argparse.Namespace, folder: Path, workers: Workers, record: Record, tell: Callable[[str], None]
) -> FrozenBase:
    """A module for an existing base. Text and states go to ``folder``; ``tell`` prints a line.

    Raises RecycleError before anything is written, but for text that the base wrote otherwise than before.
    """
    checkpoint = open_checkpoint(options.base)
    _check_base(options, checkpoint)
    record.add("the base's fingerprint", checkpoint.fingerprint)
    base, reader = _two_bases(checkpoint)
    config = ModuleConfig.like(
        checkpoint.config,
        options.layers,
        options.draft_vocab,
        checkpoint.fingerprint,
        options.shape,
        options.module_dtype,
    )
    module = initial_module(config, base, options.seed)
    if options.start:
        _load_start(module, open_module(options.start, checkpoint))
    if options.shard_base:
        workers.shard(reader)
    reader.to(workers.device)
    states = States(_shards(options, checkpoint, reader, folder, workers, record))
    n_held_out = count_held_out(len(states), options.held_out)
    draft_vocab = None
    if options.draft_vocab:
        tokens = states.tokens(range(len(states) - n_held_out))
        vocab_size = checkpoint.config.vocab_size
        draft_vocab, coverage = frequent_tokens(tokens, options.draft_vocab, vocab_size)
        tell(f"the draft vocabulary covers {coverage:.2%} of the text")
    module.to(workers.device)
    soft, hard = TARGETS[options.targets]
    targets = Targets(soft, hard, options.regression, options.chain, options.chain_from)
    matrix_format, _ = MODULE_DTYPES[options.module_dtype]
    return FrozenBase(module, reader, states, n_held_out, draft_vocab, targets, workers, matrix_format)


def _check_base(options: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises RecycleError where the base is too small for the options, or is not of a kind that can be packed."""
    config = checkpoint.config
    check_sizes(config, checkpoint.path)
    if options.length > config.max_position_embeddings:
        raise RecycleError(f"--length is {options.length}; the base's context is {config.max_position_embeddings}")
    if options.draft_vocab > config.vocab_size:
        raise RecycleError(f"--draft-vocab is {options.draft_vocab}; the base's vocabulary has {config.vocab_size}")


def _two_bases(checkpoint: Checkpoint) -> tuple[BaseModel, BaseModel]:
    """The base in float32, which a module starts from, and in bfloat16, which reads and writes text."""
    base = BaseModel(checkpoint.config)
    base.load_state_dict(checkpoint.state_dict())
    reader = BaseModel(checkpoint.config).to(torch.bfloat16)
    reader.load_state_dict(base.state_dict())
    reader.inv_freq = base.inv_freq  # RoPE's angles need float32.
    return base, reader.eval().requires_grad_(False)


def _shards(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    reader: BaseModel,
    folder: Path,
    workers: Workers,
    record: Record,
) -> list[tuple[Tensor, Tensor | None]]:
    """The text, as States takes it: given or written by the base, with states unless --online."""
    tokenizer, fingerprint = checkpoint.tokenizer, checkpoint.fingerprint
    if not options.text:
        _check_batch(options, count_written(options.self_generate, options.length), workers)
        shards = shards_of_written_text(
            reader, tokenizer, folder, fingerprint, options.self_generate, options.length, options.seed, workers
        )
        record.add_text(tokens for tokens, _ in shards)
        return [(tokens, None) for tokens, _ in shards] if options.online else shards
    sequences = packed(tokenizer, documents(options.text, options.text_field), options.length)
    _check_batch(options, len(sequences), workers)
    record.add_text([sequences])
    if options.online:
        return [(sequences, None)]
    return shards_of_given_text(reader, sequences, folder, fingerprint, workers)


def _check_batch(options: argparse.Namespace, n_sequences: int, workers: Workers) -> None:
    n_train = n_sequences - count_held_out(n_sequences, options.held_out)
    workers.check_batch(options.batch_sequences, options.accumulate, n_train)


def _load_start(module: RecyclableModule, start: ModuleCheckpoint) -> None:
    """Copies the weights of another module, which may have fewer layers and another draft vocabulary.

    Raises RecycleError for a tensor that ``module`` lacks or has in another shape.
    """
    needed = module.state_dict()
    for name, value in (given := start.state_dict()).items():
        if name not in needed or needed[name].shape != value.shape:
            shape = list(needed[name].shape) if name in needed else "no such tensor"
            raise RecycleError(
                f"--from {start.path}: tensor {name} is {list(value.shape)}; --layers and --shape ask for {shape}"
            )
    module.load_state_dict(needed | given)


def joint_task(options: argparse.Namespace, workers: Workers, record: Record) -> Joint:
    """A base and its module from scratch. Writes nothing."""
    file = Path(options.joint)
    config = read_config(file, file.stem)
    if config.architecture != "llama":
        raise RecycleError(f"{file}: --joint trains LlamaForCausalLM, not {config.architecture}")
    check_sizes(config, str(file))
    for name, value in json.loads(json.dumps(asdict(config))).items():  # as training.pt gives them back
        if name != "name":
            record.add(f"{name} of --joint", value)
    texts = list(documents(options.text, options.text_field))
    backend = train_tokenizer(texts, config.vocab_size)
    if backend.get_vocab_size() != config.vocab_size:
        raise RecycleError(
            f"{file}: vocab_size is {config.vocab_size}, and the text gives a tokenizer of {backend.get_vocab_size()}"
        )
    base = BaseModel(config)
    initial_weights(base, config.n_layers, options.seed)
    tokenizer = Tokenizer(backend, config.vocab_size, (0,), None, adds_bos=False, chat_template=None)
    tokens = packed(tokenizer, iter(texts), options.length)
    _check_batch(options, len(tokens), workers)
    record.add_text([tokens])
    module = None
    if options.module_weight:
        module_config = ModuleConfig.like(config, options.layers, 0, "", options.shape)
        module = RecyclableModule(module_config)
        initial_weights(module, config.n_layers, options.seed + 1)
        module.to(workers.device)
    n_held_out = count_held_out(len(tokens), options.held_out)
    base.to(workers.device)
    return Joint(base, module, backend, tokens, n_held_out, options.module_weight, workers)
