"""Counts events. Its group has a cursor: start it late, stop it, start two of them, and none is missed or counted twice."""

from collections import Counter

import ipckit
from planes import Event, configuration

planes, _ = configuration()
counts = Counter()
with ipckit.subscriber(planes.events, topics=["task.*", "tool.*", "run.*"], group="metrics", type=Event) as events:
    for event in events:
        counts[event.topic] += 1
        event.ack()
        if event.topic == "run.ended":
            break
print("metrics:", ", ".join(f"{topic} {count}" for topic, count in sorted(counts.items())))
