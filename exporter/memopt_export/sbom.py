"""The bill of materials of a bundle, CycloneDX 1.6 in JSON: the model, its variants, and the tools that made them.

https://cyclonedx.org/docs/1.6/json/. Nothing in it depends on the clock: the serial number is derived from the content.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from memopt.manifest import File, Variant

PATH = "sbom.cdx.json"
_NAMESPACE = uuid.UUID("6d656d6f-7074-5000-8000-73626f6d0000")
_SPDX_ID = re.compile(r"[A-Za-z0-9.+-]+")  # one licence, no expression


def make_sbom(
    name: str, license_id: str | None, variants: Sequence[Variant], files: Sequence[File], tools: Mapping[str, str]
) -> bytes:
    """The document; equal arguments give equal bytes.

    Args:
        name: of the bundle.
        license_id: SPDX id or expression of the model's licence.
        variants: what can be run, each a component with the sha256 of its files.
        files: of the bundle, with their digests.
        tools: name -> version of what made the bundle.
    """
    model = {"type": "machine-learning-model", "bom-ref": "model", "name": name} | _licenses(license_id)
    digests = {file.path: file.sha256 for file in files}
    components = [_component(variant, digests) for variant in variants]
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model, "tools": {"components": [_tool(*tool) for tool in sorted(tools.items())]}},
        "components": components,
        "dependencies": [{"ref": "model", "dependsOn": [component["bom-ref"] for component in components]}],
    }
    serial = uuid.uuid5(_NAMESPACE, json.dumps(document, sort_keys=True))
    return (json.dumps(document | {"serialNumber": f"urn:uuid:{serial}"}, indent=1, sort_keys=True) + "\n").encode()


def _component(variant: Variant, digests: Mapping[str, str]) -> dict[str, Any]:
    files = [path for path in (variant.model, variant.weights) if path is not None]
    stated = {
        "precision": variant.precision,
        "runtime": variant.runtime,
        "source": variant.source,
        "weights_sha256": variant.weights_sha256,
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": f"variant:{variant.id}",
        "name": variant.id,
        "properties": [{"name": f"memopt:{key}", "value": value} for key, value in stated.items() if value is not None],
        "components": [
            {
                "type": "file",
                "bom-ref": f"variant:{variant.id}:{path}",
                "name": path,
                "hashes": [{"alg": "SHA-256", "content": digests[path]}],
            }
            for path in files
        ],
    }


def _tool(name: str, version: str) -> dict[str, Any]:
    return {
        "type": "library",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}",
    }


def _licenses(license_id: str | None) -> dict[str, Any]:
    if license_id is None:
        return {}
    kind = {"license": {"id": license_id}} if _SPDX_ID.fullmatch(license_id) else {"expression": license_id}
    return {"licenses": [kind]}
