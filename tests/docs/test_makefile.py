"""`make` alone names its verbs, all of them, and does nothing."""

import re
import shutil
import subprocess

import pytest

from tests.docs.pages import ROOT, make_targets


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_names_the_verbs() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    named = re.findall(r"^  make ([\w-]+) +\S", done.stdout, re.MULTILINE)
    assert sorted(named) == sorted(make_targets() - {"help"})
    assert not done.stderr
