"""A whole run, small: rows, failures as rows, the results as a file, two runs beside each other, how it is printed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipckit import errors
from ipckit.bench import compare, report, results, session
from ipckit.bench.machine import choose_cpus, facts
from ipckit.bench.scenarios import CHANNEL, Case, Raw, Variant, select
from ipckit.bench.stats import Flow, Trips

TINY = session.Budget(repeats=2, trips=0.002, flow=0.002)


def run(cases, shells=("sync",), sizes=(64, 4096), progress=lambda what, part: None) -> results.Results:
    return session.Session("channel", cases, shells, sizes, TINY, choose_cpus(), facts(), progress).run()


def printed(text, width: int = 100) -> str:
    console = report.console()
    console.width = width
    with console.capture() as capture:
        console.print(text(console) if callable(text) else text)
    return capture.get()


@pytest.fixture(scope="module")
def found() -> results.Results:
    return run(select("channel", ["unix", "inproc"]), ("sync", "aio"))


def test_every_contender_is_measured(found):
    assert not found.failures()
    labels = [row.label for row in found.rows]
    assert labels == [
        "unix spin=auto",
        "unix spin=0",
        "unix spin=auto · aio",
        "unix spin=0 · aio",
        "inproc",
        "inproc · aio",
    ]
    for row in found.rows:
        for each in row.contenders():
            assert each.trips is not None
            assert each.trips.p50 > 0
            assert len(each.trips.runs) == 2
            assert set(each.flows) == {64, 4096}
        assert row.ours.batched is not None
        assert row.trips_ratio(row.raw) is not None
        assert row.flow_ratio(row.raw, 64) is not None
    assert all(row.floor is not None for row in found.rows if row.scheme == "unix")


def test_the_variants_share_one_raw_client(found):
    auto, never = (row for row in found.rows if row.scheme == "unix" and row.shell == "sync")
    assert auto.raw is never.raw


def test_the_file_holds_it_all(found, tmp_path):
    file = tmp_path / "found.json"
    found.save(file)
    again = results.load(file)
    assert again == found
    assert again.machine.processor
    assert again.conditions.cpus == choose_cpus()


def test_a_file_that_is_none_of_ours(tmp_path):
    for content in ("{", "[]", '{"machine": 3}'):
        file = tmp_path / "x.json"
        file.write_text(content)
        with pytest.raises(errors.BadOption, match="no result of"):
            results.load(file)
    with pytest.raises(errors.BadOption, match="cannot be read"):
        results.load(tmp_path / "nothing")


def test_a_failure_is_a_row_and_the_others_are_measured():
    broken = Case(scheme="inproc", url="inproc://{name}?nosuch=1", together=True)
    clumsy = Case(
        scheme="inproc",
        url="inproc://{name}",
        raw=Raw("clumsy", "ipckit.bench.raw:nosuch"),
        variants=(Variant("", ("nosuch-floor",)),),
        together=True,
    )
    seen = []
    found = run([broken, clumsy], progress=lambda what, part: seen.append(part))
    first, second = found.rows
    assert "nosuch" in first.ours.failed
    assert first.ours.trips is None
    assert second.ours.trips is not None
    assert second.raw.failed
    assert second.floor.failed
    assert [each.name for _, each in found.failures()] == ["ipckit", "clumsy", "nosuch-floor"]
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    text = printed(lambda console: report.report(found, console))
    assert text.count("FAILED") == 3


def test_what_is_not_installed_is_no_failure(monkeypatch):
    monkeypatch.setattr("ipckit._registry.missing", lambda transport: "posix_ipc")
    found = run([case for case in CHANNEL if case.scheme == "mq"])
    assert found.rows[0].ours.absent
    assert not found.failures()
    text = printed(lambda console: report.report(found, console))
    assert "not installed" in text
    assert 'pip install ".[mq]"' in text


@pytest.mark.parametrize("width", [100, 160])
def test_the_report_keeps_to_its_width_and_says_it_all(found, width):
    text = printed(lambda console: report.report(found, console), width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("p99.9", "÷ raw", "÷ floor", "claimed", "~130 µs", "agenKic", "asyncio streams", found.machine.python):
        assert word in text
    assert "…" not in text
    assert "\x1b" not in text


def test_one_cpu_is_told(found):
    alone = replace(found, conditions=replace(found.conditions, cpus=(0, 0)))
    assert "there is no second one" in printed(lambda console: report.report(alone, console))


def doubled(found: results.Results) -> results.Results:
    """The same, with our round trips twice as long and our rates halved."""

    def slower(row: results.Row) -> results.Row:
        trips, flows = row.ours.trips, row.ours.flows
        slow = Trips(
            trips.p50 * 2, None, None, trips.least, trips.mean, trips.most, 9, tuple(v * 2 for v in trips.runs)
        )
        halves = {size: Flow(flow.rate / 2, size, 0.0, flow.runs) for size, flow in flows.items()}
        return replace(row, ours=replace(row.ours, trips=slow, flows=halves))

    return replace(found, rows=[slower(row) for row in found.rows])


def test_compare_shows_the_change(found):
    text = printed(compare.compare(found, doubled(found)), 120)
    assert text.count("2.00×") >= len(found.rows)
    assert text.count("0.50×") >= len(found.rows)
    assert "WARNING" not in text


def test_compare_warns_of_another_machine(found):
    other = replace(found, machine=replace(found.machine, processor="another", cores=64))
    text = " ".join(printed(compare.compare(other, found), 120).split())
    assert "WARNING the machines differ" in text
    assert f"processor: another → {found.machine.processor}" in text


def test_select_takes_schemes_families_and_urls():
    assert [case.scheme for case in select("channel", ["zmq"])] == ["zmq+ipc", "zmq+tcp", "zmq+inproc"]
    assert select("channel", []) == CHANNEL
    with pytest.raises(errors.UnknownScheme, match="did you mean 'unix'"):
        select("channel", ["unux"])
    with pytest.raises(errors.UnknownScheme, match="did you mean"):
        select("channel", ["unxi://x"])


def test_the_url_of_a_broker_is_that_server_for_the_raw_client_too():
    (own,) = select("channel", ["redis://u:p@example:7000/3/bench?limit=1MiB"])
    assert own.server is None
    assert own.url == "redis://u:p@example:7000/3/bench"
    assert own.raw.address == "redis://u:p@example:7000/{name}.raw"
    assert [variant.options for variant in own.variants] == ["limit=1MiB"]


def test_a_url_is_measured_as_it_stands(tmp_path):
    found = run(select("channel", [f"unix://{tmp_path}/mine?spin=0"]))
    assert [row.label for row in found.rows] == ["unix spin=0"]
    assert not found.failures()
    assert found.rows[0].raw.trips is not None
