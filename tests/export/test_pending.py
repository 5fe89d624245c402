"""The list of what waits: each key in order, every byte and every trace accounted for, whoever has it in hand."""

import threading
from collections import defaultdict
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from mlflow.entities import Metric

from dspy_mlflow_async.export.counters import TraceCounters
from dspy_mlflow_async.export.operations import Reference, RunOperation, TraceUpdate
from dspy_mlflow_async.export.queue.pending import PendingOperations

KEYS = st.sampled_from("abc")
SEGMENT = Path("1.seg")


class Waiting(RuleBasedStateMachine):
    """Operations come, are taken, spilled, blamed, given back and finished in any order."""

    def __init__(self):
        super().__init__()
        self.books = TraceCounters()
        self.pending = PendingOperations(self.books)
        self.come = defaultdict(list)  # numbers, by key
        self.hands = []
        self.offset = 0

    def reference(self, key, counted=0):
        self.offset += 10
        return Reference(SEGMENT, self.offset, 10, key, counted)

    def end_of_trace(self):
        self.books.start()
        self.books.end()

    @rule(key=KEYS, size=st.integers(1, 50), is_run=st.booleans())
    def add(self, key, size, is_run):
        """An operation comes into memory, as far as there is room."""
        if is_run:
            item = RunOperation(key=f"run {key}", size=size, metrics=[Metric("m", 1.0, 1, 0)])
        else:
            self.end_of_trace()
            item = TraceUpdate(key=key, size=size, counted=1)
        had = self.pending.size
        if self.pending.add(item, most_bytes=100):
            assert had + size <= 100
            self.come[item.key].append(self.pending.last)
        else:
            assert had + size > 100
            self.pending.drop(item)

    @rule(key=KEYS)
    def add_spooled(self, key):
        """A record comes that lies on disk."""
        self.end_of_trace()
        self.pending.add_spooled([self.reference(key, 1)], coming_from="waiting")
        self.come[key].append(self.pending.last)

    @rule(most=st.integers(1, 4), from_disk=st.booleans())
    def take(self, most, from_disk):
        """Somebody takes a batch: of each key what came first, and nothing that others have in hand."""
        batch = self.pending.take(most, 1000, from_disk=from_disk)
        self.check_taken(batch)
        assert len(batch) <= most
        assert len({entry.run for entry in batch}) <= 1
        assert from_disk or all(entry.operation is not None for entry in batch)

    @rule(key=KEYS)
    def take_all_of(self, key):
        """A caller takes all of one trace, or nothing."""
        batch = self.pending.take_all_of(key)
        if batch is not None:
            assert self.come[key] == [entry.number for entry in batch]
            self.check_taken(batch)

    def check_taken(self, batch):
        taken = {entry.number for hand in self.hands for entry in hand}
        for key in {entry.key for entry in batch}:
            numbers = [entry.number for entry in batch if entry.key == key]
            assert self.come[key][: len(numbers)] == numbers
            assert not taken & set(numbers)
        if batch:
            self.hands.append(batch)

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def end_of_batch(self, data):
        """What was in hand is stored, refused, blamed or given back."""
        batch = self.hands.pop(data.draw(st.integers(0, len(self.hands) - 1)))
        for entry in batch:
            write_status = data.draw(st.sampled_from(["stored", "dead", "suspect", "away"]))
            if write_status == "suspect":
                write_status = "dead" if self.pending.suspect(entry) else "away"
            if write_status == "away":
                continue
            if write_status == "stored":
                self.pending.note_success(entry)
            assert self.pending.finish(entry, write_status)
            assert not self.pending.finish(entry, write_status)
            self.come[entry.key].remove(entry.number)
        self.pending.release(batch)

    @rule(data=st.data())
    def spill(self, data):
        """Something in memory goes to the disk, in whoever's hands it is; it keeps its place."""
        residents = [entry for key in self.come for entry in self.pending.residents_of(key)]
        if residents:
            entry = data.draw(st.sampled_from(residents))
            assert self.pending.spill(entry, self.reference(entry.key, entry.counted))
            assert not self.pending.spill(entry, self.reference(entry.key, entry.counted))

    @rule()
    def hurry(self):
        """Suspects are due."""
        self.pending.hurry()

    @invariant()
    def adds_up(self):
        """What is here is what has come and is not done with, and the counters know where it is."""
        numbers = sorted(number for of_key in self.come.values() for number in of_key)
        stats = self.books.stats()
        entries = [entry for key in self.come for entry in self.pending.residents_of(key)]
        assert len(numbers) == len(self.pending) == self.pending.resident + self.pending.spooled
        assert self.pending.size == sum(entry.size for entry in entries)
        assert stats.waiting == sum(entry.counted for entry in entries)
        assert stats.started == stats.waiting + stats.spooled + stats.stored + stats.dead + stats.dropped
        assert all(self.pending.has(key) is bool(of_key) for key, of_key in self.come.items())
        oldest = numbers[0] if numbers else self.pending.last + 1
        assert self.pending.is_done_with(oldest - 1)
        assert not self.pending.is_done_with(oldest) or not numbers

    @precondition(lambda self: not self.hands)
    @rule()
    def is_never_stuck(self):
        """Where nobody has anything in hand, there is always something to take, as soon as suspects are due."""
        self.pending.hurry()
        batch = self.pending.take(10, 1000)
        assert bool(batch) is bool(len(self.pending))
        self.check_taken(batch)


TestWaiting = Waiting.TestCase
TestWaiting.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_memory_and_disk_take_turns():
    """Neither what comes now nor what has waited on disk is starved by the other."""
    pending = PendingOperations(TraceCounters())
    pending.add_spooled(Reference(SEGMENT, number, 10, f"disk {number}") for number in range(3))
    for number in range(3):
        pending.add(TraceUpdate(key=f"memory {number}"), most_bytes=None)

    order = []
    while batch := pending.take(1, 1000):
        order.append(batch[0].key.split()[0])
        pending.finish(batch[0], None)
    assert ["memory", "disk"] * 3 == order


def test_the_end_takes_what_a_writer_has_in_hand():
    """What is brought to the disk while it is being written is counted once, wherever the two meet."""
    for _ in range(300):
        books = TraceCounters()
        books.start()
        books.end()
        pending = PendingOperations(books)
        pending.add(TraceUpdate(key="a", counted=1), most_bytes=None)
        (entry,) = pending.take(1, 1000)
        barrier = threading.Barrier(2)

        def store(barrier=barrier, pending=pending, entry=entry):
            barrier.wait()
            pending.finish(entry, "stored")

        thread = threading.Thread(target=store)
        thread.start()
        barrier.wait()
        pending.spill(entry, Reference(SEGMENT, 0, 10, "a", 1))
        thread.join()

        stats = books.stats()
        assert (1, 0, 0) == (stats.stored, stats.waiting, stats.spooled)
        assert 0 == len(pending) == pending.size
