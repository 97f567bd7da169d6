"""How large a device is, and what it is called."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60
"""Kernels write "no limit" as a number near 2**63; anything this large is none."""


def device_nbytes(device: torch.device | str) -> int:
    """Bytes of the device that a share of it, such as a budget of 0.5, refers to.

    CUDA: the card's total memory. CPU: the smaller of the cgroup's limit and the memory that is available now (or
    the machine's memory, where the system does not tell what is available).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [limit for limit in (_cgroup_limit(), _available()) if limit]
    return min(limits) if limits else _physical()


def free_nbytes(device: torch.device | str) -> int | None:
    """Bytes that new allocations may find now, as far as the system tells; None where it does not.

    CUDA: what the driver has free. CPU: what is available, within the cgroup's limit and the process's own.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _available()


def describe_device(device: torch.device | str) -> dict[str, str | int | bool]:
    """What the costs of ops depend on: the device, torch, threads, and the switches that choose kernels."""
    device = torch.device(device)
    facts: dict[str, str | int | bool] = {
        "device": device.type,
        "name": device_name(device),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        facts |= {
            "cuda": str(torch.version.cuda),
            "cudnn": int(torch.backends.cudnn.version() or 0),  # type: ignore[no-untyped-call]
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    else:
        facts |= {
            "threads": torch.get_num_threads(),
            "cpu_capability": str(torch.backends.cpu.get_cpu_capability()),
            "mkldnn": bool(torch.backends.mkldnn.enabled),
        }
    facts["matmul_precision"] = torch.get_float32_matmul_precision()
    facts["deterministic"] = torch.are_deterministic_algorithms_enabled()
    return facts


def device_name(device: torch.device | str) -> str:
    """The card's name, or the processor's."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


@cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cgroup_limit() -> int | None:
    """Bytes of the tightest limit on this process's control group, version 2 or 1."""
    found: list[int] = []
    for path in _limit_files():
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit() and 0 < int(text) < _UNLIMITED:
            found.append(int(text))
    return min(found) if found else None


def _limit_files() -> list[Path]:
    files = [_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes"]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return files
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            root, name = _CGROUP, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUP / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = root / group.lstrip("/")
        while folder != root and root in folder.parents:  # a limit on any ancestor binds too
            files.append(folder / name)
            folder = folder.parent
    return files


def _available() -> int | None:
    """Bytes that new allocations can use now, page cache included."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
