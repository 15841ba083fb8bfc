"""What is paid once: reading a URL, importing the package."""

from __future__ import annotations

import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from ipckit._url import parse

URL = "redis://user:secret@127.0.0.1:6379/0/jobs?limit=16MiB"


@pytest.mark.benchmark(group="reading a URL")
@pytest.mark.parametrize("read", [parse, urlsplit], ids=["ipckit", "urllib.parse (fewer checks, cached)"])
def test_url(benchmark, read):
    benchmark(read, URL)


@pytest.mark.benchmark(group="a new interpreter")
@pytest.mark.parametrize("code", ["import ipckit", "import ipckit.aio", "pass"])
def test_import(benchmark, code):
    benchmark.pedantic(subprocess.run, args=([sys.executable, "-c", code],), kwargs={"check": True}, rounds=10)
