"""Whether a manifest is what KubeRay's CustomResourceDefinition allows, without a Kubernetes.

The API server drops unknown fields in silence, so a misspelt one is a mistake here. Knows nothing
about what the fields mean.

    python -m cluster.kuberay.validate CRD.yaml MANIFEST.yaml...
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml


def problems(manifest: Mapping[str, Any], crd: Mapping[str, Any]) -> list[str]:
    """One line per wrong type, missing or unknown field of `manifest`; empty if it is valid."""
    names = crd["spec"]["names"]
    group = crd["spec"]["group"]
    versions = {
        f"{group}/{version['name']}": version["schema"]["openAPIV3Schema"]
        for version in crd["spec"]["versions"]
        if version["served"]
    }
    kind, api_version = manifest.get("kind"), manifest.get("apiVersion")
    if kind != names["kind"] or api_version not in versions:
        return [f"{api_version} {kind} is not one of {sorted(versions)} {names['kind']}"]
    validator = jsonschema.Draft202012Validator(_strict(versions[api_version]))
    return [
        f"{error.json_path}: {error.message[:200]}"
        for error in sorted(validator.iter_errors(manifest), key=lambda error: error.json_path)
    ]


def _strict(schema: Any) -> Any:
    """The OpenAPI schema as JSON schema in which an object has no fields but those it lists."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = {key: _strict(part) for key, part in schema.items() if key != "properties"}
    strict.pop("format", None)  # "int32" and the like mean nothing to JSON schema
    if "properties" in schema:
        strict["properties"] = {k: _strict(part) for k, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    if schema.get("nullable"):
        return {"anyOf": [{"type": "null"}, strict]}
    return strict


def main(crd_path: str, *manifest_paths: str) -> int:
    crd = yaml.safe_load(Path(crd_path).read_text())
    found = [
        f"{path}: {problem}"
        for path in manifest_paths
        for manifest in yaml.safe_load_all(Path(path).read_text())
        for problem in problems(manifest, crd)
    ]
    print("\n".join(found) or "valid")
    return bool(found)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m cluster.kuberay.validate CRD.yaml MANIFEST.yaml...")
    sys.exit(main(*sys.argv[1:]))
