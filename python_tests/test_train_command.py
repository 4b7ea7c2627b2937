"""python -m recycle_ext.train from options to saved models: joint training, then modules for the base it gave."""

from __future__ import annotations

import json

import pytest
import torch
from models import reference_base
from safetensors.torch import load_file
from train_model import SMALL, log_rows, train_joint, write_text

import recycle_ext
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.ops.registration import HAS_CUDA_OPS
from recycle_ext.train import __main__ as command


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """The output directory of a joint run of 80 steps."""
    folder = tmp_path_factory.mktemp("joint")
    assert train_joint(folder, folder / "out", "--steps", "80") == 0
    return folder / "out"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_text(tmp_path_factory.mktemp("text")))


def test_verify_with_trained_modules_equals_standard(joint, tmp_path, capfd):
    """A user's whole way: base and module from scratch, then a module for that base on the base's own text."""
    base, output = joint / "base", tmp_path / "attached"
    arguments = ["--base", str(base), "--output", str(output), "--draft-vocab", "100"]
    arguments += ["--self-generate", "4000", "--steps", "40"]
    assert command.main([*arguments, *SMALL]) == 0
    for module in (joint / "module", output):
        model = recycle_ext.load(base, module=module)
        generations = {
            mode: recycle_ext.generate(model, "the cat", mode=mode, max_new_tokens=40)
            for mode in ("standard", "verify")
        }
        for generation in generations.values():
            list(generation)
        assert generations["verify"].token_ids == generations["standard"].token_ids
        assert generations["verify"].statistics.acceptance_rate > 0
    rows = log_rows(output)
    assert [row["step"] for row in rows] == [20, 40]
    figures = {"loss", "learning_rate", "tokens_per_second", "acceptance_1", "acceptance_4"}
    assert figures <= rows[0].keys()
    assert (output / "log.png").exists()


def test_module_from_another_starts_with_lower_loss(joint, text, tmp_path, capsys):
    arguments = ["--base", str(joint / "base"), "--text", text, *SMALL]
    arguments += ["--steps", "20", "--draft-vocab", "0"]
    loss = {}
    for name, more in (("new", []), ("from", ["--from", str(joint / "module")])):
        assert command.main([*arguments, *more, "--output", str(tmp_path / name)]) == 0
        loss[name] = log_rows(tmp_path / name)[0]["loss"]
    assert loss["from"] < loss["new"]
    arguments += ["--from", str(tmp_path / "from")]
    more = ["--layers", "2", "--output", str(tmp_path / "more")]
    assert command.main([*arguments, *more]) == 0
    assert "layers.1.mlp.up_proj.weight" in load_file(tmp_path / "more" / "module.safetensors")
    assert command.main([*arguments, "--shape", "eagle", "--output", str(tmp_path / "no")]) == 2
    assert "tensor embed_norm.weight is [32]; --layers and --shape ask for no such tensor" in (capsys.readouterr().err)


def test_joint_without_module_weight_trains_the_base_alone(tmp_path):
    output = tmp_path / "out"
    assert train_joint(tmp_path, output, "--steps", "5", "--module-weight", "0") == 0
    assert (output / "base" / "model.safetensors").exists()
    assert not (output / "module").exists()
    assert "held_out_module_loss" not in log_rows(output)[-1]


def test_joint_training_lowers_both_losses(joint):
    first, *_, last = log_rows(joint)
    assert last["held_out_loss"] < 0.8 * first["held_out_loss"]
    assert last["held_out_module_loss"] < 0.9 * first["held_out_module_loss"]


def test_transformers_reads_a_trained_base(joint):
    from transformers import AutoModelForCausalLM

    base = open_checkpoint(joint / "base")
    theirs = AutoModelForCausalLM.from_pretrained(joint / "base", dtype=torch.float32)
    tokens = torch.tensor([base.tokenizer.encode("the cat sat on the mat")])
    ours = reference_base(base, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(
    not (HAS_CUDA_OPS and torch.cuda.is_available()),
    reason="needs an NVIDIA GPU, a CUDA build of torch and of recycle_ext",
)
def test_loss_on_gpu_equals_cpus_but_for_rounding(tmp_path):
    """Joint, then a module on the base's own text."""
    losses = {}
    for device in ("cpu", "cuda"):
        out, attached = tmp_path / device, tmp_path / f"attached-{device}"
        assert train_joint(tmp_path, out, "--steps", "40", "--device", device) == 0
        arguments = ["--base", str(tmp_path / "cpu" / "base"), "--self-generate", "4000", *SMALL]
        arguments += ["--draft-vocab", "100", "--steps", "40", "--device", device]
        assert command.main([*arguments, "--output", str(attached)]) == 0
        losses[device] = [log_rows(folder)[-1]["loss"] for folder in (out, attached)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)


def test_module_of_eagle_shape_has_no_norms_besides_its_layers(tmp_path):
    assert train_joint(tmp_path, tmp_path / "out", "--steps", "5", "--shape", "eagle") == 0
    fields = json.loads((tmp_path / "out" / "module" / "config.json").read_text())
    norms = ("embed_norm", "hidden_norm", "output_norm", "first_input_norm")
    assert not any(fields[norm] for norm in norms)


def test_online_loss_equals_stored_states_loss(joint, text, tmp_path):
    arguments = ["--base", str(joint / "base"), "--text", text, *SMALL]
    arguments += ["--steps", "20", "--draft-vocab", "0"]
    last = {}
    for name, more in (("stored", []), ("online", ["--online"])):
        assert command.main([*arguments, *more, "--output", str(tmp_path / name)]) == 0
        last[name] = log_rows(tmp_path / name)[-1]
    assert not list((tmp_path / "online").glob("read-*"))
    assert last["stored"]["loss"] == pytest.approx(last["online"]["loss"], rel=0.01)
