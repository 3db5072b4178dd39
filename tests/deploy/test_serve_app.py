"""The application that Ray Serve is given, and the files that describe it, as far as they go without a cluster."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from cluster.config import Config
from cluster.errors import ConfigError, StartupError
from deploy.serve_app import build, configuration
from kvstore.redis_server import EmbeddedRedis

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
REDIS = {"TANDEM_REDIS_URL": "redis://127.0.0.1:1/0"}


def of_serve() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    return config


def of_kubernetes() -> dict[str, Any]:
    (service,) = [
        part for part in yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text()) if part["kind"] == "RayService"
    ]
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


@pytest.mark.parametrize("config", [of_serve(), of_kubernetes()], ids=["serve.yaml", "kuberay.yaml"])
def test_serve_accepts_the_file_and_knows_every_word_of_it(config: dict[str, Any]) -> None:
    ServeDeploySchema.model_validate(config)
    assert config.keys() <= ServeDeploySchema.model_fields.keys()  # Serve itself passes over what it does not know
    assert config["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys()
    (application,) = config["applications"]
    assert application.keys() <= ServeApplicationSchema.model_fields.keys()
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    assert config["proxy_location"] == "HeadOnly"  # where the router is
    made = configuration(application["args"], REDIS)
    assert (made.prefill, made.decode, made.threads) == (1, 1, 8)


def test_both_files_describe_the_same_application() -> None:
    (here,), (there,) = of_serve()["applications"], of_kubernetes()["applications"]
    assert {**here, "args": {}} == {**there, "args": {}}
    assert here["args"].items() <= there["args"].items()


def test_arguments_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tandem.toml"
    file.write_text('redis_url = "redis://127.0.0.1:1/0"\nprefill = 2\ndecode = 2\nthreads = 2\n')
    made = configuration({"config": str(file), "decode": 3, "threads": 3}, {"TANDEM_THREADS": "4"})
    assert (made.prefill, made.decode, made.threads) == (2, 3, 3)
    assert made.kv_memory > 0  # resolved


@pytest.mark.parametrize(
    ("args", "environment", "message"),
    [
        ({}, {}, "redis_url: .* Redis that outlives it; deploy/head-redis.sh starts one"),
        ({"port": 9000}, REDIS, "port is Serve's here; set it under http_options"),
        ({"host": "0.0.0.0"}, REDIS, "host is Serve's here"),
        ({"prefil": 1}, REDIS, "unknown key 'prefil'; did you mean 'prefill'"),
        ({"config": "/nowhere.toml"}, REDIS, "cannot read /nowhere.toml"),
    ],
)
def test_what_is_refused(args: dict[str, Any], environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration(args, environment)


def test_a_redis_that_does_not_answer_is_found_before_anything_starts() -> None:
    with pytest.raises(StartupError, match="cannot reach Redis"):
        build({"redis_url": "redis://127.0.0.1:1/0"})


def test_the_router_and_the_keeper_are_on_the_head(tiny: Path) -> None:
    with contextlib.closing(EmbeddedRedis()) as redis:
        application = build({"model": str(tiny), "runner": "sim", "redis_url": redis.url})
    router = application._bound_deployment
    (keeper,) = [argument._bound_deployment for argument in router.init_args]
    assert (router.name, keeper.name) == ("router", "keeper")
    for deployment in (router, keeper):
        assert deployment.ray_actor_options["resources"] == {"node:__internal_head__": 0.001}
        assert deployment.num_replicas == 1
    (made,) = keeper.init_args
    assert isinstance(made.config, Config)
    assert made.identity.namespace == made.router.namespace
    assert made.identity.secret not in repr(made)
    assert redis.url not in repr(made)
