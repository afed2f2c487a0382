"""The process the command line runs in: threads that wait asleep, freed memory that stays."""

import os
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
from deltamoe.cli.process import settle
if {settled}:
    settle()
import torch
torch.set_num_threads(1)
for step in range(12):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each, all freed at once
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*, settled: bool, **variables: str) -> int:
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "OMP_"))}
    code = COUNT_FAULTS.format(settled=settled)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.confstr("CS_GNU_LIBC_VERSION") is None,
    reason="it is glibc that is told",
)
def test_freed_memory_is_not_mapped_anew() -> None:
    # 10 steps of 32 MiB are 81,920 pages of 4 KiB
    settled = page_faults(settled=True)
    assert settled < 8_000
    if page_faults(settled=False) < 40_000:
        pytest.skip("this allocator keeps freed blocks by itself")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is glibc that is told")
def test_what_the_user_set_stays() -> None:
    asked = (
        "import os; from deltamoe.cli.process import settle; settle(); "
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {**os.environ, "OMP_WAIT_POLICY": "ACTIVE"}
    done = subprocess.run(
        [sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "ACTIVE"
