"""tuner/timing.py: medians, their intervals, early stop, interleaving."""

import random
import time

import pytest
import torch

from tuner.timing import Clock, Timed, median, median_interval


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
