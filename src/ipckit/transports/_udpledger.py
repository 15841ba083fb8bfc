"""What one publisher's numbers say about what was missed: the whole of the accounting, without a socket or a clock.

Each message has a number, one more than the one before. `counted_from` is the number at which the publisher first heard of us, as
it tells in its WELCOME, or an earlier one that was heard. From there on, received + missed = sent, exactly, as far as the numbers
heard go.

A message that was overtaken was counted as missed when its successor came, and stays so: it is not delivered late. That keeps
the publisher's order, lets a duplicate do no harm, and needs no memory.
"""

from __future__ import annotations


class Ledger:
    __slots__ = ("_begun", "_last", "counted_from")

    def __init__(self) -> None:
        self.counted_from: int | None = None
        self._begun = False  # something of its stream was seen
        self._last = 0  # highest number that is accounted for

    def received(self, number: int) -> int | None:
        """How many were missed right before this message; None: it is a duplicate, or late, and is not to be delivered."""
        if not self._begun:
            base = self.counted_from
            # One from before the publisher knew us was under way already: it is the first that we account for.
            self._begin(number - 1 if base is None else min(base, number - 1))
        if number <= self._last:
            return None
        missed = number - self._last - 1
        self._last = number
        return missed

    def told(self, number: int) -> int:
        """The publisher's last number is this one. How many of them we have missed and not known of: the end of its stream."""
        if not self._begun:
            base = self.counted_from
            self._begin(number if base is None else min(base, number))
        missed = max(number - self._last, 0)
        self._last += missed
        return missed

    def _begin(self, number: int) -> None:
        self._begun = True
        self._last = self.counted_from = number

    def welcomed(self, number: int) -> int:
        """The publisher counts us from here. How many of its messages were missed before the first that we saw."""
        before = self.counted_from
        if before is None:
            self.counted_from = number
            return 0
        if not self._begun or number >= before:
            return 0
        self.counted_from = number
        return before - number
