"""``deltamoe doctor``: what this machine and this installation can do; also for bug reports."""

import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from deltamoe.cli.format import size, table
from deltamoe.plan import machine_memory
from deltamoe.version import __version__

__all__ = ["command"]

# What the operators run faster with.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Report Python, torch, packages, processor, memory, disk and GPUs.

    Ends with exit code 1 if something that deltamoe cannot do without is missing.
    """
    report = _report()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(_text(report))
    if report["problems"]:
        ctx.exit(1)


def _report() -> dict[str, Any]:
    problems: list[str] = []
    return {
        "deltamoe": __version__,
        "python": f"{platform.python_version()} at {sys.executable}",
        "platform": platform.platform(),
        "cpu": _cpu(),
        "memory": _memory(),
        "disk": {"folder": os.getcwd(), "free_bytes": shutil.disk_usage(".").free},
        "torch": _torch(problems),
        "packages": _packages(problems),
        "problems": problems,
    }


def _cpu() -> dict[str, Any]:
    info = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return {
        "name": name[1] if name else platform.processor() or platform.machine(),
        "usable_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "features": [feature for feature in _CPU_FEATURES if feature in present],
    }


def _memory() -> dict[str, int | None]:
    available = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return {
        "total_bytes": machine_memory(),
        "available_bytes": 1024 * int(available[1]) if available else None,
        "container_limit_bytes": int(limit) if limit.isdigit() else None,
    }


def _torch(problems: list[str]) -> dict[str, Any]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation fails in many ways
        problems.append(f"torch cannot be imported: {type(error).__name__}: {error}")
        return {"version": None, "threads": None, "cuda": []}
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": found.name,
                "memory_bytes": found.total_memory,
                "capability": f"{found.major}.{found.minor}",
            }
        )
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "cuda": devices}


def _packages(problems: list[str]) -> dict[str, dict[str, str | None]]:
    """Version and extra of every package that deltamoe declares; the extra "dev" is left out."""
    found: dict[str, dict[str, str | None]] = {}
    try:
        declared = importlib.metadata.requires("deltamoe") or []
    except importlib.metadata.PackageNotFoundError:
        problems.append("deltamoe runs from a folder and is not installed: pip install -e .")
        return found
    for requirement in declared:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if name is None or (extra and extra[1] == "dev"):
            continue
        try:
            version = importlib.metadata.version(name[0])
        except importlib.metadata.PackageNotFoundError:
            version = None
            if extra is None:
                problems.append(f"{name[0]} is missing: pip install '{requirement}'")
        found[name[0]] = {"version": version, "extra": extra[1] if extra else None}
    return found


def _text(report: dict[str, Any]) -> str:
    cpu, memory, torch = report["cpu"], report["memory"], report["torch"]
    memory_text = size(memory["total_bytes"])
    if memory["available_bytes"] is not None:
        memory_text += f", {size(memory['available_bytes'])} available"
    if memory["container_limit_bytes"] is not None:
        memory_text += f", container limit {size(memory['container_limit_bytes'])}"
    rows = [
        ("deltamoe", report["deltamoe"]),
        ("python", report["python"]),
        ("platform", report["platform"]),
        ("cpu", f"{cpu['name']}, {cpu['usable_cores']} usable cores"),
        ("features", " ".join(cpu["features"]) or "none known"),
        ("memory", memory_text),
        ("disk", f"{size(report['disk']['free_bytes'])} free in {report['disk']['folder']}"),
        ("torch", f"{torch['version']}, {torch['threads']} threads"),
    ]
    gpus = [
        f"{gpu['name']}, {size(gpu['memory_bytes'])}, compute capability {gpu['capability']}"
        for gpu in torch["cuda"]
    ]
    rows += [("cuda", gpu) for gpu in gpus or ["no device"]]
    for name, package in report["packages"].items():
        missing = f"not installed (pip install 'deltamoe[{package['extra']}]')"
        rows.append((name, package["version"] or missing))
    rows += [("problem", problem) for problem in report["problems"]]
    return table(rows)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
