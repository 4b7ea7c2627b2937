"""python -m recycle_ext.train on a tiny base: from nothing to a module that drafts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from models import reference_base, write_base
from safetensors.torch import load_file

import recycle_ext
from recycle_ext import train as package
from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.checkpoint.module import open_module, save_module
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.ops.registration import HAS_CUDA_OPS
from recycle_ext.train import __main__ as command
from recycle_ext.train import draft_vocab
from recycle_ext.train.draft_vocab import frequent_tokens
from recycle_ext.train.frozen import FrozenBase, Targets, initial_module
from recycle_ext.train.states import States
from recycle_ext.train.trainer import Trainer, TrainOptions
from recycle_ext.train.workers import Workers
from recycle_ext.weights.pack import pack_model

VOCAB = 40
ALONE = Workers(0, 1, torch.device("cpu"))


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", vocab_size=VOCAB, n_layers=3)


@pytest.fixture
def states(base):
    """Sequences that the base writes, with its states: hot, so that they differ."""
    model = reference_base(base, torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (200, 1), generator=generator)
    with torch.no_grad():
        for _ in range(24):
            probs = model.logits(model(tokens)[:, -1]).softmax(-1)
            tokens = torch.cat((tokens, probs.multinomial(1, generator=generator)), dim=1)
        hidden = model(tokens).bfloat16()
    return States([(tokens[:120], hidden[:120]), (tokens[120:], hidden[120:])])


def trainer(base, states, targets=None, **options) -> Trainer:
    config = ModuleConfig.like(base.config, 1, fingerprint=base.fingerprint)
    module = initial_module(config, reference_base(base, torch.float32), 0)
    reader = reference_base(base, torch.bfloat16).requires_grad_(False)
    task = FrozenBase(module, reader, states, 24, None, targets or Targets(), ALONE)
    given = {"batch_sequences": 16, "warmup_steps": 5, "ema": 0.9}
    return Trainer(task, TrainOptions(**{**given, **options}), ALONE)


def finish(run: Trainer, file: Path) -> dict:
    """Trains to the end; the module's weights."""
    for _ in run.run(file):
        pass
    return {name: value.clone() for name, value in run.task.module.state_dict().items()}


def test_training_raises_the_held_out_acceptance(base, states, tmp_path):
    run = trainer(base, states, steps=150)
    before = run.evaluate()
    losses = [loss for _, loss, _ in run.run(tmp_path / "state.pt")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert run.evaluate()["acceptance_1"] > 1.3 * before["acceptance_1"]


def test_training_for_chains_lowers_the_loss_of_chains(base, states, tmp_path):
    """The same steps, with and without: what is held out, drafts 1 to 3."""
    losses = {}
    for drafts in (1, 3):
        task = trainer(base, states, Targets(drafts=drafts), steps=60)
        finish(task, tmp_path / f"{drafts}.pt")
        measured = trainer(base, states, Targets(drafts=3)).task
        measured.module.load_state_dict(task.task.module.state_dict())
        measured.begin_step(1.0)
        with torch.no_grad():
            losses[drafts] = float(measured(list(range(measured.n_train, len(states)))))
    assert losses[3] < losses[1]


@pytest.mark.parametrize(
    "targets",
    [Targets(soft=0, hard=1), Targets(soft=0.5, hard=0.5), Targets(regression=1.0)],
    ids=["hard", "both", "regression"],
)
def test_each_target_is_learned(base, states, tmp_path, targets):
    run = trainer(base, states, targets, steps=80)
    before = run.evaluate()["acceptance_1"]
    finish(run, tmp_path / "state.pt")
    assert run.evaluate()["acceptance_1"] > 1.1 * before


def test_the_measured_acceptance_is_the_decoders(base, states, tmp_path):
    """What training reports is what verify mode then does, on the same text."""
    run = trainer(base, states, steps=60)
    finish(run, tmp_path / "state.pt")
    with run.averaged():
        save_module(tmp_path / "module", run.task.module.config, run.task.module.state_dict())
    module = open_module(tmp_path / "module", base)
    held_out = states.tokens(range(run.task.n_train, len(states)))
    accepted = steps = 0
    for row in held_out:
        decoder = Decoder(pack_model(base, module, "bf16"), "verify", 1, capacity=60)
        decoder.prefill(row[:2].tolist())
        written = 1
        while written < len(row) - 2:
            count = int(decoder.step()[1][0])
            accepted += count - 1
            written += count
            steps += 1
    # Steps skip a row after each accepted draft, so the two numbers are close, not equal.
    assert abs(accepted / steps - run.evaluate()["acceptance_1"]) < 0.15


def test_a_resumed_run_ends_with_the_same_bits(base, states, tmp_path):
    targets = Targets(drafts=2, chain_from=0.5)
    whole = trainer(base, states, targets, steps=20)
    finish(whole, tmp_path / "whole.pt")
    first = trainer(base, states, targets, steps=20, save_seconds=0.0)
    for step, _, _ in first.run(tmp_path / "cut.pt"):
        if step == 7:
            break
    second = trainer(base, states, targets, steps=20)
    second.load(tmp_path / "cut.pt")
    assert second.step == 7
    finish(second, tmp_path / "cut.pt")
    for name, value in whole.trained.items():
        assert torch.equal(value, second.trained[name]), name
        assert torch.equal(whole.average[name], second.average[name]), name


def test_accumulating_changes_the_memory_not_the_step(base, states, tmp_path):
    weights = [
        finish(trainer(base, states, steps=5, accumulate=parts), tmp_path / f"{parts}.pt")
        for parts in (1, 4)
    ]
    start = initial_module(trainer(base, states).task.module.config, reference_base(base), 0)
    for name, value in start.state_dict().items():
        moved = (weights[0][name] - value).norm()
        # Adam's first steps are signs of gradients: what rounding decides, moves as far as the rest.
        assert (weights[0][name] - weights[1][name]).norm() < 0.05 * moved, name


def test_the_average_of_the_weights_is_what_is_measured(base, states, tmp_path):
    run = trainer(base, states, steps=30)
    finish(run, tmp_path / "state.pt")
    last = run.task.module.input_proj.weight.detach().clone()
    average = run.average["module.input_proj.weight"].clone()
    assert not torch.equal(last, average)
    with run.averaged():
        assert torch.equal(run.task.module.input_proj.weight, average)
    assert torch.equal(run.task.module.input_proj.weight, last)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(base, states, tmp_path):
    run = trainer(base, states, steps=20, save_seconds=0.0)
    steps = run.run(tmp_path / "state.pt")
    next(steps)
    kept = (tmp_path / "state.pt").read_bytes()
    with torch.no_grad():
        run.task.module.input_proj.weight[0, 0] = float("nan")
    with pytest.raises(RecycleError, match=r"the loss is nan at step 2; .*state\.pt"):
        list(steps)
    assert (tmp_path / "state.pt").read_bytes() == kept


def test_the_draft_vocabulary_is_the_most_frequent_tokens():
    tokens = torch.tensor([[3, 3, 3, 9, 9, 1]])
    kept, coverage = frequent_tokens(tokens, 2, 10)
    assert kept.tolist() == [3, 9]
    assert coverage == pytest.approx(5 / 6)


def test_the_fastest_draft_vocabulary_is_kept(config_file, texts, tmp_path, capsys):
    assert joint(config_file, texts, tmp_path / "out", "--steps", "40") == 0
    base = str(tmp_path / "out" / "base")
    output = str(tmp_path / "attached")
    arguments = ["--base", base, "--text", str(texts), "--output", output, *SMALL]
    assert command.main([*arguments, "--steps", "10", "--draft-vocab", "32"]) == 0
    chosen = ["--base", base, "--held-out", "0.1", "--prompts", "4"]
    assert draft_vocab.main([output, *chosen, "--sizes", "16,64"]) == 0
    printed = capsys.readouterr().out
    rates = {
        int(row.split("|")[1]): float(row.split("|")[5])
        for row in printed.splitlines()
        if row.startswith("| 16 ") or row.startswith("| 64 ")
    }
    assert rates.keys() == {16, 64}
    kept = json.loads((tmp_path / "attached" / "config.json").read_text())["draft_vocab_size"]
    assert rates[kept] == max(rates.values())
    assert draft_vocab.main([output, *chosen, "--sizes", "300"]) == 2
    assert "--sizes has 300; the base's vocabulary has 280" in capsys.readouterr().err
    assert draft_vocab.main([base, *chosen]) == 2


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    """A file of text that a byte-level tokenizer of a tiny vocabulary can learn from."""
    file = tmp_path / "text.txt"
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "the",
        "mat",
        "and",
        "the",
        "dog",
        "ran",
        "to",
        "the",
        "cat",
        "by",
        "the",
        "red",
        "door",
    ]
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(words), (6000,), generator=generator).tolist()
    file.write_text(" ".join(words[i] for i in order), "utf-8")
    return file


@pytest.fixture
def config_file(tmp_path):
    """Sizes of a tiny Llama."""
    file = tmp_path / "tiny.json"
    fields = {
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
    file.write_text(json.dumps(fields), "utf-8")
    return file


SMALL = ["--length", "24", "--held-out", "0.1", "--batch-sequences", "8"]
SMALL += ["--evaluate-every", "20", "--warmup", "5", "--layers", "1"]


def joint(config_file, texts, output, *more):
    arguments = ["--joint", str(config_file), "--text", str(texts), "--output", str(output)]
    return command.main([*arguments, *SMALL, "--lr", "5e-3", *more])


def test_from_scratch_then_a_module_for_it_then_faster_text(config_file, texts, tmp_path, capfd):
    """The whole way of a user: base and module from scratch; a module attached to that base with its own
    text; both draft for it, and verify writes what the base alone would.
    """
    assert joint(config_file, texts, tmp_path / "out", "--steps", "60") == 0
    base = tmp_path / "out" / "base"
    output = tmp_path / "attached"
    arguments = ["--base", str(base), "--output", str(output), "--draft-vocab", "100"]
    arguments += ["--self-generate", "4000", "--steps", "40"]
    assert command.main([*arguments, *SMALL]) == 0
    for module in (tmp_path / "out" / "module", output):
        model = recycle_ext.load(base, module=module)
        written = {
            mode: recycle_ext.generate(model, "the cat", mode=mode, max_new_tokens=40)
            for mode in ("standard", "verify")
        }
        for generation in written.values():
            list(generation)
        assert written["verify"].token_ids == written["standard"].token_ids
        assert written["verify"].statistics.acceptance_rate > 0
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40]
    figures = {"loss", "learning_rate", "tokens_per_second", "acceptance_1", "acceptance_4"}
    assert figures <= rows[0].keys()


def test_a_module_goes_on_from_another(config_file, texts, tmp_path, capsys):
    assert joint(config_file, texts, tmp_path / "out", "--steps", "60") == 0
    arguments = ["--base", str(tmp_path / "out" / "base"), "--text", str(texts), *SMALL]
    arguments += ["--steps", "20", "--draft-vocab", "0"]
    first = {}
    for name, more in (("anew", []), ("on", ["--from", str(tmp_path / "out" / "module")])):
        assert command.main([*arguments, *more, "--output", str(tmp_path / name)]) == 0
        first[name] = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
    assert first["on"]["loss"] < first["anew"]["loss"]
    arguments += ["--from", str(tmp_path / "on")]
    more = ["--layers", "2", "--output", str(tmp_path / "more")]
    assert command.main([*arguments, *more]) == 0
    assert "layers.1.mlp.up_proj.weight" in load_file(tmp_path / "more" / "module.safetensors")
    assert command.main([*arguments, "--shape", "eagle", "--output", str(tmp_path / "no")]) == 2
    assert "tensor embed_norm.weight is [32]; --layers and --shape ask for no such tensor" in (
        capsys.readouterr().err
    )


def test_the_control_is_the_base_alone(config_file, texts, tmp_path):
    assert joint(config_file, texts, tmp_path / "out", "--steps", "40", "--module-weight", "0") == 0
    assert (tmp_path / "out" / "base" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "module").exists()


def test_joint_training_learns_both(config_file, texts, tmp_path):
    assert joint(config_file, texts, tmp_path / "out", "--steps", "80") == 0
    first, *_, last = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    assert last["held_out_loss"] < 0.8 * first["held_out_loss"]
    assert last["held_out_module_loss"] < 0.9 * first["held_out_module_loss"]


def test_transformers_reads_the_base_that_was_trained(config_file, texts, tmp_path):
    from transformers import AutoModelForCausalLM

    assert joint(config_file, texts, tmp_path / "out", "--steps", "20") == 0
    base = recycle_ext.checkpoint.open_checkpoint(tmp_path / "out" / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32)
    tokens = torch.tensor([base.tokenizer.encode("the cat sat on the mat")])
    ours = reference_base(base, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.logits(ours(tokens)), theirs(tokens).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.gpu
@pytest.mark.skipif(
    not (HAS_CUDA_OPS and torch.cuda.is_available()),
    reason="needs an NVIDIA GPU, a CUDA build of torch and of recycle_ext",
)
def test_training_on_a_gpu_is_the_cpus_but_for_rounding(config_file, texts, tmp_path):
    """Joint, then a module on the base's own text."""
    losses = {}
    for device in ("cpu", "cuda"):
        out, attached = tmp_path / device, tmp_path / f"attached-{device}"
        assert joint(config_file, texts, out, "--steps", "40", "--device", device) == 0
        arguments = ["--base", str(tmp_path / "cpu" / "base"), "--self-generate", "4000", *SMALL]
        arguments += ["--draft-vocab", "100", "--steps", "40", "--device", device]
        assert command.main([*arguments, "--output", str(attached)]) == 0
        losses[device] = [
            json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["loss"]
            for folder in (out, attached)
        ]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)


def test_eagle_shape_has_no_norms_of_its_own(config_file, texts, tmp_path):
    assert joint(config_file, texts, tmp_path / "out", "--steps", "5", "--shape", "eagle") == 0
    fields = json.loads((tmp_path / "out" / "module" / "config.json").read_text())
    norms = ("embed_norm", "hidden_norm", "output_norm", "first_input_norm")
    assert not any(fields[norm] for norm in norms)


def test_online_training_is_the_same_but_for_rounding(config_file, texts, tmp_path):
    assert joint(config_file, texts, tmp_path / "out", "--steps", "20") == 0
    arguments = ["--base", str(tmp_path / "out" / "base"), "--text", str(texts), *SMALL]
    arguments += ["--steps", "20", "--draft-vocab", "0"]
    last = {}
    for name, more in (("stored", []), ("online", ["--online"])):
        assert command.main([*arguments, *more, "--output", str(tmp_path / name)]) == 0
        last[name] = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
    assert not list((tmp_path / "online").glob("read-*"))
    assert last["stored"]["loss"] == pytest.approx(last["online"]["loss"], rel=0.01)


def test_a_run_goes_on_where_it_was(config_file, texts, tmp_path, capsys):
    assert joint(config_file, texts, tmp_path / "whole", "--steps", "40") == 0
    cut = tmp_path / "cut"
    assert joint(config_file, texts, cut, "--steps", "40") == 0
    assert joint(config_file, texts, cut, "--steps", "40") == 2
    assert "is of an earlier run: give --resume" in capsys.readouterr().err
    assert joint(config_file, texts, cut, "--steps", "41", "--resume") == 2
    assert "--resume: steps is 41" in capsys.readouterr().err
    assert joint(config_file, texts, cut, "--steps", "40", "--resume") == 0
    name = Path("module") / "module.safetensors"
    assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_text_of_another_base_is_refused(config_file, texts, tmp_path, capsys):
    for seed in ("0", "1"):
        output = tmp_path / f"base{seed}"
        assert joint(config_file, texts, output, "--steps", "2", "--seed", seed) == 0
    output = str(tmp_path / "out")
    for seed, status in (("0", 0), ("1", 2)):
        arguments = ["--base", str(tmp_path / f"base{seed}" / "base"), "--output", output, *SMALL]
        arguments += ["--self-generate", "500", "--steps", "2", "--draft-vocab", "0"]
        assert command.main(arguments) == status
        (tmp_path / "out" / "training.pt").unlink(missing_ok=True)
    assert "text of another base model" in capsys.readouterr().err


def test_a_run_on_another_base_is_not_resumed(config_file, texts, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out"), *SMALL, "--steps", "2", "--draft-vocab", "0"]
    for seed, more, status in (("0", [], 0), ("1", ["--resume"], 2)):
        base = tmp_path / f"base{seed}"
        assert joint(config_file, texts, base, "--steps", "2", "--seed", seed) == 0
        arguments = ["--base", str(base / "base"), "--text", str(texts), "--online", *output]
        assert command.main([*arguments, *more]) == status
    assert "training.pt is of another base model" in capsys.readouterr().err


def test_out_of_memory_names_the_knobs(config_file, texts, tmp_path, capsys, monkeypatch):
    def no_memory(*_):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
        )

    monkeypatch.setattr(Trainer, "train_step", no_memory)
    assert joint(config_file, texts, tmp_path / "out", "--steps", "2") == 2
    error = capsys.readouterr().err
    assert "error: out of memory; a larger --accumulate, a smaller --batch-sequences" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--lr", "-1"], "--lr is -1.0; it must be positive"),
        (["--lr", "nan"], "--lr is nan; it must be positive"),
        (["--held-out", "1"], "--held-out is 1.0"),
        (["--chain", "5"], "--chain is 5; it must be 1 to 4"),
        (["--ema", "1"], "--ema is 1.0; it must be in [0, 1)"),
        (["--length", "1000"], "--length is 1000; the base's context is 512"),
        (["--draft-vocab", "1000"], "--draft-vocab is 1000; the base's vocabulary has 40"),
        (["--resume"], "--resume: there is no"),
        (["--base", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--joint", "c.json"], "--joint needs --text"),
        (["--shard-base"], "--shard-base needs --online"),
        (["--device", "cuda"], "--device is cuda; this torch sees no NVIDIA GPU"),
    ],
)
def test_a_users_mistake_is_one_line(base, tmp_path, capsys, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    output = str(tmp_path / "out")
    status = command.main(["--base", base.path, "--output", output, *arguments])
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not os.path.exists(os.path.join(output, "module.safetensors"))


def test_a_base_without_a_tokenizer_is_told(base, tmp_path, capsys):
    arguments = ["--base", base.path, "--output", str(tmp_path / "out"), "--draft-vocab", "0"]
    assert command.main(arguments) == 2
    assert "tokenizer.json: missing" in capsys.readouterr().err


def test_batches_that_do_not_divide_are_told(config_file, texts, tmp_path, capsys):
    assert joint(config_file, texts, tmp_path / "out", "--accumulate", "3") == 2
    assert (
        "--batch-sequences is 8; it must be a multiple of --accumulate" in capsys.readouterr().err
    )


def test_every_option_of_the_trainer_has_a_flag():
    """What the trainer can do, the command line can say."""
    given = vars(command.parse_arguments(["--output", "x"]))
    renamed = {"learning_rate": "lr", "warmup_steps": "warmup"}
    for field in dataclasses.fields(TrainOptions):
        assert given[renamed.get(field.name, field.name)] == field.default
    assert package.__doc__
