"""Pipelines: everything in order, never further apart than asked for, and one error ends every stage."""

import gc
import inspect
import itertools
import threading
import weakref
from concurrent import futures
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from belt_tasks import pipeline
from belt_tasks.pipeline import ahead, behind
from belt_tasks.threads import Threads

pytestmark = pytest.mark.usefixtures("living_threads")  # no test may leave a thread behind

PATIENCE_S = 100.0  # of a wait that ends at once unless the law is broken

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = st.integers(0, 12)
mosts = st.integers(1, 4)


class BrokenError(Exception):
    """Whose error it is, is which object it is."""


@contextmanager
def raising(expected):
    """The block raises this very error; of None, it raises nothing."""
    found = None
    try:
        yield
    except (BrokenError, KeyboardInterrupt) as error:
        found = error
    assert found is expected


class WatchedPool(Threads):
    """Says what it was given to do, and when the block in which it works has been left."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.submitted, self.left = [], threading.Event()

    def submit(self, *arguments, **options):
        self.submitted.append(super().submit(*arguments, **options))
        return self.submitted[-1]

    def __exit__(self, *arguments):
        self.left.set()
        return super().__exit__(*arguments)


@pytest.fixture
def pools(monkeypatch):
    """The thread pools that the test's pipelines made."""
    made = []

    def make(*arguments, **options):
        made.append(WatchedPool(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(pipeline, "Threads", make)
    return made


def counting(num_items, *, error=None, at=None):
    """0, 1, ...; where `at` would be, an error."""
    for i in range(num_items):
        if i == at:
            raise error
        yield i


class Meter:
    """How far one stage is from another; whoever has come far enough is told."""

    def __init__(self):
        self._changed = threading.Condition()
        self.counts = {"made": 0, "wanted": 0}
        self.furthest = 0

    def count(self, name):
        with self._changed:
            self.counts[name] += 1
            self.furthest = max(self.furthest, self.counts["made"] - self.counts["wanted"])
            self._changed.notify_all()

    def wait_for(self, name, number):
        with self._changed:
            assert self._changed.wait_for(lambda: self.counts[name] >= number, PATIENCE_S), (name, number, self.counts)


# ahead


@unhurried
@given(num_items=st.integers(0, 50), most=mosts)
def test_items_arrive_in_order(num_items, most):
    with ahead(counting(num_items), most=most) as items:
        assert list(items) == list(range(num_items))


@unhurried
@given(num_items=st.integers(0, 30), most=mosts)
def test_the_producer_is_as_far_ahead_as_it_may_be_and_no_further(num_items, most):
    meter = Meter()

    def produce():
        for i in range(num_items):
            meter.count("made")
            yield i

    with ahead(produce(), most=most) as items:
        for wanted in range(num_items + 1):
            meter.wait_for("made", min(num_items, wanted + most))  # it gets there while nobody asks for anything
            meter.count("wanted")
            assert next(items, None) == (wanted if wanted < num_items else None)

    assert meter.furthest == min(num_items, most)


def test_the_producer_works_while_the_consumer_does():
    consumer_waits, producer_waits = threading.Event(), threading.Event()

    def produce():
        yield 0
        producer_waits.set()
        assert consumer_waits.wait(PATIENCE_S)
        yield 1

    with ahead(produce(), most=1) as items:
        assert next(items) == 0
        assert producer_waits.wait(PATIENCE_S)  # the second item is in the making, though nobody has asked for it
        consumer_waits.set()
        assert list(items) == [1]


def test_items_that_are_consumed_are_let_go():
    class Item:
        pass

    alive, most_alive = weakref.WeakSet(), 0

    def produce():
        nonlocal most_alive
        for _ in range(200):
            item = Item()
            alive.add(item)
            most_alive = max(most_alive, len(alive))
            yield item
            del item

    with ahead(produce(), most=3) as items:
        for item in items:
            del item

    gc.collect()
    assert most_alive <= 3 + 2  # waiting, and what changes hands
    assert len(alive) == 0


@unhurried
@given(num_items=st.integers(1, 12), at=st.integers(0, 11), most=mosts)
def test_a_producers_error_comes_after_the_items_before_it(num_items, at, most):
    at = min(at, num_items - 1)
    error, found = BrokenError(), []

    with raising(error), ahead(counting(num_items, error=error, at=at), most=most) as items:
        found.extend(items)  # which keeps what came before the error

    assert found == list(range(at))


@unhurried
@given(num_items=few, taken=few, most=mosts, ends=st.sampled_from(["break", "error", "interrupt"]))
def test_when_the_consumer_stops_the_generator_is_closed_and_no_thread_is_left(
    living_threads, num_items, taken, most, ends
):
    advanced_by, closed_by = set(), []

    def produce():
        try:
            for i in range(num_items):
                advanced_by.add(threading.current_thread())
                yield i
        finally:
            closed_by.append(threading.current_thread())

    error = {"break": None, "error": BrokenError(), "interrupt": KeyboardInterrupt()}[ends]
    generator, found = produce(), []
    with raising(error), ahead(generator, most=most) as items:
        found.extend(itertools.islice(items, taken))
        if error is not None:
            raise error

    assert living_threads() == []
    assert found == list(range(min(taken, num_items)))
    assert inspect.getgeneratorstate(generator) == inspect.GEN_CLOSED
    if found:
        assert [{thread} for thread in closed_by] == [advanced_by]  # once, by the one thread that advanced it
        assert threading.current_thread() not in advanced_by


def test_an_item_in_the_making_is_waited_for_and_its_error_does_not_hide_the_consumers():
    making, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    error = BrokenError("the consumer's")

    def produce():
        yield 0
        making.set()
        assert may_end.wait(PATIENCE_S)
        ended.set()
        raise BrokenError("the producer's")

    with raising(error), ahead(produce(), most=1) as items:
        next(items)
        assert making.wait(PATIENCE_S)
        may_end.set()
        raise error

    assert ended.is_set()


def test_nothing_more_is_begun_once_the_consumer_has_stopped(pools):
    making, dropped, begun = threading.Event(), threading.Event(), []
    error = BrokenError()

    def produce():
        for item in range(10):
            begun.append(item)
            if item == 1:
                making.set()
                dropped.wait(PATIENCE_S)
            yield item

    with raising(error), ahead(produce(), most=4) as items:
        next(items)
        assert making.wait(PATIENCE_S)
        for future in pools[0].submitted[2:]:
            future.add_done_callback(lambda _: dropped.set())
        raise error

    assert begun == [0, 1]


# behind


@unhurried
@given(num_items=st.integers(0, 50), most=mosts)
def test_calls_come_in_order_and_have_ended_when_the_block_has(num_items, most):
    called, callers = [], set()

    def call(item):
        called.append(item)
        callers.add(threading.current_thread())

    with behind(call, most=most) as hand_over:
        for item in range(num_items):
            hand_over(item)

    assert called == list(range(num_items))
    assert len(callers) == min(num_items, 1)
    assert threading.current_thread() not in callers


@unhurried
@given(num_items=st.integers(0, 30), most=mosts)
def test_at_most_so_many_items_wait_or_are_in_the_function(num_items, most):
    """What hands over is the one ahead here: `made` counts what was taken off its hands, `wanted` what has ended."""
    meter = Meter()
    begun = Meter()

    def call(item):
        # it does not end before the block is stuck in handing over the one item too many
        begun.wait_for("made", min(num_items, item + most + 1))
        meter.count("wanted")

    with behind(call, most=most) as hand_over:
        for item in range(num_items):
            begun.count("made")
            hand_over(item)
            meter.count("made")

    assert meter.counts == {"made": num_items, "wanted": num_items}
    assert meter.furthest <= most


def test_as_many_items_as_may_wait_are_taken_at_once():
    may_end = threading.Event()

    with behind(lambda _: may_end.wait(PATIENCE_S), most=3) as hand_over:
        for item in range(3):
            hand_over(item)
        assert not may_end.is_set()  # and still nobody waited
        may_end.set()


@unhurried
@given(num_items=st.integers(1, 12), at=st.integers(0, 11), most=mosts)
def test_what_a_call_raises_is_raised_by_a_later_hand_over_or_the_end(num_items, at, most):
    at = min(at, num_items - 1)
    error, called, handed_over = BrokenError(), [], []

    def call(item):
        called.append(item)
        if item == at:
            raise error

    with raising(error), behind(call, most=most) as hand_over:
        for item in range(num_items):
            hand_over(item)
            handed_over.append(item)

    assert called == list(range(at + 1))  # nothing is called after it
    assert at <= len(handed_over) <= at + most  # neither before it happened nor long after


def test_an_error_that_has_happened_is_raised_by_the_very_next_hand_over(pools):
    error, handed_over = BrokenError(), []

    def call(_):
        raise error

    with raising(error), behind(call, most=4) as hand_over:
        for item in range(4):
            hand_over(item)
            handed_over.append(item)
            futures.wait(pools[0].submitted)

    assert handed_over == [0]


def test_the_end_of_the_block_raises_what_the_last_call_raised():
    error = BrokenError()
    block_has_ended = threading.Event()

    def call(_):
        assert block_has_ended.wait(PATIENCE_S)
        raise error

    with raising(error), behind(call, most=2) as hand_over:
        hand_over(0)
        block_has_ended.set()


@pytest.mark.parametrize("error", [BrokenError(), KeyboardInterrupt()], ids=repr)
def test_nothing_more_is_called_once_the_block_raised(pools, error):
    in_function, called = threading.Event(), []

    def call(item):
        called.append(item)
        in_function.set()
        assert pools[0].left.wait(PATIENCE_S)  # the block has raised, and now waits for this
        called.append("ended")

    with raising(error), behind(call, most=4) as hand_over:
        for item in range(4):
            hand_over(item)
        assert in_function.wait(PATIENCE_S)
        raise error

    assert called == [0, "ended"]  # what was under way has ended, what waited was never called


# both


def run_three_stages(num_items, *, most, fails):
    """Read, encode and write some items; stage -> (item, error) says which of them raise.

    Returns:
        What was encoded and what was written, and what was raised.
    """
    encoded, written, caught = [], [], None

    def step(stage, item):
        at, error = fails.get(stage, (None, None))
        if item == at:
            raise error

    def read():
        for item in range(num_items):
            step("read", item)
            yield item

    def write(item):
        step("write", item)
        written.append(item)

    try:
        with ahead(read(), most=most) as items, behind(write, most=most) as hand_over:
            for item in items:
                step("encode", item)
                encoded.append(item)
                hand_over(item)
    except (BrokenError, KeyboardInterrupt) as error:
        caught = error
    return encoded, written, caught


@unhurried
@given(num_items=st.integers(0, 30), most=mosts)
def test_three_stages_pass_everything_on(num_items, most):
    encoded, written, caught = run_three_stages(num_items, most=most, fails={})

    assert encoded == written == list(range(num_items))
    assert caught is None


@unhurried
@given(
    stage=st.sampled_from(["read", "encode", "write"]),
    num_items=st.integers(1, 20),
    at=st.integers(0, 19),
    most=mosts,
    error=st.sampled_from([BrokenError, KeyboardInterrupt]),
)
def test_an_error_in_any_stage_ends_all_of_them(living_threads, stage, num_items, at, most, error):
    at, cause = min(at, num_items - 1), error()

    encoded, written, caught = run_three_stages(num_items, most=most, fails={stage: (at, cause)})

    assert caught is cause
    assert living_threads() == []
    assert encoded == list(range(len(encoded)))
    assert written == list(range(len(written)))  # a beginning, in order
    if stage == "write":
        assert len(written) == at
        assert at < len(encoded) + 1 <= at + 2 + most
    else:
        assert len(encoded) == at
        assert at - most <= len(written) <= at


@unhurried
@given(first=st.integers(0, 10), later=st.integers(1, 5), most=mosts, order=st.permutations(["read", "encode"]))
def test_of_two_errors_the_one_that_comes_first_is_raised(first, later, most, order):
    causes = {order[0]: (first, BrokenError()), order[1]: (first + later, BrokenError())}

    _, _, caught = run_three_stages(30, most=most, fails=causes)

    assert caught is causes[order[0]][1]


@unhurried
@given(first=st.integers(0, 10), most=mosts, other=st.sampled_from(["read", "encode"]))
def test_an_error_behind_is_raised_before_one_that_comes_much_later(first, most, other):
    causes = {"write": (first, BrokenError()), other: (first + most + 1, BrokenError())}

    _, _, caught = run_three_stages(30, most=most, fails=causes)

    assert caught is causes["write"][1]


@pytest.mark.parametrize("num_good", [0, 1, 3])
def test_an_error_behind_is_not_lost_where_the_block_raises_another_one_after_it(pools, num_good):
    first, all_given = BrokenError("first"), threading.Event()

    def write(item):
        assert all_given.wait(PATIENCE_S)
        if item == num_good:
            raise first

    def fail_twice():
        with behind(write, most=num_good + 1) as hand_over:
            for item in range(num_good + 1):
                hand_over(item)
            all_given.set()
            futures.wait(pools[0].submitted)
            raise BrokenError("second")

    with pytest.raises(BrokenError) as raised:
        fail_twice()

    chain = [raised.value]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    assert first in chain
