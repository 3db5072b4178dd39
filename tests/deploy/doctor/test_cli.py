"""`tandem doctor` finds what is wrong: each planted fault with advice, and no other error with it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import redis
from typer.testing import CliRunner

from cluster.config import MIB, SHM
from deploy.cli import app
from kvstore.redis_server import EmbeddedRedis
from tests.workers.gguf_files import byte_vocabulary, metadata_of, random_model, tensors_of, write_gguf

CLOCK = re.compile(rb"\*2\r\n\$10\r\n(\d{10})\r\n")  # the answer to TIME
WRONG_S = 100
FEW_RIGHTS = "ACL SETUSER few on >hidden ~tandem:* -@all +ping +select +time"


class Diagnosis:
    def __init__(self, *arguments: str, **environment: str) -> None:
        self.result = CliRunner().invoke(app, ["doctor", "--json", "--port", "0", *arguments], env=environment)
        assert self.result.exit_code in (0, 1), (self.result.output, self.result.exception)
        said: dict[str, Any] = json.loads(self.result.stdout)
        self.findings = {finding["check"]: finding for finding in said["findings"]}
        self.errors: int = said["errors"]

    def level(self, check: str) -> str:
        return str(self.findings[check]["level"])

    def found(self, check: str, level: str, words: str) -> bool:
        """It, and no other error."""
        finding = self.findings[check]
        errors = {name for name, other in self.findings.items() if other["level"] == "error"}
        assert (finding["level"], bool(finding["advice"])) == (level, True), finding
        assert words in finding["found"], finding
        assert errors <= {check}, self.findings
        assert self.result.exit_code == (1 if level == "error" else 0)
        return True


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    made = EmbeddedRedis()
    yield made
    made.close()


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_where_all_is_well_there_is_no_error(tiny: Path, server: EmbeddedRedis, tmp_path: Path) -> None:
    well = Diagnosis(
        str(tiny), "--redis-url", server.url, "--disk", str(tmp_path / "new"), TANDEM_DISK_MEMORY="2000000"
    )
    assert (well.errors, well.result.exit_code) == (0, 0), well.findings
    expected = {"configuration", "Python", "port", "model", "disk tier", "GPUs", "Redis", "clock", "Ray", "HAProxy"}
    assert {check for check in expected if well.level(check) != "ok"} == set(), well.findings
    assert not (tmp_path / "new").exists()
    assert server.url.split("@")[0].split(":")[-1] not in well.result.output  # the password


def test_1_an_occupied_port(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        assert Diagnosis(str(tiny), "--port", str(number)).found(
            "port", "error", f"127.0.0.1:{number} cannot be listened"
        )


def test_2_a_redis_that_refuses(tiny: Path, server: EmbeddedRedis) -> None:
    nobody = Diagnosis(str(tiny), "--redis-url", "redis://:hidden@127.0.0.1:1/0")
    assert nobody.found("Redis", "error", "127.0.0.1:1/0 does not answer")
    stranger = Diagnosis(str(tiny), "--redis-url", re.sub(r":\w+@", ":hidden@", server.url))
    assert stranger.found("Redis", "error", "does not answer")
    assert "hidden" not in nobody.result.output + stranger.result.output


def test_a_redis_user_with_just_the_rights_that_are_needed_is_enough(tiny: Path, server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.execute_command(*FEW_RIGHTS.split())
    few = Diagnosis(str(tiny), "--redis-url", re.sub(r"//:\w+@", "//few:hidden@", server.url))
    assert (few.level("Redis"), few.level("clock")) == ("ok", "ok"), few.findings


def test_3_a_redis_that_evicts_whatever_it_likes(tiny: Path, server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", 64 * MIB)
        try:
            assert Diagnosis(str(tiny), "--redis-url", server.url).found("Redis", "warning", "allkeys-lru")
        finally:
            client.config_set("maxmemory", 0)


def test_4_a_model_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert Diagnosis(str(copy)).found("model", "error", "model.safetensors")


def test_5_truncated_weights(copy: Path, tmp_path: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert Diagnosis(str(copy)).found("model", "error", "incomplete")
    model = random_model("llama")
    file = write_gguf(tmp_path / "model.gguf", metadata_of(model) | byte_vocabulary(), tensors_of(model))
    assert Diagnosis(str(file)).level("model") == "ok"
    file.write_bytes(file.read_bytes()[:-1000])
    assert Diagnosis(str(file)).found("model", "error", "damaged or incomplete")


def test_6_too_little_shared_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container has by default."""
    usage = psutil.disk_usage

    def container(path: str) -> object:
        return SimpleNamespace(total=64 * MIB, free=64 * MIB) if path == SHM else usage(path)

    monkeypatch.setattr(psutil, "disk_usage", container)
    assert Diagnosis(str(tiny)).found("shared memory", "warning", "64 MiB free")


def test_7_a_disk_folder_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert Diagnosis(str(tiny), "--disk", str(tmp_path / "file" / "kv")).found(
        "disk tier", "error", "cannot be written"
    )


def test_8_a_setting_that_there_is_not_and_a_value_that_cannot_be(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "tandem.toml"
    file.write_text("prefil = 1\n")
    unknown = Diagnosis(str(tiny), "--config", str(file))
    assert unknown.found("configuration", "error", "unknown key 'prefil'")
    assert "did you mean 'prefill'" in unknown.findings["configuration"]["advice"]
    assert Diagnosis(str(tiny), TANDEM_DECODE="many").found("configuration", "error", "decode: ")


def test_9_another_ray_and_no_haproxy(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Diagnosis(str(tiny), RAY_SERVE_HAPROXY_BINARY_PATH=str(tmp_path / "none"))
    assert missing.found("HAProxy", "error", "none")
    other = tmp_path / "site" / "ray-2.9.3.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.9.3\n")
    monkeypatch.syspath_prepend(str(other.parent))
    assert Diagnosis(str(tiny)).found("Ray", "error", "2.9.3 is installed")


def test_10_more_workers_than_cores(tiny: Path) -> None:
    many = Diagnosis(str(tiny), TANDEM_DECODE="500", TANDEM_THREADS="1", TANDEM_RUNNER="sim", TANDEM_KV_MEMORY="1")
    finding = many.findings["cores"]
    assert (finding["level"], "501 shards x 1 threads" in finding["found"]) == ("warning", True)


def test_11_a_clock_that_is_wrong(tiny: Path, server: EmbeddedRedis) -> None:
    with wrong_clock(server) as url:
        wrong = Diagnosis(str(tiny), "--redis-url", url)
    assert wrong.found("clock", "warning", "it differs from Redis's by +")
    assert WRONG_S - 10 < float(wrong.findings["clock"]["found"].split("+")[1].split()[0]) < WRONG_S + 10
    assert wrong.level("Redis") == "ok"


def test_12_a_cluster_that_is_not_there(tiny: Path) -> None:
    lost = Diagnosis(str(tiny), RAY_ADDRESS="127.0.0.1:1")
    assert lost.found("Ray", "error", "127.0.0.1:1 does not take us")


def test_the_table_says_what_to_do(tiny: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tiny), "--redis-url", "redis://127.0.0.1:1"], env={"COLUMNS": "80"})
    assert result.exit_code == 1
    assert "→ start it, or correct redis_url" in result.stdout
    assert "…" not in result.stdout


@contextmanager
def wrong_clock(server: EmbeddedRedis) -> Iterator[str]:
    """The same Redis through a proxy that sets its clock forward."""
    host, port = "127.0.0.1", int(server.url.rpartition(":")[2].split("/")[0])

    class Proxy(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((host, port)) as upstream:
                forward = threading.Thread(target=pump, args=(self.request, upstream, lambda data: data), daemon=True)
                forward.start()
                pump(upstream, self.request, later)
                forward.join(5)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server((host, 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield server.url.replace(f":{port}/", f":{proxy.server_address[1]}/")
        proxy.shutdown()


def pump(source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes]) -> None:
    while data := source.recv(65536):
        target.sendall(change(data))
    target.shutdown(socket.SHUT_WR)


def later(data: bytes) -> bytes:
    return CLOCK.sub(lambda match: b"*2\r\n$10\r\n%d\r\n" % (int(match[1]) + WRONG_S), data)
