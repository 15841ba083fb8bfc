"""What an object knows of its lease (`_lease.Lease`), against a broker that is a few lines, and clocks that differ.

Requests take their time, answers too, and either may be lost; clocks run within the drift that is allowed for. Of all the objects
at most one is certain at any time that the lock is its own, and tokens only grow.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ipckit._leasing import Grant
from ipckit.sync._lease import Lease

LEASE = 10.0
SLOW = 0.009  # a clock may run slower than the broker's by this: DRIFT is 1%
OBJECTS = st.integers(0, 2)
TIMES = st.sampled_from([0.0, 0.0, 0.0, 2.0, 7.0])


class Broker:
    def __init__(self):
        self.now, self.holder, self.ends, self.token = 0.0, None, 0.0, 0

    def free(self):
        return self.holder is None or self.now >= self.ends

    def take(self, id):
        if not self.free():
            return None
        inherited = self.holder is not None
        self.holder, self.ends = id, self.now + LEASE
        self.token += 1
        return self.token, inherited

    def renew(self, id):
        if self.holder != id or self.now >= self.ends:
            return False
        self.ends = self.now + LEASE
        return True


class Leases(RuleBasedStateMachine):
    @initialize(rates=st.lists(st.sampled_from([1 - SLOW, 1.0, 1.05]), min_size=3, max_size=3))
    def begin(self, rates):
        self.broker = Broker()
        self.rates = rates
        self.leases = [Lease(LEASE, lambda n=n: self.broker.now * self.rates[n]) for n in range(3)]
        self.said_lost = [None] * 3
        self.last = 0
        self.ids = 0

    def clock(self, n):
        return self.broker.now * self.rates[n]

    def wait(self, seconds):
        self.broker.now += seconds

    @rule(n=OBJECTS, there=TIMES, at_the_end=st.booleans(), back=TIMES, arrives=st.booleans())
    def acquire(self, n, there, at_the_end, back, arrives):
        lease = self.leases[n]
        if lease.id is not None:
            return
        self.ids += 1
        since, id = self.clock(n), f"{n}-{self.ids}"
        self.wait(there)
        if at_the_end:  # the moment that matters, which chance alone seldom finds
            self.broker.now = max(self.broker.now, self.broker.ends)
        got = self.broker.take(id)
        assert not got or not self.certain()
        self.wait(back)
        if got and arrives and lease.granted(id, Grant(got[0], since, got[1])):
            assert lease.token > self.last
            assert lease.inherited == got[1]
            self.last = lease.token
            self.said_lost[n] = None

    @rule(n=OBJECTS, there=TIMES, back=TIMES, arrives=st.booleans())
    def renew(self, n, there, back, arrives):
        lease = self.leases[n]
        if lease.id is None or lease.lost:
            return
        since, id = self.clock(n), lease.id
        self.wait(there)
        kept = self.broker.renew(id)
        self.wait(back)
        was_lost = lease.lost
        if arrives:
            lease.renewed(since if kept else None)
            assert lease.lost == (was_lost or not kept)
        else:
            before = self.clock(n)
            lease.not_renewed()
            assert before < lease.due < before + LEASE / 3

    @rule(n=OBJECTS)
    def release(self, n):
        lease = self.leases[n]
        if lease.id is not None:
            if self.broker.holder == lease.id:
                self.broker.holder = None
            else:
                assert lease.lost or self.broker.holder == "nobody"
            lease.ended()
            assert lease.token is None
            assert lease.remaining == 0

    @precondition(lambda self: self.broker.holder is not None)
    @rule()
    def forget(self):
        """The broker loses its memory, but waits for as long as a lease before it grants anything."""
        self.broker.holder, self.broker.ends = "nobody", self.broker.now + LEASE

    @rule(seconds=TIMES)
    def time_goes_by(self, seconds):
        self.wait(seconds)

    def certain(self):
        return [lease for lease in self.leases if lease.id is not None and not lease.lost]

    @invariant()
    def one_at_most_is_certain(self):
        assert len(self.certain()) <= 1
        for lease in self.certain():
            assert lease.remaining > 0

    @invariant()
    def lost_stays_lost(self):
        for n, lease in enumerate(self.leases):
            if self.said_lost[n] is not None and self.said_lost[n] == lease.id:
                assert lease.lost
            self.said_lost[n] = lease.id if lease.id is not None and lease.lost else None


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
