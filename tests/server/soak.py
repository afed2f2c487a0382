"""Mixed load on a server for a while; its memory and file descriptors must stay where they are.

    python -m tests.server.soak [RUN] [--minutes 20]

Without RUN a tiny model is served. The first quarter of the time fills the caches, unjudged; they
are small, since memory that is filled for the first time looks like growth. Every request must be
answered or told to wait.
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deltamoe.cli.load import LoadPlan, LoadReport, ServerAddress, measure
from tests.saved_run import save_run

MIB = 1 << 20
MOST_SLOPE = 1.0  # MiB of memory a minute
MOST_NEW_FILES = 8
EVERY_S = 2.0


async def leave(address: ServerAddress, chance: random.Random) -> None:
    """A client that goes in mid-stream, or before it has said what it wants."""
    _, writer = await asyncio.open_connection(address.host, address.port)
    body = b'{"prompt": "once", "max_tokens": 500, "stream": true, "ignore_eos": true}'
    head = address.head("POST", "/v1/completions", len(body))
    writer.write((head + body)[: chance.choice([10, 80, 10_000])])
    await writer.drain()
    await asyncio.sleep(chance.uniform(0.0, 0.5))
    writer.transport.abort()


async def load(address: ServerAddress, until: float) -> list[LoadReport]:
    chance, seed, reports = random.Random(0), 0, []
    while time.monotonic() < until:
        seed += 1
        plan = LoadPlan(
            num_requests=40,
            rate=chance.choice([None, 10.0, 40.0]),
            concurrency=chance.choice([1, 8, 32, 100]),
            shared_prefix=chance.choice([0, 200]),
            prompt_tokens=60,
            answer_tokens=40,
            seed=seed,
        )
        leaving = [leave(address, chance) for _ in range(chance.choice([0, 5, 20]))]
        report, *_ = await asyncio.gather(measure(address, plan), *leaving)
        reports.append(report)
    return reports


async def watch(pid: int, until: float) -> list[tuple[float, float, int]]:
    """(minutes, MiB resident, open files), again and again."""
    begin, seen = time.monotonic(), []
    while time.monotonic() < until:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGESIZE"
        )
        files = len(os.listdir(f"/proc/{pid}/fd"))
        seen.append(((time.monotonic() - begin) / 60, resident / MIB, files))
        await asyncio.sleep(EVERY_S)
    return seen


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line with the least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


async def soak(run: Path, minutes: float) -> bool:
    with tempfile.TemporaryFile("w+") as log:
        options = ["--port", "0", "--states", "64Mi", "--cache", "8Mi"]
        process = subprocess.Popen(
            [sys.executable, "-m", "deltamoe", "serve", str(run), *options], stderr=log
        )
        try:
            address = None
            while address is None:
                assert process.poll() is None, "the server did not start"
                said = os.pread(log.fileno(), 1 << 16, 0).decode().split()
                found = [word for word in said if word.startswith("http://")]
                address = ServerAddress.parse(found[0]) if found else None
                await asyncio.sleep(0.1)
            until = time.monotonic() + 60 * minutes
            reports, seen = await asyncio.gather(load(address, until), watch(process.pid, until))
        finally:
            process.terminate()
            code = process.wait(timeout=30)
    judged = seen[len(seen) // 4 :]
    growth = slope([(at, resident) for at, resident, _ in judged])
    idle = min(files for *_, files in judged)
    new_files = min(files for *_, files in judged[-len(judged) // 4 :]) - idle
    answered, refused, failed = (
        sum(getattr(report, name) for report in reports)
        for name in ("num_finished", "num_refused", "num_failed")
    )
    errors = {error for report in reports for error in report.errors}
    print(f"{answered} answered, {refused} refused, {failed} failed {sorted(errors)}")
    print(
        f"{minutes:g} minutes: {judged[0][1]:.0f} to {judged[-1][1]:.0f} MiB resident, "
        f"{growth:+.2f} MiB a minute; {idle} files open at the least, {new_files:+d} at the end; "
        f"exit code {code}"
    )
    is_well = answered and not failed and code == 0
    return bool(is_well and growth < MOST_SLOPE and new_files <= MOST_NEW_FILES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = given.run or save_run(Path(folder))
        sys.exit(not asyncio.run(soak(run, given.minutes)))
