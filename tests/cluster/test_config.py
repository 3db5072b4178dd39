from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster.config import MIB, SHM, Config, load, resolved
from cluster.errors import ConfigError


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    path = tmp_path / "tandem.toml"
    path.write_text('port = 1\ndtype = "float32"\nprefill = 3\n')
    config = load(path, {"TANDEM_PORT": "2", "TANDEM_PREFILL": "4", "OTHER": "x"}, {"port": 3})
    assert (config.port, config.prefill, config.dtype, config.decode) == (3, 4, "float32", 1)


@pytest.mark.parametrize(
    ("file", "environment", "flags", "source"),
    [
        ("prefil = 1", {}, {}, "tandem.toml"),
        ("", {"TANDEM_PREFIL": "1"}, {}, "environment"),
        ("", {}, {"prefil": 1}, "command line"),
    ],
)
def test_an_unknown_key_names_its_source_and_the_nearest_known_one(
    tmp_path: Path, file: str, environment: dict[str, str], flags: dict[str, int], source: str
) -> None:
    path = tmp_path / "tandem.toml"
    path.write_text(file)
    with pytest.raises(ConfigError, match=rf"{source}.*prefil.*did you mean 'prefill'"):
        load(path, environment, flags)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"port": 70000}, "port"),
        ({"dtype": "float64"}, "dtype"),
        ({"decode": 0}, "decode"),
        ({"prefill": "x"}, "prefill"),
    ],
)
def test_a_bad_value_names_the_field(flags: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=f"command line: {field}: "):
        load(None, {}, flags)


def test_a_short_secret_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"environment.*secret: .*16 characters; take the output of") as caught:
        load(None, {"TANDEM_SECRET": "hunter2"}, {})
    assert "hunter2" not in caught.value.message
    assert load(None, {"TANDEM_SECRET": "x" * 16}, {}).secret == "x" * 16


def test_an_operator_key_that_a_tenant_has_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="configuration: operator_key: is one of api_keys too") as caught:
        load(None, {"TANDEM_API_KEYS": "a,hunter2", "TANDEM_OPERATOR_KEY": "hunter2"}, {})
    assert "hunter2" not in caught.value.message


def test_a_file_that_is_not_there_or_not_toml_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.toml", {}, {})
    (tmp_path / "bad.toml").write_text("port = = 1")
    with pytest.raises(ConfigError, match="not TOML"):
        load(tmp_path / "bad.toml", {}, {})


def test_api_keys_are_a_comma_separated_list_in_the_environment() -> None:
    assert load(None, {"TANDEM_API_KEYS": "a,b"}, {}).api_keys == ("a", "b")


def test_resolved_replaces_every_auto_and_changes_nothing_else() -> None:
    config = Config(port=9)
    done = resolved(config)
    assert done.dtype in ("float32", "bfloat16")
    assert min(done.threads, done.kv_memory, done.store_memory) > 0
    assert done.port == 9
    assert config == Config(port=9)
    given = Config(dtype="float32", threads=3, kv_memory=10, store_memory=11)
    assert resolved(given) == given


def test_workers_on_gpus_look_for_themselves_how_much_memory_is_left() -> None:
    done = resolved(Config(runner="cuda", store_memory=11))
    assert (done.dtype, done.kv_memory) == ("bfloat16", 0)
    assert resolved(Config(runner="cuda", kv_memory=10, store_memory=11)).kv_memory == 10


def test_little_shared_memory_means_files_and_one_line_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = psutil.disk_usage

    def container(path: str) -> object:
        return SimpleNamespace(free=64 * MIB) if path == SHM else usage(path)

    monkeypatch.setattr(psutil, "disk_usage", container)
    assert resolved(Config()).store_memory > 64 * MIB
    assert [record.getMessage().count("shm-size") for record in caplog.records] == [1]
    assert resolved(Config(store_memory=5)).store_memory == 5
    assert len(caplog.records) == 1


def test_there_are_few_knobs_and_each_is_documented() -> None:
    assert len(Config.model_fields) < 40
    assert all(field.description for field in Config.model_fields.values())


def test_the_documentation_lists_every_setting_as_it_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for name, field in Config.model_fields.items():
        default = "" if field.default in ("", ()) else f"`{field.default}`"
        assert f"| `{name}` | {default} | {field.description} |" in text


def test_shards_of_workers_by_role() -> None:
    config = Config(prefill=2, decode=3, prefill_tp=2, decode_tp=3, decode_pp=2)
    assert config.roles == (("prefill", 2), ("decode", 3))
    assert (config.grid("prefill"), config.grid("decode")) == ((2, 1), (3, 2))
    assert config.shards == 2 * 2 + 3 * 6
    both = Config(prefill=0, decode=2, decode_pp=2)
    assert both.roles == (("both", 2),)
    assert (both.grid("both"), both.shards) == ((1, 2), 4)


def test_threads_are_shared_by_all_shards_and_memory_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=800))
    done = resolved(Config(prefill_tp=3, store_memory=1))
    assert (done.threads, done.kv_memory) == (4, 100)
    assert resolved(Config(decode_tp=4, decode_pp=5, store_memory=1)).threads == 1


def test_shards_of_prefill_workers_that_there_are_none_of() -> None:
    with pytest.raises(ConfigError, match=r"prefill_tp, prefill_pp: .*set decode_tp and decode_pp"):
        load(None, {}, {"prefill": 0, "prefill_tp": 2})


def test_token_ids_are_not_quantized() -> None:
    assert load(None, {}, {"kv_quantization": "int8"}).kv_quantization == "int8"
    with pytest.raises(ConfigError, match=r"kv_quantization.*sim"):
        load(None, {}, {"kv_quantization": "int8", "runner": "sim"})


@pytest.mark.parametrize(("name", "dtype"), [("int8-cache", "int8"), ("e4m3-cache", "float8_e4m3fn")])
def test_caches_in_8_bits_are_for_gpus(name: str, dtype: str) -> None:
    assert load(None, {}, {"kv_quantization": name, "runner": "cuda"}).kv_dtype == dtype
    for runner in ("torch", "sim"):
        with pytest.raises(ConfigError, match="kv_quantization"):
            load(None, {}, {"kv_quantization": name, "runner": runner})
    assert load(None, {}, {"kv_quantization": "int8", "runner": "cuda"}).kv_dtype == ""


def test_workers_that_may_be_started_later_have_their_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=800))
    alone, elastic = (resolved(Config(scale=scale, store_memory=1)) for scale in ("", "2..8"))
    assert (alone.threads, alone.kv_memory) == (8, 100)
    assert (elastic.threads, elastic.kv_memory) == (2, 25)
