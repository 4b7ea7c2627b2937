"""Import paths of earlier versions: modules before the rooms, and recycle_ext.generate, a function and a command."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest

from recycle_ext import former_names

# What people imported from each module.
ATTRIBUTES = {
    "bandwidth": ["read_bandwidth"],
    "config": ["ModelConfig", "ModuleConfig", "rope_inv_freq"],
    "decoder": ["Decoder", "MODES"],
    "draft_policy": ["DraftPolicy"],
    "fetch": ["default_model_path"],
    "generation": ["Generation", "Statistics", "Model", "load", "generate"],
    "gguf_file": ["GgufHeader"],
    "gpu_prefill": ["prefill", "Matrix"],
    "graphed_step": ["GraphedStep"],
    "hf_directory": ["llama_json"],
    "hub": ["download"],
    "json_file": ["read_json"],
    "kv_cache": ["CACHE_DTYPES", "to_rows", "from_rows"],
    "module_checkpoint": ["open_module", "save_module", "ModuleCheckpoint"],
    "packing": ["pack_model", "PackedModel", "pack_matrix"],
    "reference_ops": ["attention_decode", "recycle_head", "ReferenceDecoder"],
    "safetensors_file": ["read_tensors"],
    "shapes": ["module_shapes"],
    "tensor_source": ["TensorSource"],
    "tokenizer": ["Tokenizer"],
}


# Runs each of the programs that it is given as {name: source}, as a fresh interpreter would, and prints
# {name: [exit status, standard output, standard error]}. Forked, because importing torch takes seconds.
DRIVER = """
import json, os, sys, tempfile, safetensors, tokenizers, torch

def run(source):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            status = 1
            try:
                exec(compile(source, "program", "exec"), {"__name__": "__main__"})
                status = 0
            except SystemExit as exit:
                status = exit.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        error.seek(0)
        return status, out.read().decode(), error.read().decode()

assert not any(name.startswith("recycle_ext") for name in sys.modules)
print(json.dumps({name: run(source) for name, source in json.load(sys.stdin).items()}))
"""


def run_fresh(programs: dict[str, str]) -> dict[str, tuple[int, str, str]]:
    """How programs end in interpreters that have imported torch and nothing of ours: status, output, errors."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    return {name: tuple(result) for name, result in json.loads(done.stdout).items()}


def test_every_former_module_is_tested():
    assert set(ATTRIBUTES) == set(former_names._NOW)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_former_module_warns_and_has_what_it_had(name):
    sys.modules.pop(f"recycle_ext.{name}", None)
    with pytest.warns(DeprecationWarning, match=rf"recycle_ext\.{name} is now recycle_ext\.\w+"):
        module = importlib.import_module(f"recycle_ext.{name}")
    for attribute in ATTRIBUTES[name]:
        found = getattr(module, attribute)
        homes = [importlib.import_module(f"recycle_ext.{home}") for home in former_names._NOW[name].split()]
        assert any(getattr(home, attribute, None) is found for home in homes)
    with pytest.raises(AttributeError, match=f"module 'recycle_ext.{name}' has no attribute 'x'"):
        module.x  # noqa: B018


def test_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'recycle_ext\.nowhere'"):
        importlib.import_module("recycle_ext.nowhere")
    with pytest.raises(ModuleNotFoundError, match=r"recycle_ext\.decoding\.packing"):
        importlib.import_module("recycle_ext.decoding.packing")


COMMANDS = ("generate", "train", "train.draft_vocab", "eval", "bench", "convert")
IMPORTS_BEFORE_GENERATE = [
    "import recycle_ext.generate",
    "from recycle_ext.generate import generate",
    "from recycle_ext.generate import main; assert callable(main)",
    "import recycle_ext.generate.__main__",
    "from recycle_ext.generate.generation import Statistics",
    "import recycle_ext, importlib; importlib.import_module('recycle_ext.generate')",
    "import pkgutil, recycle_ext; assert len(list(pkgutil.walk_packages(recycle_ext.__path__, 'recycle_ext.'))) > 40",
    "; ".join(f"import recycle_ext.{name}" + ("" if "." in name else ".__main__") for name in COMMANDS),
    "import recycle_ext, warnings; warnings.simplefilter('ignore'); from recycle_ext.generation import generate",
]
IS_FUNCTION = "import recycle_ext, types; print(isinstance(recycle_ext.generate, types.FunctionType))"
NEW_NAMES = sorted({home for homes in former_names._NOW.values() for home in homes.split()})
HELP = """
import runpy, sys, warnings
warnings.simplefilter("error", RuntimeWarning)
sys.argv[1:] = ["--help"]
runpy.run_module("recycle_ext.{}", run_name="__main__", alter_sys=True)
"""
OLD_IMPORT = "import warnings; warnings.simplefilter('default')\n\nfrom recycle_ext.decoder import Decoder"


@pytest.fixture(scope="module")
def fresh() -> dict[str, tuple[int, str, str]]:
    """How the programs of the tests below end."""
    programs = {imports: f"{imports}; {IS_FUNCTION}" for imports in IMPORTS_BEFORE_GENERATE}
    programs |= {f"help of {name}": HELP.format(name) for name in COMMANDS}
    programs["new names"] = "import warnings; warnings.simplefilter('error', DeprecationWarning); "
    programs["new names"] += "; ".join(f"import recycle_ext.{name}" for name in NEW_NAMES)
    programs["old import"] = OLD_IMPORT
    return run_fresh(programs)


@pytest.mark.parametrize("imports", IMPORTS_BEFORE_GENERATE)
def test_generate_is_a_function_whatever_is_imported(fresh, imports):
    assert fresh[imports] == (0, "True\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_command_starts_without_a_warning(fresh, name):
    status, output, errors = fresh[f"help of {name}"]
    assert (status, errors) == (0, "")
    assert output.startswith(f"usage: python -m recycle_ext.{name} ")


def test_new_names_do_not_warn(fresh):
    assert fresh["new names"] == (0, "", "")


def test_former_module_warns_at_the_line_that_imports(fresh):
    """Python shows a DeprecationWarning only where it points into the program itself."""
    status, output, errors = fresh["old import"]
    assert (status, output) == (0, "")
    assert errors.startswith("program:3: DeprecationWarning: recycle_ext.decoder is now")
