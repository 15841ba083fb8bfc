"""The checker, held to faults that were planted."""

import pytest
from tests.crash import checker, harness


def books():
    """Two senders with ten messages each; everything as it should be, one redelivery and one unknown among it."""
    good = checker.Books()
    for sender in (1, 2):
        for number in range(10):
            message = (sender, number)
            good.tried.add(message)
            (good.unknown if message == (1, 4) else good.acknowledged).add(message)
            good.delivery(message, f"{sender}-{number}")
    good.delivery((2, 3), "2-3")
    return good


def test_what_is_right_passes():
    verdict = checker.judge(books())
    assert verdict.faults == []
    assert (verdict.acknowledged, verdict.delivered, verdict.redelivered) == (19, 20, 1)
    assert (verdict.unknown, verdict.unknown_delivered) == (1, 1)


def test_an_unknown_may_be_gone():
    some = books()
    del some.delivered[1, 4], some.entries[1, 4]
    assert checker.judge(some).faults == []


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ([(1, 0)], "lost_prefix"),
        ([(1, 0), (1, 1)], "lost_prefix"),
        ([(1, 5)], "lost_middle"),
        ([(2, 9)], "lost_end"),
        ([(2, number) for number in range(10)], "lost_end"),
    ],
)
def test_a_loss_is_found_and_placed(messages, kind):
    some = books()
    for message in messages:
        del some.delivered[message], some.entries[message]
    verdict = checker.judge(some)
    assert getattr(verdict, kind) == messages
    assert verdict.lost == len(messages)
    assert verdict.faults


def test_a_double_entry_is_found():
    some = books()
    some.delivery((1, 7), "another")
    assert checker.judge(some).doubled == [(1, 7)]


def test_what_nobody_sent_is_found():
    some = books()
    some.delivery((3, 0), "3-0")
    some.delivery(None, "4-0")
    assert sorted(map(str, checker.judge(some).unexpected)) == ["(3, 0)", "None"]


def test_what_was_refused_must_not_arrive():
    some = books()
    some.acknowledged.remove((1, 2))
    some.refused.add((1, 2))
    assert checker.judge(some).unexpected == [(1, 2)]
    del some.delivered[1, 2], some.entries[1, 2]
    assert checker.judge(some).faults == []


def test_silence_is_found_unless_the_sender_was_killed():
    some = books()
    some.tried.add((2, 10))
    assert checker.judge(some).forgotten == [(2, 10)]
    some.killed.add(2)
    assert checker.judge(some).faults == []


def test_what_a_killed_receiver_had_must_be_handed_out_again():
    some = books()
    some.abandoned[2, 3] = 1  # the one that was redelivered
    assert checker.judge(some).faults == []
    some.abandoned[1, 5] = 1
    assert checker.judge(some).kept == [(1, 5)]
    some.delivery((1, 5), "1-5")
    assert checker.judge(some).faults == []
    some.abandoned[1, 5] = 2
    assert checker.judge(some).kept == [(1, 5)]


def test_journals_become_books(tmp_path):
    (tmp_path / "sender-1").write_text("try 1 0\ntry 1 1\nunknown 1 1\nack 1 0\nack 1 1\ntry 1 2\n")
    (tmp_path / "receiver-1-17").write_text("open\ngot 1 0 a\ngot 1 1 b\nsettle 1 0\n")
    (tmp_path / "receiver-1-18").write_text("open\ngot 1 1 b\nsettle 1 1\ngot -1 -1 c\nsettle -1 -1\n")
    found = harness.read_books(tmp_path)
    assert found.tried == {(1, 0), (1, 1), (1, 2)}
    assert found.acknowledged == {(1, 0), (1, 1)}
    assert not found.unknown
    assert found.delivered == {(1, 0): 1, (1, 1): 2, None: 1}
    assert found.abandoned == {(1, 1): 1}
    assert harness.acknowledged(tmp_path) == 2


def test_bodies_show_damage():
    body = checker.body_of(3, 77)
    assert checker.read_body(body) == (3, 77)
    for at in range(len(body)):
        assert checker.read_body(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]) is None
    assert checker.read_body(body[:-1]) is None
    assert checker.read_body(b"") is None


def test_a_cut_line_is_not_read(tmp_path):
    journal = checker.Journal(tmp_path / "j")
    journal.note("ack", 1, 2)
    journal.note_many([("got", 1), ("got", 2)])
    journal.close()
    with (tmp_path / "j").open("a") as file:
        file.write("got 1")
    assert list(checker.read_journal(tmp_path / "j")) == [["ack", "1", "2"], ["got", "1"], ["got", "2"]]
    assert list(checker.read_journal(tmp_path / "none")) == []
