"""Trains a recyclable module.

    python -m recycle_ext.train --output DIR                          the default base, on its own text
    python -m recycle_ext.train --base MODEL --text FILE... --output DIR
    python -m recycle_ext.train --joint CONFIG.json --text FILE... --output DIR

The base stays as it is (train/frozen.py), or is trained too, from scratch, as in the paper (train/joint.py).
Several processes: `torchrun --nproc-per-node N -m recycle_ext.train ...`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from recycle_ext.checkpoint.base_model import Checkpoint, open_checkpoint
from recycle_ext.checkpoint.config import MODULE_DTYPES, ModuleConfig
from recycle_ext.checkpoint.huggingface import read_config
from recycle_ext.checkpoint.module import ModuleCheckpoint, open_module, save_module
from recycle_ext.errors import RecycleError
from recycle_ext.reference.model import BaseModel, RecyclableModule
from recycle_ext.train.documents import documents, packed
from recycle_ext.train.draft_vocab import frequent_tokens
from recycle_ext.train.frozen import FrozenBase, Targets, initial_module
from recycle_ext.train.joint import Joint, initial_weights, save_base, train_tokenizer
from recycle_ext.train.log import Log, described
from recycle_ext.train.states import States, held_out, read_by, self_written
from recycle_ext.train.trainer import Task, Trainer, TrainOptions
from recycle_ext.train.workers import Workers, join, leave
from recycle_ext.weights.pack import check_sizes

TARGETS = {"kl": (1.0, 0.0), "hard": (0.0, 1.0), "both": (0.5, 0.5)}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, described by --help."""
    defaults, targets = TrainOptions(), Targets()
    parser = argparse.ArgumentParser(
        prog="python -m recycle_ext.train",
        description="Trains a recyclable module.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", required=True, help="directory of the module; a run's state is kept there too"
    )
    add = parser.add_argument_group("what is trained").add_argument
    add("--base", help=".gguf file, Hugging Face directory or hub id; none: SmolLM2-135M-Instruct")
    add(
        "--joint",
        metavar="CONFIG",
        help="train a base from scratch as well: its sizes, a Llama's config.json",
    )
    add("--from", dest="start", metavar="MODULE", help="directory of a module to start from")
    add(
        "--module-weight",
        type=float,
        default=1.0,
        help="with --joint: of the module's loss; 0: none",
    )
    add("--layers", type=int, default=2, help="of the module")
    add(
        "--shape",
        choices=("recycle", "eagle"),
        default="recycle",
        help="eagle: no norms beside the layers' own, as EAGLE-1 heads are (vLLM reads these)",
    )
    add("--draft-vocab", type=int, default=8192, help="tokens the module may draft; 0: all")
    add(
        "--module-dtype",
        choices=MODULE_DTYPES,
        default="q4",
        help="what the module will run in: its matrices are rounded to that while it is trained (not with --joint)",
    )
    add = parser.add_argument_group("on what").add_argument
    add(
        "--text",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text, .jsonl or .parquet; none: the base writes it",
    )
    add("--text-field", default="text", help="of .jsonl and .parquet")
    add(
        "--self-generate",
        type=int,
        default=3_047_424,
        metavar="TOKENS",
        help="text the base writes, from the prompts in recycle_ext/train/prompts.txt",
    )
    add("--length", type=int, default=384, help="tokens of a sequence")
    add("--held-out", type=float, default=0.02, help="share of the sequences kept for measuring")
    add("--online", action="store_true", help="run the base in each step: its states take no disk")
    add(
        "--targets",
        choices=TARGETS,
        default="kl",
        help="the base's distribution, the text, or both",
    )
    add(
        "--regression",
        type=float,
        default=targets.regression,
        metavar="WEIGHT",
        help="of the distance to the base's next state",
    )
    add("--chain", type=int, default=targets.drafts, help="train for 1 to 4 drafts a step")
    add(
        "--chain-from",
        type=float,
        default=targets.chain_from,
        metavar="SHARE",
        help="of the steps, after which drafts 2 and on are trained as well",
    )
    add = parser.add_argument_group("how").add_argument
    add("--steps", type=int, default=defaults.steps)
    add("--batch-sequences", type=int, default=defaults.batch_sequences, help="of a step, in all")
    add(
        "--accumulate",
        type=int,
        default=defaults.accumulate,
        help="parts of a step, to save memory",
    )
    add("--lr", type=float, default=defaults.learning_rate)
    add("--warmup", type=int, default=defaults.warmup_steps, metavar="STEPS")
    add("--weight-decay", type=float, default=defaults.weight_decay)
    add("--clip", type=float, default=defaults.clip, help="largest norm of the gradient")
    add("--ema", type=float, default=defaults.ema, help="decay of the weights' average; 0: none")
    add("--seed", type=int, default=defaults.seed)
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add(
        "--shard-base",
        action="store_true",
        help="under torchrun: split the frozen base's weights over the processes",
    )
    add("--evaluate-every", type=int, default=defaults.evaluate_every, metavar="STEPS")
    add(
        "--save-seconds",
        type=float,
        default=defaults.save_seconds,
        help="what a run that is cut off may lose",
    )
    add("--resume", action="store_true", help="go on with the run in --output")
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Refuses numbers out of range, by name, and what does not go together."""

    def refuse(name: str, needed: str) -> None:
        flag = "--" + name.replace("_", "-")
        raise RecycleError(f"{flag} is {getattr(options, name)}; it must be {needed}")

    at_least_one = ("steps", "batch_sequences", "layers", "self_generate", "accumulate")
    for name in (*at_least_one, "evaluate_every"):
        if getattr(options, name) < 1:
            refuse(name, "at least 1")
    for name in ("draft_vocab", "warmup", "weight_decay", "regression", "module_weight"):
        if not getattr(options, name) >= 0:
            refuse(name, "0 or positive")
    for name in ("lr", "clip"):
        if not getattr(options, name) > 0:
            refuse(name, "positive")
    if options.length < 3:
        refuse("length", "3 or more, for a row needs two tokens after it")
    if not 0 < options.held_out < 1:
        refuse("held_out", "between 0 and 1")
    if not 0 <= options.ema < 1:
        refuse("ema", "in [0, 1)")
    if not 0 <= options.chain_from <= 1:
        refuse("chain_from", "in [0, 1]")
    if not 1 <= options.chain <= 4:
        refuse("chain", "1 to 4")
    if options.joint and not options.text:
        raise RecycleError("--joint needs --text: there is no base yet that could write")
    if options.joint and options.start:
        raise RecycleError("--joint trains a module from scratch; --from names one that is there")
    if options.joint and options.base:
        raise RecycleError("--joint trains a base from scratch; --base names one that is there")
    if options.shard_base and not (options.online and options.text):
        raise RecycleError(
            "--shard-base needs --online and --text: a base that writes or reads ahead is a whole one"
        )


def new_folder(options: argparse.Namespace, workers: Workers) -> Path:
    """The output directory, which holds no other run."""
    folder = Path(options.output)
    state = folder / "training.pt"
    if state.exists() and not options.resume:
        raise RecycleError(f"{state} is of an earlier run: give --resume, or another --output")
    if options.resume and not folder.is_dir():
        raise RecycleError(f"--resume: there is no {folder}")
    workers.wait()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecycleError(f"--output {folder}: {error.strerror}") from None
    return folder


def frozen_bases(checkpoint: Checkpoint) -> tuple[BaseModel, BaseModel]:
    """The base in float32, for the module to start from, and in bfloat16."""
    base = BaseModel(checkpoint.config)
    base.load_state_dict(checkpoint.state_dict())
    reader = BaseModel(checkpoint.config).to(torch.bfloat16)
    reader.load_state_dict(base.state_dict())
    reader.inv_freq = base.inv_freq  # RoPE's angles stay float32
    return base, reader.eval().requires_grad_(False)


def frozen_task(options: argparse.Namespace, folder: Path, workers: Workers) -> FrozenBase:
    """The module's training on text and states of a base that is there."""
    checkpoint = open_checkpoint(options.base)
    check_sizes(checkpoint.config, checkpoint.path)
    vocab_size = checkpoint.config.vocab_size
    if options.length > checkpoint.config.max_position_embeddings:
        raise RecycleError(
            f"--length is {options.length}; the base's context is "
            f"{checkpoint.config.max_position_embeddings}"
        )
    if options.draft_vocab > vocab_size:
        raise RecycleError(
            f"--draft-vocab is {options.draft_vocab}; the base's vocabulary has {vocab_size}"
        )
    tokenizer, fingerprint = checkpoint.tokenizer, checkpoint.fingerprint
    base, reader = frozen_bases(checkpoint)
    if options.shard_base:
        workers.shard(reader)
    reader.to(workers.device)
    if options.text:
        sequences = packed(tokenizer, documents(options.text, options.text_field), options.length)
        if options.online:
            shards = [(sequences, None)]
        else:
            shards = read_by(reader, sequences, folder, fingerprint, workers)
    else:
        shards = self_written(
            reader,
            tokenizer,
            folder,
            fingerprint,
            options.self_generate,
            options.length,
            options.seed,
            workers,
        )
        if options.online:
            shards = [(tokens, None) for tokens, _ in shards]
    states = States(shards)
    n_held = held_out(len(states), options.held_out)
    draft_vocab = None
    if options.draft_vocab:
        used = states.tokens(range(len(states) - n_held))
        draft_vocab, coverage = frequent_tokens(used, options.draft_vocab, vocab_size)
        tell(workers, f"the draft vocabulary covers {coverage:.2%} of the text")
    config = ModuleConfig.like(
        checkpoint.config,
        options.layers,
        options.draft_vocab,
        fingerprint,
        options.shape,
        options.module_dtype,
    )
    module = initial_module(config, base, options.seed)
    if options.start:
        take_weights(module, open_module(options.start, checkpoint))
    module.to(workers.device)
    soft, hard = TARGETS[options.targets]
    targets = Targets(soft, hard, options.regression, options.chain, options.chain_from)
    module_format, _ = MODULE_DTYPES[options.module_dtype]
    return FrozenBase(module, reader, states, n_held, draft_vocab, targets, workers, module_format)


def take_weights(module: RecyclableModule, start: ModuleCheckpoint) -> None:
    """Starts from another module: all of its tensors, which may be of fewer layers. What it drafts may differ."""
    needed = module.state_dict()
    for name, value in (given := start.state_dict()).items():
        if name not in needed or needed[name].shape != value.shape:
            there = list(needed[name].shape) if name in needed else "no such tensor"
            raise RecycleError(
                f"--from {start.path}: tensor {name} is {list(value.shape)}; "
                f"--layers and --shape ask for {there}"
            )
    module.load_state_dict(needed | given)


def joint_task(options: argparse.Namespace, folder: Path, workers: Workers) -> Joint:
    """A base and its module, from scratch; writes the tokenizer's part of the base's directory."""
    file = Path(options.joint)
    config = read_config(file, file.stem)
    if config.architecture != "llama":
        raise RecycleError(f"{file}: --joint trains LlamaForCausalLM, not {config.architecture}")
    check_sizes(config, str(file))
    texts = list(documents(options.text, options.text_field))
    backend = train_tokenizer(texts, config.vocab_size)
    if backend.get_vocab_size() != config.vocab_size:
        raise RecycleError(
            f"{file}: vocab_size is {config.vocab_size}, and the text gives a tokenizer of "
            f"{backend.get_vocab_size()}"
        )
    base = BaseModel(config)
    initial_weights(base, config.n_layers, options.seed)
    base_folder = folder / "base"
    if workers.leads:
        save_base(base_folder, config, base, backend)
    workers.wait()
    tokens = packed(open_checkpoint(base_folder).tokenizer, iter(texts), options.length)
    module = None
    if options.module_weight:
        module_config = ModuleConfig.like(config, options.layers, 0, "", options.shape)
        module = RecyclableModule(module_config)
        initial_weights(module, config.n_layers, options.seed + 1)
        module.to(workers.device)
    n_held = held_out(len(tokens), options.held_out)
    return Joint(base.to(workers.device), module, tokens, n_held, options.module_weight, workers)


def save(task: Task, folder: Path) -> None:
    """The module, and a base that was trained with it."""
    if isinstance(task, Joint):
        backend = open_checkpoint(folder / "base").tokenizer.backend
        save_base(folder / "base", task.base.config, task.base, backend)
    if task.module is None:
        return
    config = task.module.config
    tensors = {name: value.cpu() for name, value in task.module.state_dict().items()}
    if isinstance(task, Joint):
        trained = open_checkpoint(folder / "base")
        config = ModuleConfig.like(
            trained.config,
            config.n_layers,
            0,
            trained.fingerprint,
            "recycle" if config.embed_norm else "eagle",
        )
        folder = folder / "module"
    elif task.draft_vocab is not None:
        tensors["draft_vocab"] = task.draft_vocab.cpu()
    save_module(folder, config, tensors)


def tell(workers: Workers, line: str) -> None:
    """A line on the screen, from one of the processes."""
    if workers.leads:
        tqdm.write(line, sys.stderr)


def train(options: argparse.Namespace, workers: Workers) -> dict[str, float]:
    """The whole run; returns the figures on the text held out."""
    check_options(options)
    folder = new_folder(options, workers)
    task = (joint_task if options.joint else frozen_task)(options, folder, workers)
    trainer = Trainer(
        task,
        TrainOptions(
            steps=options.steps,
            batch_sequences=options.batch_sequences,
            accumulate=options.accumulate,
            learning_rate=options.lr,
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            clip=options.clip,
            ema=options.ema,
            seed=options.seed,
            evaluate_every=options.evaluate_every,
            save_seconds=options.save_seconds,
        ),
        workers,
    )
    state = folder / "training.pt"
    if state.exists():
        trainer.load(state)
    trained = sum(parameter.numel() for parameter in trainer.trained.values())
    tell(
        workers,
        f"{trained / 1e6:.2f} million parameters; {task.n_train} sequences of {options.length} tokens",
    )
    log = Log(folder, trainer.step) if workers.leads else None
    figures: dict[str, float] = {}
    losses: list[float] = []
    started = time.monotonic()
    with tqdm(
        total=options.steps,
        initial=trainer.step,
        desc="training",
        unit=" steps",
        disable=not workers.leads,
    ) as bar:
        for step, loss, measured in trainer.run(state):
            bar.update()
            losses.append(loss)
            if measured is None:
                continue
            figures = measured
            seconds = time.monotonic() - started
            row = {
                "step": step,
                "loss": sum(losses) / len(losses),
                **measured,
                "learning_rate": trainer.rate(step - 1),
                "tokens_per_second": len(losses)
                * options.batch_sequences
                * options.length
                / seconds,
            }
            if log is not None:
                log.add(row)
            tell(workers, described(row))
            losses, started = [], time.monotonic()
    if log is not None:
        with trainer.averaged():
            save(task, folder)
        if len(log.rows) > 1 and log.plot() is None:
            tell(workers, "no plot: it needs matplotlib (`pip install matplotlib`)")
    figures = figures or trainer.evaluate()
    workers.wait()  # one that leaves while another still works ends in an abort, now and then
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; errors of the user's become one line and exit status 2."""
    options = parse_arguments(arguments)
    try:
        workers = join(options.device)
        try:
            figures = train(options, workers)
        finally:
            leave(workers)
    except RecycleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "error: out of memory; a larger --accumulate, a smaller --batch-sequences or --length takes "
            f"less, and --online for the states ({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"stopped; go on with --resume --output {options.output}", file=sys.stderr)
        return 130
    if workers.leads:
        shares = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        print(f"{options.output}: {shares}")
    return 0


def is_out_of_memory(error: Exception) -> bool:
    """torch's CPU allocator raises a plain RuntimeError."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)


if __name__ == "__main__":
    sys.exit(main())
