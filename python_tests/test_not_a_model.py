"""Files, directories and repositories that are no model: the error says what they are and what to do."""

from __future__ import annotations

import json
import pickle
import zipfile

import pytest
from models import write_base

from recycle_ext.checkpoint import hub
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.errors import RecycleError


def refusal(model) -> str:
    with pytest.raises(RecycleError) as caught:
        open_checkpoint(model)
    assert str(model) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty; the download has failed"),
        (b"tjgg\3\0\0\0", "llama.cpp's format before GGUF; convert the original model again"),
        (b"algg\1\0\0\0", "a LoRA adapter of llama.cpp's format before GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", '"git lfs pull" fetches'),
        (b"<!DOCTYPE html><html>", "a page of HTML or XML; the download has failed"),
        (b'{"architectures": ["LlamaForCausalLM"]}', "give the directory of a Hugging Face model"),
        (pickle.dumps({}, protocol=2), "a pickle, as weights of PyTorch"),
        (b"\x1f\x8b\x08\0", "an archive; unpack it first"),
        (b"anything else that is no model", "it does not start with GGUF"),
    ],
)
def test_file_of_another_kind_is_named(tmp_path, data, reason):
    (tmp_path / "model.gguf").write_bytes(data)
    message = refusal(tmp_path / "model.gguf")
    assert "not a GGUF file" in message
    assert reason in message


def test_file_of_a_directory_s_model_asks_for_the_directory(tmp_path):
    write_base(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert "give the directory of a Hugging Face model, not one of its files" in refusal(tmp_path / name)


def test_pytorch_file_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", "x" * 50)
    assert "a zip archive, as weights of PyTorch" in refusal(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["model.gguf.part2of3", "model.gguf-split-b", "model.gguf.002"])
def test_part_of_a_file_that_was_cut_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(range(100)))
    assert "one part of a file that was cut; join the parts" in refusal(tmp_path / name)


def test_directory_of_gguf_files_asks_for_the_file(tmp_path):
    for name in ("mmproj-model-f16.gguf", "model-Q4_K_M.GGUF", "readme.md"):
        (tmp_path / name).write_bytes(b"GGUF")
    wanted = f"a directory of GGUF files; give the one to run, such as {tmp_path / 'model-Q4_K_M.GGUF'}"
    assert wanted in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert wanted in refusal(tmp_path)


def test_directory_of_a_model_may_have_gguf_files_too(tmp_path):
    write_base(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert not open_checkpoint(tmp_path).is_gguf


@pytest.mark.parametrize(
    ("config", "base"), [({"base_model_name_or_path": "org/name"}, "org/name"), ({}, "its base"), ([], "its base")]
)
def test_adapter_directory_is_named_with_its_base(tmp_path, config, base):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert f"an adapter (LoRA or the like), not a model; merge it into {base} (peft: " in refusal(tmp_path)


def test_directory_in_its_maker_s_format_is_named(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    assert "(params.json); give its Hugging Face version or a GGUF file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ["README.md", "b-Q8_0.gguf", "a-Q4_K_M.gguf"],
            "a repository of GGUF files; fetch the one to run and give its path "
            "(hf download org/name a-Q4_K_M.gguf --local-dir .)",
        ),
        (["adapter_config.json", "adapter_model.safetensors"], "model org/name: an adapter (LoRA or the like)"),
    ],
)
def test_repository_without_a_model_is_named(tmp_path, monkeypatch, names, reason):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda _: names)
    with pytest.raises(RecycleError) as caught:
        hub.download("org/name")
    assert reason in str(caught.value)
