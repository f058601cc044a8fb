"""tuner/timing.py: medians, their intervals, early stop, interleaving, dirty batches."""

import math
import random
import time
from fractions import Fraction

import pytest
import torch

from tuner.device_state import REPEATS, State, Watch
from tuner.timing import FIRST_ROUNDS, Clock, Timed, median, median_interval


def test_median_of_odd_and_even_counts():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_interval_holds_the_median_and_shrinks_with_more_samples():
    rng = random.Random(0)
    few, many = ([rng.gauss(100, 5) for _ in range(n)] for n in (9, 400))
    for samples in (few, many):
        low, high = median_interval(samples)
        assert low <= median(samples) <= high
    width = [high - low for low, high in (median_interval(few), median_interval(many))]
    assert width[1] < width[0] / 3


def test_interval_is_the_tightest_that_is_sure_enough():
    def coverage(rank, n):
        """Of the rank-th smallest to the rank-th largest."""
        return 1 - Fraction(2 * sum(math.comb(n, k) for k in range(rank)), 2**n)

    for n in range(6, 201):
        low, high = (int(rank) for rank in median_interval([float(rank) for rank in range(1, n + 1)]))
        assert low + high == n + 1, "as far from either end"
        assert coverage(low, n) >= 0.95 > coverage(low + 1, n), n


def test_interval_of_more_samples_than_a_float_counts_outcomes():
    low, high = median_interval([float(rank) for rank in range(1, 10_001)])
    assert 5000 - low == pytest.approx(98, abs=1)
    assert low + high == 10_001


def test_interval_covers_the_true_median_about_as_often_as_it_says():
    rng = random.Random(1)
    hits = 0
    for _ in range(400):
        low, high = median_interval([rng.expovariate(1.0) for _ in range(25)])
        hits += low <= 0.6931 <= high
    assert 0.92 <= hits / 400 <= 0.995


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_interval_of_few_samples_is_their_range(n):
    samples = [float(i) for i in range(n)]
    assert median_interval(samples) == (0.0, float(n - 1))


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="samples"):
        median_interval([])


class Scripted(Clock):
    """A clock whose samples are given."""

    def __init__(self, us):
        super().__init__("cpu")
        self.us, self.taken = us, 0

    def sample(self, call, count):
        self.taken += count
        return [self.us] * count


def test_a_clearly_slow_candidate_is_stopped_after_its_first_samples():
    slow, fair = Scripted(210.0), Scripted(190.0)
    assert slow.measure(lambda: None, 20, 1e3, best_us=100.0) == ([210.0] * 3, True)
    samples, stopped = fair.measure(lambda: None, 20, 1e3, best_us=100.0)
    assert (len(samples), stopped) == (20, False)
    assert slow.taken < fair.taken


def test_the_budget_bounds_the_samples():
    samples, _ = Scripted(10_000.0).measure(lambda: None, 100, 50.0)
    assert len(samples) == 5


def test_interleaved_rounds_call_everything_and_start_elsewhere_each_time():
    order = []
    rounds = Clock("cpu").interleaved([lambda name=name: order.append(name) for name in "abc"], 3)
    assert "".join(order) == "abcbcacab"
    assert [len(r) for r in rounds] == [3, 3, 3]
    assert all(us >= 0 for r in rounds for us in r)


def test_samples_stand_in_the_order_of_the_calls_whichever_came_first():
    slow, quick = (lambda: time.sleep(0.01)), (lambda: None)
    for samples in Clock("cpu").interleaved([slow, quick], 3):
        assert samples[0] > 9e3 > samples[1]


def test_a_sample_of_several_calls_is_the_time_of_one():
    count = []
    ((us,),) = Clock("cpu").interleaved([Timed(lambda: (count.append(1), time.sleep(0.002)), count=5)], 1)
    assert len(count) == 5
    assert 2e3 <= us < 8e3


class Readings:
    """A monitor that tells the SM clocks it was given, then 1980 MHz for ever."""

    def __init__(self, *mhz, read=lambda: None):
        self.mhz, self.read, self.count = list(mhz), read, 0

    def clock(self):
        self.count += 1
        self.read()
        return State(sm_mhz=self.mhz.pop(0) if self.mhz else 1980.0)


class Numbered(Clock):
    """A clock whose samples are numbered in the order they are taken; ``batches`` are their numbers."""

    def __init__(self, readings):
        super().__init__("cpu", Watch(readings))
        self.numbers, self.batches = 0, []

    def _one(self, timed):
        timed.call()
        self.numbers += 1
        number = float(self.numbers)
        return lambda: number

    def _take(self, timed, rounds, first):
        self.batches.append(rounds)
        return super()._take(timed, rounds, first)


@pytest.fixture
def passes(monkeypatch):
    """Time that goes on by the seconds this is called with, and a microsecond for every look at it."""
    now = [0.0]

    def go_on(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: go_on(1e-6) or now[0])
    return go_on


@pytest.mark.usefixtures("passes")
def test_a_dirty_batch_is_dropped_and_taken_again():
    clock = Numbered(Readings(1980, 1500))  # before and after the first batch
    samples = [s for (s,) in clock.interleaved([lambda: None], 20)]
    assert samples == [float(i) for i in range(FIRST_ROUNDS + 1, FIRST_ROUNDS + 21)]
    assert clock.watch.report() == {"clock_mhz": 1980.0, "dropped": FIRST_ROUNDS, "dirty": None}


@pytest.mark.usefixtures("passes")
def test_a_clock_that_stays_low_is_kept_in_the_end_and_flagged():
    clock = Numbered(Readings(1980, *[1410] * 99))
    rounds = clock.interleaved([lambda: None, lambda: None], 20)
    assert [len(r) for r in rounds] == [2] * 20
    assert clock.watch.dropped == 2 * FIRST_ROUNDS * REPEATS
    assert clock.numbers == 2 * (20 + FIRST_ROUNDS * REPEATS)
    assert clock.watch.report()["clock_mhz"] == 1410
    assert clock.watch.report()["dirty"].startswith("SM clock 1410 MHz, 1980 seen before (2 of 2 batches)")


@pytest.mark.usefixtures("passes")
def test_rounds_start_elsewhere_each_time_across_batches_and_repeats():
    order = []
    clock = Numbered(Readings(1980, 1980, 1500))  # the second batch is dirty
    clock.interleaved([lambda name=name: order.append(name) for name in "abc"], FIRST_ROUNDS + 2)
    eight = "abcbcacab" * 2 + "abcbca"
    assert "".join(order) == eight + "cababc" * 2
    assert FIRST_ROUNDS == 8


def test_batches_are_as_long_as_their_time_says_and_longer_where_reading_is_slow(passes):
    quick, slow = Numbered(Readings()), Numbered(Readings(read=lambda: passes(0.002)))
    for clock in (quick, slow):
        clock.interleaved([lambda: passes(0.01)], 20)
        assert clock.watch._monitor.count == 1 + len(clock.batches)
    assert quick.batches == [FIRST_ROUNDS, 2, 2, 2, 2, 2, 2]  # of 25 ms at most
    assert slow.batches == [FIRST_ROUNDS, 9, 3]  # of fifty readings at most; a reading is part of a batch's time


@pytest.mark.usefixtures("passes")
def test_warming_up_is_not_held_against_a_timing():
    clock = Numbered(Readings(345, 345, 1980))
    clock.warm_up([lambda: None], 5)
    assert clock.watch.report()["dropped"] == 0
    samples, slow = clock.measure(lambda: None, 12, 1e3)
    assert (len(samples), slow) == (12, False)
    # the clock rose during the first sample, which is taken again
    assert clock.watch.report() == {"clock_mhz": 1980.0, "dropped": 1, "dirty": None}


def test_on_cuda_the_clocks_are_read_while_the_last_round_is_under_way(monkeypatch):
    """In nobody's time: after everything is enqueued and the device has come to the last round, before it is waited for."""
    done = []

    class Event:
        def __init__(self, enable_timing=False):
            self.name = "timed" if enable_timing else "last"

        def record(self):
            done.append(self.name)

        def synchronize(self):
            done.append("wait for " + self.name)

        def elapsed_time(self, stop):
            return 0.1

    class OnCuda(Clock):
        def __init__(self):
            self.device, self.watch = torch.device("cuda"), Watch(Readings(read=lambda: done.append("read")))

        def _flush(self):
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    assert OnCuda().interleaved([lambda: done.append("call")], 2) == [[100.0], [100.0]]
    one = ["flush", "timed", "call", "timed"]
    assert done == ["flush", "flush", "read", "wait", *one, "last", *one, "wait for last", "read", "wait"]


def test_the_cpu_has_no_clocks_to_read():
    clock = Clock("cpu", Watch.of("cpu"))
    assert len(clock.sample(lambda: None, 30)) == 30
    assert clock.watch.report() == {"clock_mhz": None, "dropped": 0, "dirty": None}


@pytest.mark.gpu
def test_reading_clocks_costs_less_than_two_percent_of_a_timing():
    x = torch.ones(16 << 20, device="cuda")
    plain, watched = Clock("cuda"), Clock("cuda", Watch.of("cuda"))
    assert watched.watch.sees
    spent = {plain: [], watched: []}
    medians = {plain: [], watched: []}
    for _ in range(8):
        for clock, seconds in spent.items():
            clock.watch.start()
            start = time.perf_counter()
            samples = clock.sample(lambda: x.add_(1), 400)
            if clock.watch.dropped == 0:  # what is dropped is taken again, and takes its time
                seconds.append(time.perf_counter() - start)
                medians[clock].append(median(samples))
    assert spent[watched], watched.watch.report()
    print(f"a reading takes {watched.watch.read_s * 1e6:.0f} us; {min(spent[plain]):.4f} s without, {min(spent[watched]):.4f} s with")
    assert min(spent[watched]) < 1.02 * min(spent[plain])
    assert median(medians[watched]) == pytest.approx(median(medians[plain]), rel=0.01)
    assert watched.watch.report()["clock_mhz"] > 100


@pytest.mark.gpu
def test_eager_samples_hold_the_launches_and_others_do_not():
    x = torch.ones(1, device="cuda")

    def call():
        time.sleep(50e-6)  # the host's part
        x.add_(1)

    clock = Clock("cuda")
    clock.sample(call, 3)
    eager, hidden = (median([s[0] for s in clock.interleaved([Timed(call, eager=e)], 9)]) for e in (True, False))
    assert eager > 50
    assert hidden < eager


def test_copy_bandwidth_is_plausible(device):
    assert 0.05 < Clock(device.type).copy_gbps(8 << 20) < 1e5
