"""The files that an operator starts from: valid by the rules of those who read them, and in step with this version.

What they start is tested in `tests/e2e/test_three_nodes.py`; no cloud and no image registry is reached from here.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.label_utils import parse_node_labels_string
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.config import Config, load
from cluster.messages import Role
from deploy.node_roles import ROLE_LABEL, Node, pinned
from deploy.placement import check_nodes

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CLUSTERS = ("cluster-local.yaml", "cluster-aws.yaml", "cluster-gcp.yaml")
WITH_TYPES = ("cluster-aws.yaml", "cluster-gcp.yaml")


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return content


def pinned_version(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert match
    return match[1]


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_accepts_the_file_and_would_not_accept_a_slip(name: str) -> None:
    validate_config(prepare_config(read(name)))
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config({**read(name), "idle_timeout": 10}))


@pytest.mark.parametrize("name", WITH_TYPES)
def test_roles_have_node_types_and_the_head_has_no_room_for_workers(name: str) -> None:
    config = read(name)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == head["max_workers"] == 0
    assert sum(kind["max_workers"] for kind in types.values()) <= config["max_workers"]
    assert all(kind["min_workers"] >= 1 for kind in types.values())
    nodes = [
        Node.of({"Resources": kind["resources"], "Labels": kind.get("labels", {})}) for kind in (head, *types.values())
    ]
    roles: tuple[Role, ...] = ("prefill", "decode")
    for role in roles:
        by_label = [node.label for node in nodes if pinned(role, nodes).allows(node)]
        assert by_label == [role]
        unlabelled = [Node(node.cpus, "", node.resources) for node in nodes]
        by_resource = [node.resources for node in unlabelled if pinned(role, unlabelled).allows(node)]
        assert by_resource == [frozenset({"CPU", f"tandem-{role}"})]
    check_nodes(Config(threads=8), nodes)


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_the_nodes_install_is_this_version(name: str) -> None:
    config = read(name)
    assert any(f"torch=={pinned_version('torch')}" in command for command in config["setup_commands"])
    installs = [command for command in config["setup_commands"] if "pip install" in command]
    assert all("-c ~/tandem/constraints.txt" in command for command in installs)
    assert config["file_mounts"]["~/tandem"] == "."
    assert ".git" in config["rsync_exclude"]
    image = config.get("docker", {}).get("image", "")
    assert f":{pinned_version('ray')}-py311" in image or name == "cluster-local.yaml"


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_is_closed_to_strangers_and_redis_is_not_on_its_port(name: str) -> None:
    config = read(name)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starting = [command for command in starts if "ray start" in command]
    assert len(starting) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starting)
    assert "RAY_REDIS_ADDRESS=127.0.0.1:6380" in starting[0]
    assert "--port=6379" in starting[0]
    assert "~/.ray/auth_token" in config["file_mounts"]


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        (["10.0.0.2"], "tandem.role=prefill\n"),
        (["10.0.0.9", "decoder"], "tandem.role=decode\n"),
        (["10.0.0.22"], ""),
    ],
)
def test_a_machine_finds_its_role_by_address_or_name(machine: list[str], says: str, tmp_path: Path) -> None:
    roles = tmp_path / "roles.txt"
    roles.write_text("# address role\n\n10.0.0.2 prefill # the fast one\ndecoder decode")
    assert label(roles, *machine).stdout == says


def test_a_role_that_there_is_not_is_named(tmp_path: Path) -> None:
    roles = tmp_path / "roles.txt"
    roles.write_text("10.0.0.2 prefil\n")
    refused = label(roles, "10.0.0.3")
    assert refused.returncode == 1
    assert "10.0.0.2 has the role 'prefil'; write prefill or decode" in refused.stderr


def test_the_roles_of_the_example_are_of_its_machines() -> None:
    machines = read("cluster-local.yaml")["provider"]["worker_ips"]
    found = [label(DEPLOY / "roles.txt", machine).stdout.strip() for machine in machines]
    assert [parse_node_labels_string(text) for text in found] == [{ROLE_LABEL: "prefill"}, {ROLE_LABEL: "decode"}]
    assert parse_node_labels_string(label(DEPLOY / "roles.txt", "198.51.100.1").stdout) == {}


def label(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(DEPLOY / "role-label.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=10)


def test_the_example_configuration_has_every_setting_at_its_default() -> None:
    text = (DEPLOY / "tandem.toml").read_text()
    assert load(DEPLOY / "tandem.toml", {}, {}) == Config()
    settings = tomllib.loads(re.sub(r"^# (?=\w+ = )", "", text, flags=re.M))
    assert list(settings) == list(Config.model_fields)
    assert Config(**settings) == Config()


def test_kubernetes_nodes_have_roles_in_the_eyes_of_rays_autoscaler() -> None:
    (service,) = [part for part in documents() if part["kind"] == "RayService"]
    spec = service["spec"]["rayClusterConfig"]
    assert spec["rayVersion"] == pinned_version("ray")
    assert spec["authOptions"] == {"mode": "token"}
    cluster = {"metadata": {"name": "tandem", "namespace": "default"}, "spec": spec}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert {name: kind["labels"] for name, kind in types.items()} == {
        "prefill": {ROLE_LABEL: "prefill"},
        "decode": {ROLE_LABEL: "decode"},
    }
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    nodes = [Node(kind["resources"]["CPU"], kind["labels"][ROLE_LABEL]) for kind in types.values()]
    check_nodes(Config(**application["args"]), nodes)


def test_every_pod_on_kubernetes_has_the_model_and_the_secrets() -> None:
    """Serve builds the application on any of them."""
    (secret,) = [part for part in documents() if part["kind"] == "Secret"]
    (service,) = [part for part in documents() if part["kind"] == "RayService"]
    spec = service["spec"]["rayClusterConfig"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
        assert [init["command"][:2] for init in pod["initContainers"]] == [["tandem", "fetch"]]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]} == {"shm", "models"}


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text()))


def test_compose_builds_this_version_and_mounts_what_is_there() -> None:
    services = read("compose.yaml")["services"]
    tandem = services["tandem"]
    assert tandem["image"] == f"tandem:{tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}"
    assert (DEPLOY / tandem["build"]["context"] / tandem["build"]["dockerfile"]).is_file()
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    mounts = [mount.split(":")[0] for service in services.values() for mount in service.get("volumes", [])]
    here = [mount for mount in mounts if mount.startswith("./") and not mount.startswith("./monitoring/")]
    assert here
    assert all((DEPLOY / mount).exists() for mount in here)


def test_the_image_is_of_this_version_and_not_run_by_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert f"BASE=rayproject/ray:{pinned_version('ray')}-py311-cpu" in text
    assert f"torch=={pinned_version('torch')}" in text
    assert re.findall(r"^USER (\S+)", text, re.M) == ["1000"]
    assert "HEALTHCHECK" in text


def test_the_dockerfile_has_none_of_the_faults_that_hadolint_knows() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    linter = Path(sys.executable).parent / "hadolint"  # the wheel's: the environment need not be on the PATH
    checked = subprocess.run([linter, "-"], input=text, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
