"""A whole run, small: rows, failures as rows, the results as a file, two runs beside each other, how it is printed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipckit import capabilities, errors
from ipckit.bench import compare, patterns, report, results, session
from ipckit.bench.machine import choose_cpus, facts
from ipckit.bench.patterns import names, select
from ipckit.bench.patterns.channel import CHANNEL
from ipckit.bench.scenarios import Case, Raw, Variant
from ipckit.bench.stats import Flow, Trips
from ipckit.testing.conformance import broker
from ipckit.testing.servers import redis_server

TINY = session.Budget(repeats=2, trips=0.002, flow=0.002)


def run(
    cases, shells=("sync",), sizes=(64, 4096), progress=lambda what, part: None, pattern="channel"
) -> results.Results:
    return session.Session(pattern, cases, shells, sizes, TINY, choose_cpus(), facts(), progress).run()


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


def test_of_the_raw_client_nothing_stays_in_a_server_of_yours():
    redis = pytest.importorskip("redis")
    with broker(redis_server(private=True)) as server:
        found = run(select("queue", [server.address("/0/mine")]), sizes=(64,), pattern="queue")
        assert not found.failures()
        assert found.rows[0].raw.trips is not None
        with redis.Redis.from_url(server.url) as client:
            others = [key for key in client.scan_iter() if not key.startswith((b"mine", b"ipckit:{mine"))]
        assert others == []


# -- queues and topics --------------------------------------------------------------------------------------------


def test_a_queue_is_measured_in_every_way():
    found = run(select("queue", ["unix"]), ("sync", "aio"), pattern="queue")
    assert not found.failures()
    assert [row.label for row in found.rows] == ["unix", "unix · aio"]
    for row in found.rows:
        for each in row.contenders():
            assert len(each.trips.runs) == len(each.hops.runs) == 2
            assert set(each.flows) == {64, 4096}
        assert row.ours.batched.rate > 0
        assert row.trips_ratio(row.raw) > 0
        assert row.hops_ratio(row.raw) > 0
    sync, awaited = found.rows
    assert [each.name for each in sync.floors] == ["multiprocessing.Queue", "multiprocessing.SimpleQueue"]
    assert awaited.floors == []
    text = printed(lambda console: report.report(found, console), 100)
    for words in (
        "÷ one by one",
        "sent, received, acknowledged",
        "From process to process",
        "÷ mp.Queue",
        "In batches",
        "mp.SimpleQueue",
    ):
        assert words in text.replace("multiprocessing", "mp")
    assert "…" not in text
    assert "claimed" not in text
    assert "C floor" not in text


def test_topics_are_measured_for_crowds(tmp_path, monkeypatch):
    pattern = patterns.find("pubsub")
    monkeypatch.setattr(session.patterns, "find", lambda name: replace(pattern, audiences=(1, 3)))
    found = run(select("pubsub", ["unix", "inproc"]), pattern="pubsub")
    assert not found.failures()
    for row in found.rows:
        for each in row.contenders():
            assert each.trips.p50 > 0
            assert sorted((fan.subscribers, fan.size) for fan in each.fans) == [(1, 64), (1, 4096), (3, 64), (3, 4096)]
            assert all(fan.cost > 0 and fan.flow.rate > 0 and fan.flow.lost == 0 for fan in each.fans)
    file = tmp_path / "found.json"
    found.save(file)
    assert results.load(file) == found
    text = printed(lambda console: report.report(found, console), 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for words in ("From publish to receive", "costs the publisher", "reach every subscriber", "to 3", "3 ÷ 1"):
        assert words in text
    assert "0.50×" in printed(compare.compare(found, doubled(found)), 120)


@pytest.mark.parametrize("pattern", ["queue", "pubsub"])
def test_what_declares_a_pattern_has_a_case(pattern):
    declaring = {case.scheme for case in CHANNEL if pattern in capabilities(case.scheme + "://x").patterns}
    pairs = {case.scheme for case in CHANNEL if case.handover is not None}  # an audience of one: measured as a queue
    assert {case.scheme for case in patterns.find(pattern).cases()} >= declaring - (
        pairs if pattern == "pubsub" else set()
    )


def test_a_pattern_is_a_module():
    assert {"channel", "queue", "pubsub"} <= set(names())
    with pytest.raises(errors.BadOption, match="no pattern 'nosuch'"):
        patterns.find("nosuch")


def test_the_estimate_grows_with_the_work():
    def seconds(cases, budget):
        return session.Session("channel", cases, ("sync",), (64,), budget, choose_cpus(), facts()).estimate()

    few, many = (seconds(select("channel", wanted), session.FULL) for wanted in (["inproc"], []))
    assert 0 < few < many
    assert seconds(select("channel", []), session.QUICK) < 60
