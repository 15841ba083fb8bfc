"""docs/reference/transports.md is what the declarations say."""

from __future__ import annotations

from pathlib import Path

from ipckit.cli.transports import entries, markdown

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "transports.md"


def test_the_page_is_current():
    assert PAGE.read_text() == markdown(), "run: ipckit transports --markdown > docs/reference/transports.md"


def test_it_has_every_scheme_with_words_for_every_row():
    for entry in entries():
        if entry.ours:
            assert f"`{entry.scheme}`" in PAGE.read_text()
            assert entry.capabilities.model, f"{entry.scheme} declares no model"
            assert entry.capabilities.use_case, f"{entry.scheme} declares no use_case"
            assert all(text for _, _, text in entry.options), f"{entry.scheme} has an option without help"
