"""The import directions of docs/architecture.md, pinned by reading every import statement."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "cluster": set(),
    "kernels": set(),
    "kvstore": {"cluster", "kernels"},
    "workers": {"cluster", "kvstore", "kernels"},
    "router": {"cluster", "kvstore"},
    "deploy": {"cluster", "kvstore", "workers", "router", "kernels", "loadtests"},
    "loadtests": {"cluster", "router", "kvstore"},
}
KVSTORE_FOR_ROUTER = {"kvstore.hashing", "kvstore.layout", "kvstore.mirror", "kvstore.prefix_map"}
# what decides, and nothing that acts: the simulator runs the same policies as the cluster
PURE = {
    "router": {
        "router.placement",
        "router.costs",
        "router.policies",
        "router.table",
        "router.admission",
        "router.fair_queue",
        "router.expectations",
    },
    "kvstore": {"kvstore.prefix_map", "kvstore.blocks", "kvstore.eviction", "kvstore.hashing"},
}
NO_TORCH = ("cluster", "router", "kvstore")
RAY_FILES = {
    *("deploy/actors.py", "deploy/front_door.py", "deploy/launch.py"),
    *("deploy/node_stores.py", "deploy/process.py", "deploy/serve_app.py", "deploy/workforce.py"),
    "deploy/doctor/ray_probe.py",
}


def imports(path: Path) -> set[str]:
    """Every module a file imports, as dotted names; `from a import b` counts as a.b too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_packages_import_only_what_they_may() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {top}"
        for package, allowed in MAY_IMPORT.items()
        for path in files(package)
        for top in tops(imports(path)) & MAY_IMPORT.keys() - allowed - {package}
    ]
    assert wrong == []


def test_router_uses_only_the_pure_parts_of_kvstore() -> None:
    wrong = {
        (path.name, name)
        for path in files("router")
        for name in imports(path)
        if name.startswith("kvstore.") and not any(name.startswith(pure) for pure in KVSTORE_FOR_ROUTER)
    }
    assert wrong == set()


def test_loadtests_use_only_pure_policies() -> None:
    wrong = {
        (path.name, name)
        for path in files("loadtests")
        for name in imports(path)
        for top, allowed in PURE.items()
        if name.startswith(f"{top}.") and not any(name.startswith(pure) for pure in allowed)
    }
    assert wrong == set()


def test_torch_and_ray_stay_where_they_belong() -> None:
    torch = [str(p) for package in NO_TORCH for p in files(package) if {"torch", "transformers"} & tops(imports(p))]
    ray = {str(p.relative_to(ROOT)) for package in MAY_IMPORT for p in files(package) if "ray" in tops(imports(p))}
    assert torch == []
    assert ray <= RAY_FILES


def test_only_processes_that_compute_wait_for_torch() -> None:
    """The command, stores, routers and simulated workers start in half the time without."""
    code = (
        "import sys, deploy.actors, deploy.cli, deploy.front_door, deploy.launch\n"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert out.stdout.strip() == "set()"


def test_transformers_is_not_confused_by_a_package_called_kernels() -> None:
    """transformers probes for a distribution named `kernels`; ours must not look like it."""
    code = (
        "import kernels, transformers\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "c = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, "
        "vocab_size=64)\n"
        "print(LlamaForCausalLM(c).num_parameters() > 0)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert out.stdout.strip() == "True"


def test_files_stay_small() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for package in MAY_IMPORT
        for p in files(package)
        if (n := len(p.read_text().splitlines())) > 300
    }
    assert long == {}


def test_the_large_folders_have_a_map_of_all_their_files() -> None:
    for package in ("kvstore", "workers"):
        text = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())) or ""
        names = {p.stem for p in (ROOT / package).glob("*.py")} - {"__init__"}
        assert names - set(text.replace("(", " ").replace(";", " ").split()) == set(), package


WALL_CLOCK = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"}
# what people and other programs read, a worker's incarnation, files' times, of which only the order is used, the time
# of the day that schedules go by, and the clock itself where it is compared with another
TELLS_THE_TIME = {
    "cluster/controller.py",
    "cluster/telemetry.py",
    "router/app.py",
    "router/operations.py",
    "router/text.py",
    "workers/worker.py",
    "kvstore/chain.py",
    "deploy/doctor/services.py",
}


def test_nothing_is_decided_by_the_wall_clock() -> None:
    """It jumps; every duration and deadline is of the monotonic one."""
    users = {
        str(p.relative_to(ROOT))
        for package in MAY_IMPORT
        for p in files(package)
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL_CLOCK
    }
    assert users == TELLS_THE_TIME
