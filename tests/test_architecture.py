"""The architecture diagram of the README, executable: who may import whom, and who owns what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("wan_model", "cluster", "serve_app", "benchmarks")

FORBIDDEN = {
    "wan_model": {"ray", "pydantic", "fastapi", "sqlalchemy", "serve_app", "cluster", "benchmarks"},
    "cluster": {"wan_model", "serve_app", "benchmarks", "fastapi", "sqlalchemy"},
    "serve_app": {"torch", "transformers", "safetensors.torch", "benchmarks"},
}
"""No module of the package may import these, not even inside a function."""

PURE_FILES = (
    "wan_model.backends", "wan_model.config", "wan_model.image_file", "wan_model.params",
    "wan_model.schedule",
)  # fmt: skip
"""The only files of wan_model that serve_app may import: numbers and uploads, no torch."""

OWNERS = {
    "fastapi": {"serve_app/ingress.py"},
    "sqlalchemy": {
        "serve_app/jobs.py", "serve_app/job_database.py", "serve_app/job_transitions.py",
        "serve_app/webhook_store.py",
    },
    "alembic": {"serve_app/job_database.py"},
    "fsspec": {"serve_app/artifacts.py"},
    "torch.distributed": {
        "wan_model/parallel.py", "wan_model/rows.py", "wan_model/sharding.py",
        "wan_model/torchrun.py",
        "cluster/process_group.py", "benchmarks/parallel.py",
    },
    "xfuser": {"wan_model/xfuser_backend.py"},
    "dashscope": {"wan_model/dashscope_extender.py"},
    "av": {"wan_model/media.py"},
    "huggingface_hub": {"wan_model/weights.py"},
}  # fmt: skip
"""Each heavy dependency has its owner; others ask the owner."""


def files(package: str) -> list[Path]:
    return sorted(p for p in (ROOT / package).rglob("*.py") if "migrations" not in p.parts)


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_or_is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_between_packages_point_down_only(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(package)
        for name in imports(path)
        if any(is_or_is_in(name, module) for module in FORBIDDEN[package])
    ]
    assert wrong == []


def test_serve_app_sees_only_the_pure_files_of_wan_model():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files("serve_app")
        for name in imports(path)
        if is_or_is_in(name, "wan_model")
        and name != "wan_model"
        and not any(is_or_is_in(name, pure) for pure in PURE_FILES)
    ]
    assert wrong == []


def test_the_pure_files_import_nothing_heavy():
    for module in PURE_FILES:
        names = imports(ROOT / (module.replace(".", "/") + ".py"))
        assert not [n for n in names if n.split(".")[0] in ("torch", "ray", "transformers")]


@pytest.mark.parametrize("dependency", OWNERS)
def test_a_heavy_dependency_has_one_owner(dependency):
    users = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in files(package)
        if any(is_or_is_in(name, dependency) for name in imports(path))
    }
    assert users <= OWNERS[dependency]


def test_cluster_imports_torch_only_inside_functions():
    for path in files("cluster"):
        names = imports(path, top_level_only=True)
        assert not [n for n in names if is_or_is_in(n, "torch")], path


def test_only_the_config_reads_the_environment():
    readers = set()
    for package in ("wan_model", "serve_app"):
        for path in files(package):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                    readers.add(str(path.relative_to(ROOT)))
    assert readers <= {"serve_app/config.py"}


def test_no_module_has_a_name_that_says_nothing():
    empty_names = {"utils", "common", "helpers", "base", "types", "managers", "misc"}
    modules = [path for package in PACKAGES for path in files(package)]
    assert not [path for path in modules if path.stem in empty_names]


def test_every_module_says_what_it_is():
    for package in PACKAGES:
        for path in files(package):
            tree = ast.parse(path.read_text())
            if tree.body:
                assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
