"""What a figure must be printed with: the machine, the versions, the date.

Every benchmark imports this module before torch, because OpenMP reads how its threads shall wait
when torch is imported; hence no torch at the top of this file.
"""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import deltamoe
from deltamoe.cli.process import settle

settle()  # the benchmarks measure what the command line runs

__all__ = ["RESULTS", "describe", "interleaved_seconds", "median_seconds"]

RESULTS = Path(__file__).parent / "results"


def describe() -> str:
    """One line about where and when."""
    import torch

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    return (
        f"{datetime.date.today()} · {device}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads · Python {platform.python_version()}, "
        f"torch {torch.__version__}, deltamoe {deltamoe.__version__}"
    )


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The median of several runs after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def interleaved_seconds(
    runs: Mapping[str, Callable[[], object]], repeats: int = 5
) -> dict[str, float]:
    """The median of each one's runs, taken in turns after one to warm up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}
