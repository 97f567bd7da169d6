"""What a bug report needs."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib import metadata
from typing import Any

PACKAGES = ("keepless", "torch", "numpy", "scipy", "transformers", "typer", "rich", "matplotlib")


def environment() -> dict[str, Any]:
    """Versions, the device, and what Keepless can do here; JSON values only. Without torch it says less."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "keepless_variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith("KEEPLESS_")},
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        from keepless.measure import describe_device, device_nbytes, interposer
        from keepless.measure.cache import cache_folder

        facts["cpu"] = describe_device("cpu") | {"nbytes": device_nbytes("cpu")}
        facts["cuda"] = [
            describe_device(f"cuda:{i}") | {"nbytes": device_nbytes(f"cuda:{i}")}
            for i in range(torch.cuda.device_count())
        ]
        facts["cost_cache"] = str(cache_folder())
        facts["second_meter"] = interposer.available() or "available"
    return facts


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
