"""Builds every `test_*.c` here as plain C and runs it under each sanitizer.

A test names the sources that it needs in its first line: `/* links: ring.c */`. It is done when it returns 0; CHECK aborts.
"""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "src" / "ipckit" / "_native"
COMPILER = shutil.which("gcc") or shutil.which("clang")
SANITIZERS = ["address,undefined", "thread"]
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"]
FLAGS += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-pthread", "-DIPCKIT_STEPS"]  # steps.h
ENVIRONMENT = os.environ | {"ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1", "TSAN_OPTIONS": "halt_on_error=1"}


def run(command: list[str], seconds: float) -> str | None:
    """None if it succeeded, else what to show."""
    done = subprocess.run(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", timeout=seconds
    )
    return f"{' '.join(command)}\nended with {done.returncode}\n{done.stdout[-6000:]}" if done.returncode else None


@functools.cache
def available(sanitizer: str) -> bool:
    """Whether the compiler came with this sanitizer's library."""
    assert COMPILER
    probe = [COMPILER, f"-fsanitize={sanitizer}", "-x", "c", "-", "-o", os.devnull]
    return subprocess.run(probe, input=b"int main(void) { return 0; }", capture_output=True).returncode == 0


@functools.cache
def fixed_addresses() -> list[str]:
    """ThreadSanitizer and much address space randomisation do not go together."""
    setarch = shutil.which("setarch")
    return [setarch, "-R"] if setarch and run([setarch, "-R", "true"], 10) is None else []


@pytest.mark.timeout(240)
@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("test", sorted(HERE.glob("test_*.c")), ids=lambda path: path.stem)
def test_plain_c(test: Path, sanitizer: str, tmp_path: Path) -> None:
    links = re.match(r"/\* links: ([\w. ]+)", test.read_text())
    assert links, f"{test.name} does not begin with the sources that it links"
    sources = [str(NATIVE / name) for name in links[1].split()]
    program = str(tmp_path / test.stem)
    assert COMPILER
    if not available(sanitizer):
        pytest.skip(f"the compiler has no -fsanitize={sanitizer}")
    build = [COMPILER, *FLAGS, f"-fsanitize={sanitizer}", str(test), *sources, "-o", program, "-lrt", "-lm"]
    assert (trouble := run(build, 100)) is None, trouble
    launch = [*fixed_addresses(), program] if sanitizer == "thread" else [program]
    assert (trouble := run(launch, 120)) is None, trouble
