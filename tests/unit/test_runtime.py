"""The runtime directory: where it is, and who is refused."""

from __future__ import annotations

import os
import stat

import pytest

from ipckit import _url, errors
from ipckit.transports import _runtime


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv("IPCKIT_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


def test_order_of_places(monkeypatch, tmp_path):
    monkeypatch.setattr(
        _runtime,
        "Path",
        lambda p: tmp_path / "fallback" if str(p).startswith("/tmp/ipckit-") else __import__("pathlib").Path(p),
    )
    assert _runtime.runtime_dir() == tmp_path / "fallback"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert _runtime.runtime_dir() == tmp_path / "ipckit"
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "mine"))
    assert _runtime.runtime_dir() == tmp_path / "mine"


def test_made_private_whatever_the_umask(monkeypatch, tmp_path):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "d"))
    old = os.umask(0)
    try:
        made = _runtime.runtime_dir()
    finally:
        os.umask(old)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_open_to_others_is_refused(monkeypatch, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d").chmod(0o755)
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "d"))
    with pytest.raises(errors.AccessDenied, match="chmod 700"):
        _runtime.runtime_dir()


def test_symlink_is_refused(monkeypatch, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "d").symlink_to(tmp_path / "real")
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "d"))
    with pytest.raises(errors.AccessDenied, match="symbolic link"):
        _runtime.runtime_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a directory away needs root")
def test_foreign_owner_is_refused(monkeypatch, tmp_path):
    (tmp_path / "d").mkdir(mode=0o700)
    os.chown(tmp_path / "d", 12345, 12345)
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "d"))
    with pytest.raises(errors.AccessDenied, match="uid 12345"):
        _runtime.runtime_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a directory away needs root")
def test_session_of_another_user_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "session").mkdir(mode=0o700)
    os.chown(tmp_path / "session", 12345, 12345)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "session"))
    assert str(_runtime._choose()) == f"/tmp/ipckit-{os.geteuid()}"


def test_relative_and_missing_parents_are_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", "relative")
    with pytest.raises(errors.ConfigError, match="absolute"):
        _runtime.runtime_dir()
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "a" / "b"))
    with pytest.raises(errors.ConfigError, match="parent"):
        _runtime.runtime_dir()


def test_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "d"))
    assert _runtime.path_for(_url.parse("unix://calc"), ".sock") == tmp_path / "d" / "calc.sock"
    assert str(_runtime.path_for(_url.parse("unix:///run/x y"), ".sock")) == "/run/x y"
    for bad in ("unix://", "unix://../x", "unix://a/b", "unix:///run/", "unix:///run/%00", "unix://a:1"):
        with pytest.raises(errors.BadUrl):
            _runtime.path_for(_url.parse(bad), ".sock")
