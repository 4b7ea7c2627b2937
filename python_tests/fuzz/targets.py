"""What is fuzzed: each target makes one input of a seed, uses it, and ends well or with an error that names the thing.

A target is ``prepare(folder)``, which writes the corpus (tiny models) and returns ``one(random)``. ``one`` returns whether
the input was accepted; an error that it lets through is a finding.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from heads import DEEPSEEK, EAGLE, MIMO, QWEN, write_head
from model_files import write_gguf
from models import write_base, write_byte_tokenizer, write_module
from mutate import damaged_gguf, damaged_json, damaged_safetensors, json_bytes, odd_value

from recycle_ext.checkpoint import huggingface
from recycle_ext.checkpoint.base_model import Checkpoint, open_checkpoint
from recycle_ext.checkpoint.module import open_module
from recycle_ext.convert import to_module
from recycle_ext.convert.source import Source
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.generate.__main__ import main as generate_main
from recycle_ext.text.tokenizer import Tokenizer
from recycle_ext.weights.layout import pack_matrix
from recycle_ext.weights.pack import pack_model

One = Callable[[Random], bool]
SIZES = {"hidden_size": 32, "intermediate_size": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "context": 64}
TEXTS = ["", "hello", " a  b\n\n", "é▁\ufffd", "<s>x</s>", "it's 12345", "\0"]


class UnnamedError(Exception):
    """An error of the right type whose message names nothing."""


def refused(error: RecycleError, *things: object) -> bool:
    """False: the input was refused, in words that name one of ``things``."""
    if not any(str(thing) in str(error) for thing in things):
        raise UnnamedError(f"{error!r} names none of {[str(thing) for thing in things]}")
    return False


def use_tokenizer(random: Random, tokenizer: Tokenizer) -> None:
    """Text to ids and back, and a chat. A text may be refused."""
    stream = tokenizer.stream(after=[1])
    for token in random.choices(range(tokenizer.vocab_size), k=4):
        stream.push(token)
    stream.flush()
    tokenizer.decode([random.randrange(tokenizer.vocab_size)])
    with contextlib.suppress(RecycleError):
        tokenizer.encode(random.choice(TEXTS))
        tokenizer.apply_chat_template([{"role": "user", "content": random.choice(TEXTS)}])


def use_model(base: Checkpoint, module=None) -> None:
    """A few tokens. A logit may be nonfinite."""
    packed = pack_model(base, module, "q8")
    capacity = min(12, base.config.max_position_embeddings)
    if capacity < 4:
        return
    decoder = Decoder(packed, "standard" if module is None else "verify", capacity=capacity)
    try:
        ids = list(decoder.decode([min(3, base.config.vocab_size - 1)], 4))
    except RuntimeError as error:
        if "NaN or infinite" not in str(error):
            raise
    else:
        assert all(0 <= token < base.config.vocab_size for record in ids for token in record.tokens)


def write_model(folder: Path) -> Checkpoint:
    size = write_byte_tokenizer(folder)
    return write_base(folder, vocab_size=size, **SIZES)


def damaged_base(folder: Path, name: str, damage: Callable[[Random], bytes]) -> One:
    """A Hugging Face directory with one file damaged."""
    write_model(folder / "model")

    def one(random: Random) -> bool:
        (folder / "model" / name).write_bytes(damage(random))
        try:
            base = open_checkpoint(folder / "model")
            use_model(base)
        except RecycleError as error:
            return refused(error, folder / "model")
        return True

    return one


def safetensors(folder: Path) -> One:
    write_model(folder / "whole")
    data = (folder / "whole" / "model.safetensors").read_bytes()
    return damaged_base(folder, "model.safetensors", lambda random: damaged_safetensors(random, data))


def config(folder: Path) -> One:
    write_model(folder / "whole")
    whole = json.loads((folder / "whole" / "config.json").read_text())
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    corpus = [whole, whole | {"rope_scaling": rope}, whole | {"rope_parameters": rope}, whole | {"sliding_window": 8},
              whole | {"architectures": ["MistralForCausalLM"]}, whole | {"eos_token_id": [1, 2]}]  # fmt: skip

    def damage(random: Random) -> bytes:
        return json_bytes(random, damaged_json(random, random.choice(corpus), random.choice(corpus)))

    return damaged_base(folder, "config.json", damage)


def tokenizer(folder: Path) -> One:
    base = write_model(folder / "model")
    path = folder / "model"
    names = ("tokenizer.json", "tokenizer_config.json")
    corpus = {name: json.loads((path / name).read_text()) for name in names}
    chat = "{% for m in messages %}{{ m['role'] + bos_token + m['content'] }}{% endfor %}"
    corpus["tokenizer_config.json"] |= {"chat_template": chat, "add_bos_token": True}
    corpus["tokenizer.json"]["added_tokens"].append(
        {
            "id": 0,
            "content": "<s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )

    def one(random: Random) -> bool:
        for name in names:
            content = damaged_json(random, corpus[name]) if random.random() < 0.6 else corpus[name]
            (path / name).write_bytes(json_bytes(random, content))
        try:
            found = huggingface.read_tokenizer(path, base.config)
        except RecycleError as error:
            return refused(error, path)
        use_tokenizer(random, found)
        return True

    return one


def gguf(folder: Path) -> One:
    base = write_model(folder / "whole")
    texts = list(json.loads((folder / "whole" / "tokenizer.json").read_text())["model"]["vocab"])
    kinds = [3, 3, *[1] * (len(texts) - 2)]
    special = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.bos_token_id": 0}
    pieces = [f"<0x{byte:02X}>" for byte in range(len(texts) - 40)]
    spm = [
        "<unk>",
        "<s>",
        "</s>",
        *"abcdefghijklmnopqrstuvwxyz▁é",
        "he",
        "ll",
        "hell",
        "hello",
        "▁a",
        "ab",
        "abc",
        "it",
        "<x>",
    ]
    spm = [*spm, *pieces][: len(texts)]
    metadata = [
        special | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.merges": ["h e", "l l"]},
        special | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["h e"]},
        special | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": spm, "tokenizer.ggml.unknown_token_id": 0,
                   "tokenizer.ggml.scores": [-float(i) for i in range(len(spm))],
                   "tokenizer.ggml.token_type": [2, 3, 3, *[6 if t in pieces else 1 for t in spm[3:]]]},
    ]  # fmt: skip
    corpus = []
    for number, (values, kind) in enumerate(zip(metadata, ("F32", "Q8_0", "Q4_0"), strict=True)):
        write_gguf(folder / f"{number}.gguf", base, metadata=values, kind=kind)
        corpus.append((folder / f"{number}.gguf").read_bytes())

    def one(random: Random) -> bool:
        file = folder / "model.gguf"
        file.write_bytes(damaged_gguf(random, random.choice(corpus)))
        try:
            found = open_checkpoint(file)
            built = found.tokenizer
            use_model(found)
        except RecycleError as error:
            return refused(error, file)
        use_tokenizer(random, built)
        return True

    return one


def module(folder: Path) -> One:
    base = write_model(folder / "base")
    write_module(folder / "module", base, draft_vocab_size=37)
    files = {name: (folder / "module" / name).read_bytes() for name in ("config.json", "module.safetensors")}
    fields = json.loads(files["config.json"])

    def one(random: Random) -> bool:
        for name, data in files.items():
            (folder / "module" / name).write_bytes(data)
        if random.random() < 0.5:
            (folder / "module" / "config.json").write_bytes(json_bytes(random, damaged_json(random, fields)))
        else:
            damaged = damaged_safetensors(random, files["module.safetensors"])
            (folder / "module" / "module.safetensors").write_bytes(damaged)
        try:
            use_model(base, open_module(folder / "module", base))
        except RecycleError as error:
            return refused(error, folder / "module")
        return True

    return one


def head(folder: Path) -> One:
    base = write_base(folder / "base", vocab_size=64, **SIZES | {"n_layers": 2})
    sources = []
    for name, layout in {"eagle": EAGLE, "mimo": MIMO, "deepseek": DEEPSEEK, "qwen": QWEN}.items():
        write_head(folder / name, layout, base)
        files = {file: (folder / name / file).read_bytes() for file in ("config.json", "model.safetensors")}
        sources.append((files, json.loads(files["config.json"])))
    (folder / "head").mkdir()

    def one(random: Random) -> bool:
        files, fields = random.choice(sources)
        for name, data in files.items():
            (folder / "head" / name).write_bytes(data)
        if random.random() < 0.5:
            changed = damaged_json(random, fields, random.choice(sources)[1])
            (folder / "head" / "config.json").write_bytes(json_bytes(random, changed))
        else:
            changed = damaged_safetensors(random, files["model.safetensors"])
            (folder / "head" / "model.safetensors").write_bytes(changed)
        try:
            to_module(Source(folder / "head"), base, random.random() < 0.3)
        except RecycleError as error:
            return refused(error, folder / "head", "the head's")
        return True

    return one


def odd_tensor(random: Random, tensor: torch.Tensor) -> torch.Tensor:
    """Another shape, dtype or layout, or another value in one place."""
    kind = random.randrange(8)
    if kind == 0:
        return tensor[: random.randrange(tensor.shape[0] + 1)] if tensor.dim() else tensor[None]
    if kind == 1:
        return tensor.to(
            random.choice([torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool, torch.bfloat16])
        )
    if kind == 2 and tensor.dim() > 1:
        return tensor.transpose(0, random.randrange(tensor.dim()))
    if kind == 3:
        return tensor[None] if random.random() < 0.5 else tensor.flatten()
    if kind == 4:
        return torch.cat((tensor, tensor)) if tensor.dim() else tensor
    if kind == 5:
        return tensor[..., ::2] if tensor.dim() else tensor
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    if tensor.numel():
        flat, at = tensor.view(-1), random.randrange(tensor.numel())
        if tensor.is_floating_point():
            flat[at] = random.choice([0.0, -1.0, 1e38, float("inf"), float("nan")])
        elif tensor.dtype != torch.bool:
            bounds, old = torch.iinfo(tensor.dtype), int(flat[at])
            number = random.choice(
                [0, 1, -1, 2, 63, 64, 255, 2**31, 2**40, 2**62, -(2**62), old + 1, old - 1, old + 64]
            )
            flat[at] = max(bounds.min, min(number, bounds.max))
    return tensor


def ops(folder: Path) -> One:
    base = write_base(folder / "base", vocab_size=64, **SIZES)
    packed = pack_model(base, write_module(folder / "module", base, draft_vocab_size=17), "q8")
    step = [each.name for each in torch.ops.recycle.decode_step.default._schema.arguments]

    def state(random: Random) -> dict:
        sampling = {"temperature": random.choice([0.0, 0.8]), "top_k": random.choice([0, 5]), "seeds": [1, 2]}
        decoder = Decoder(packed, random.choice(["verify", "alternate"]), random.randint(1, 4), 2, 30, **sampling)
        decoder.prefill([1, 2, 3], 0)
        return dict(zip(step, decoder.arguments(), strict=True))

    def head_arguments(random: Random) -> dict:
        rows = random.randint(1, 4)
        numbers = torch.arange(rows)
        return {"hidden": torch.randn(rows, 32), "norm": torch.ones(32), "eps": 1e-5,
                "head": pack_matrix(torch.zeros(50, 32), "q8_0"), "format": 3, "n_vocab": 50, "positions": numbers,
                "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seeds": numbers}  # fmt: skip

    def attention(random: Random) -> dict:
        return {"q": torch.randn(2, 1, 4, 32), "k": torch.randn(2, 1, 2, 32), "v": torch.randn(2, 1, 2, 32),
                "cache": torch.zeros(2, 2, 2, 8, 32), "lengths": torch.tensor([0, 3]), "inv_freq": torch.ones(16)}  # fmt: skip

    calls = {
        "decode_step": state,
        "prefill": lambda random: state(random) | {"sequence": 1, "prompt": torch.tensor([4, 5])},
        "recycle_head": head_arguments,
        "attention_decode": attention,
    }

    def one(random: Random) -> bool:
        name = random.choice(list(calls))
        arguments = calls[name](random)
        for _ in range(random.choice((1, 1, 2))):
            key = "plan" if "plan" in arguments and random.random() < 0.3 else random.choice(list(arguments))
            value = arguments[key]
            is_tensor = isinstance(value, torch.Tensor)
            arguments[key] = odd_tensor(random, value) if is_tensor else odd_value(random, value)
        try:
            getattr(torch.ops.recycle, name)(**arguments)
        except (ValueError, RuntimeError, TypeError) as error:
            # torch refuses the types of Python's values itself, by the argument's name.
            known = [*arguments, "argument", "NaN or infinite", "drafts"]
            return refused(error, *known)
        except OverflowError as error:  # an int of over 64 bits, which torch refuses before our code
            return refused(error, "int")
        return True

    return one


def command(folder: Path) -> One:
    write_model(folder / "model")
    good = {"--model": str(folder / "model"), "--max-new-tokens": "2", "--dtype": "f32", "--threads": "1", "--top-k": "3",
            "--temperature": "0.5", "--top-p": "0.9", "--seed": "1", "--drafts": "1", "--mode": "standard",
            "--cache-dtype": "bf16", "--device": "cpu", "--module": "none", "--module-dtype": "q8"}  # fmt: skip
    odd = ["", "-", "--", "-1", "0", "1.5", "x", "nan", "inf", "1e400", "9" * 30, "9" * 5000, "auto", "é", "\udc80", "\0",
           "x" * 5000, ".", "/", "/dev/null", "cuda", "cuda:99", "meta", "q4", "verify", "--json", "--chat", "--stats"]  # fmt: skip

    def one(random: Random) -> bool:
        chosen = {"--model": good["--model"]} | {
            key: good[key] for key in random.sample(sorted(good), random.randrange(5))
        }
        arguments = [each for pair in chosen.items() for each in pair]
        arguments.insert(random.choice((0, len(arguments))), random.choice(["hi", *odd]))
        for _ in range(random.randrange(3)):
            arguments[random.randrange(len(arguments))] = random.choice(odd)
        arguments += ["--model", good["--model"]]  # the last one counts: the default model takes long
        out, error = io.StringIO(), io.StringIO()
        stdin = sys.stdin
        sys.stdin = io.TextIOWrapper(io.BytesIO(random.choice(TEXTS).encode()))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
                status = generate_main(arguments)
        finally:
            sys.stdin = stdin
        said = error.getvalue()
        if status not in (0, 2) or (status == 2 and "error: " not in said) or "Traceback" in said:
            raise UnnamedError(f"status {status} of {arguments}: {said[-300:]}")
        return status == 0

    return one


TARGETS: dict[str, Callable[[Path], One]] = {
    "gguf": gguf,
    "safetensors": safetensors,
    "config": config,
    "tokenizer": tokenizer,
    "module": module,
    "head": head,
    "ops": ops,
    "command": command,
}
