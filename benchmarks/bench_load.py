"""How long does a file of a gigabyte take from its name to the first token?

    python -m benchmarks.large FOLDER
    python -m benchmarks.bench_load FOLDER [--rounds N] [--threads N] [--only NAMES] [--write]

Each time in a fresh process: ``open_model``, which compares the file's hash and looks for NaN, then
one token behind a prompt of 16 bytes. The time that Python takes to import the package is told
apart. "Cold": the system was asked to forget the file before, so that it comes from the disk.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import benchmarks.machine as machine  # before torch
import torch
from benchmarks.large import step_path

BAR = 3.0
CHILD = """
import json, sys, time
started = time.perf_counter()
from deltamoe.cli.process import settle
settle()
import torch
from deltamoe.inference import generate, open_model
torch.set_num_threads(int(sys.argv[2]))
imported = time.perf_counter()
opened = open_model(sys.argv[1])
there = time.perf_counter()
generate(opened.model, opened.tokenizer, "Once upon a time", max_tokens=1, temperature=0.0)
done = time.perf_counter()
print(json.dumps({
    "import": imported - started, "open": there - imported, "token": done - there,
    "both": done - imported,
}))
"""


def forget(folder: Path) -> None:
    """Let the next reader of these files find them on the disk only."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def once(folder: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, str(folder), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="8 bits,bf16")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    names = options.only.split(",")
    found: dict[str, list[dict[str, float]]] = {}
    for name in names:
        once(step_path(options.folder, name), options.threads)  # its files are in memory now
    for _ in range(options.rounds):
        for name in names:
            folder = step_path(options.folder, name)
            found.setdefault(f"{name}, warm", []).append(once(folder, options.threads))
    for _ in range(options.rounds):
        for name in names:
            forget(folder := step_path(options.folder, name))
            found.setdefault(f"{name}, cold", []).append(once(folder, options.threads))
    lines = [
        "# From a file to the first token",
        "",
        f"{machine.describe()}; {options.threads} threads, {options.rounds} fresh processes each. "
        "Seconds; the bar is for a file of 1 GB.",
        "",
        "| weights | file | import | open | prompt and token | together | a GB | bar |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entries in found.items():
        path = step_path(options.folder, name.partition(",")[0]) / "model.safetensors"
        size = path.stat().st_size / 1e9
        median = {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        lines.append(
            f"| {name} | {size:.2f} GB | {median['import']:.2f} | {median['open']:.2f} "
            f"| {median['token']:.2f} | {median['both']:.2f} | {median['both'] / size:.2f} "
            f"| {BAR if 'warm' in name else ''} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        (machine.RESULTS / "load.md").write_text(text)
        data = {"machine": machine.describe(), "threads": options.threads, "seconds": found}
        (machine.RESULTS / "load.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
