"""`ipckit bench`: what each transport costs here, beside the floor, the raw client and the claim.

A figure alone says little, so each of ours has company from the same run: the *C floor* (the same mechanism with nothing
of Python above it), the *raw client* (what one would write without ipckit), and the figure that was *claimed* for it.
Read it in this order:

    scenarios.py    what a case is: a transport, and its contenders
    patterns/       what is measured: channel, queue, pubsub; one module for each, and nothing else to add one
    wires.py        what a contender is to the clock: send, recv
    ours.py raw.py raw_brokers.py raw_aio.py    the contenders of channels
    ours_queue.py raw_queue.py raw_queue_brokers.py raw_topics.py loops.py    those of queues and topics
    measure.py      the clock: timing loops, with the timer's own cost counted out
    paced.py        the same for what goes one way, to one receiver or many
    worker.py       a fresh pinned interpreter that opens one end and runs the loops when told
    crew.py         both ends of one contender, seen from the parent
    session.py      the run: opens, calibrates, interleaves, collects
    stats.py results.py claims.py machine.py    numbers, and the conditions they hold under
    report.py tables.py compare.py              how it looks

The method and its limits are in docs/reference/bench.md.
"""
