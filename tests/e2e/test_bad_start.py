"""`tandem serve` that cannot start: one clear line, a non-zero exit, no traceback, nothing left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import uuid
from pathlib import Path

import psutil
import pytest

from tests.serving import called, command, environment, marked, wait_until


def fails(*arguments: str, **more: str) -> str:
    """Its standard error, which must be one line; the command must have ended by itself."""
    mark = uuid.uuid4().hex
    done = subprocess.run(
        command("serve", *arguments), env=environment(mark, **more), capture_output=True, text=True, timeout=120
    )
    assert done.returncode not in (0, None), done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("tandem: ")
    wait_until(lambda: not marked(mark), 20, lambda: f"left behind: {[p.cmdline() for p in marked(mark)]}")
    return lines[0]


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_an_autoscaling_policy_that_is_not_there(tiny: Path) -> None:
    assert "unknown policy 'slow'" in fails(str(tiny), "--port", "0", "--autoscaling", "slow")
    assert "cannot import no.such:policy" in fails(str(tiny), "--port", "0", "--autoscaling", "no.such:policy")


def test_room_to_scale_that_the_first_workers_do_not_fit(tiny: Path) -> None:
    assert "not MIN..MAX around the 2 shards" in fails(str(tiny), "--port", "0", "--scale", "3..4")


def test_a_model_that_is_not_there() -> None:
    assert "/no/such/model" in fails("/no/such/model", "--port", "0")


def test_truncated_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in fails(str(copy), "--port", "0")


def test_truncated_weights_of_a_worker_of_several_shards(copy: Path) -> None:
    """One line, though every shard finds it out."""
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in fails(str(copy), "--port", "0", "--prefill", "0", "--decode-pp", "2")


def test_more_shards_than_the_model_can_be_cut_into(tiny: Path) -> None:
    message = fails(str(tiny), "--port", "0", "--decode-tp", "8")
    assert "--decode-tp 8" in message
    assert "use 1 to 4" in message


def test_an_unsupported_architecture(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    message = fails(str(copy), "--port", "0")
    assert "MambaForCausalLM" in message
    assert "LlamaForCausalLM" in message


def test_a_taken_port(tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        message = fails(str(tiny), "--port", port)
    assert port in message
    assert "--port" in message


@pytest.mark.parametrize(
    ("variable", "value", "word"),
    [
        ("TANDEM_SECRET", "hunter2", "16 characters"),
        ("TANDEM_REDIS_URL", "redis://u:pass/hunter2@127.0.0.1:1", "correct redis_url"),
        ("TANDEM_DISK", "/proc/kv", "correct `disk`"),
        ("TANDEM_DISK_MEMORY", str(2**60), "lower disk_memory"),
    ],
)
def test_a_setting_of_the_tier_that_cannot_be(tiny: Path, tmp_path: Path, variable: str, value: str, word: str) -> None:
    message = fails(str(tiny), "--port", "0", **{"TANDEM_DISK": str(tmp_path), variable: value})
    assert word in message
    assert "hunter2" not in message


def test_a_redis_that_does_not_answer(tiny: Path) -> None:
    message = fails(str(tiny), "--port", "0", "--redis-url", "redis://:hunter2@127.0.0.1:1/0")
    assert "127.0.0.1:1" in message
    assert "hunter2" not in message


def test_a_misspelt_setting(tiny: Path, tmp_path: Path) -> None:
    assert "did you mean 'prefill'" in fails(str(tiny), "--port", "0", TANDEM_PREFIL="1")
    (tmp_path / "c.toml").write_text("blocksize = 3\n")
    assert "did you mean 'block_size'" in fails(str(tiny), "--config", str(tmp_path / "c.toml"))


def test_a_context_longer_than_the_model_has(tiny: Path) -> None:
    assert "--max-context" in fails(str(tiny), "--port", "0", "--max-context", "1000000")


@pytest.mark.parametrize("child", ["redis-server", "raylet", "ray::WorkerActor", "ray::ShardActor"])
def test_ctrl_c_while_it_starts(tiny: Path, tmp_path: Path, child: str) -> None:
    """Interrupted as soon as a certain child exists, it stops what it has started."""
    mark = uuid.uuid4().hex
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command("serve", str(tiny), "--port", "0", "--decode-pp", "2"),
            stdout=log,
            stderr=log,
            env=environment(mark),
            start_new_session=True,
        )

    def exists() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        return any(called(p, child) for p in [*psutil.Process(process.pid).children(), *marked(mark)])

    wait_until(exists, 60)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    left = lambda: marked(mark) + [p for p in children if p.is_running()]  # noqa: E731
    wait_until(lambda: not left(), 20, lambda: f"left behind: {left()}")
