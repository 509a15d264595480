"""The leaky bucket on a clock of its own: rates, bursts, and how long either lasts."""

from __future__ import annotations

import pytest

from byre.io.leaky_bucket import LeakyBucket, Rate


def done_in(bucket: LeakyBucket, seconds: float, units: float = 1.0) -> float:
    """What is done in ``seconds`` by somebody who does ``units`` whenever that is allowed."""
    done, now = 0.0, 0.0
    while True:
        wait = bucket.wait()
        if wait:
            if now + wait > seconds:
                bucket.leak(seconds - now)
                return done
            now += wait
            bucket.leak(wait)
        else:
            bucket.add(units)
            done += units


def test_no_limit_no_wait() -> None:
    bucket = LeakyBucket(Rate())
    bucket.add(10**12)
    assert bucket.wait() == 0


@pytest.mark.parametrize("units", [1, 7, 64])
def test_the_rate_is_kept(units: int) -> None:
    bucket = LeakyBucket(Rate(1000))
    assert done_in(bucket, 20, units) == pytest.approx(20_000 + 100, abs=2 * units)
    assert done_in(bucket, 20, units) == pytest.approx(20_000, abs=2 * units)


def test_a_large_request_passes_and_those_after_it_pay() -> None:
    bucket = LeakyBucket(Rate(1000))
    assert bucket.wait() == 0
    bucket.add(5100)
    assert bucket.wait() == pytest.approx(5.0)
    bucket.leak(2.0)
    assert bucket.wait() == pytest.approx(3.0)
    bucket.leak(100.0)
    assert bucket.wait() == 0


def test_a_burst_of_one_second() -> None:
    """The bucket holds one second of the burst rate, and that may be used at once."""
    bucket = LeakyBucket(Rate(100, 2000))
    assert done_in(bucket, 0) == pytest.approx(2000, abs=1)
    assert done_in(bucket, 10) == pytest.approx(1000, abs=2)


def test_a_long_burst() -> None:
    """100 a second with bursts of 2000 for 60 seconds: what leaks meanwhile is worth three seconds more."""
    bucket = LeakyBucket(Rate(100, 2000, 60))
    assert done_in(bucket, 60) == pytest.approx(120_000 + 200, abs=2)
    assert done_in(bucket, 3) == pytest.approx(6000, abs=2)
    assert done_in(bucket, 60) == pytest.approx(6000, abs=400)
    assert done_in(bucket, 60) == pytest.approx(6000, abs=2)


def test_the_burst_rate_is_never_passed() -> None:
    bucket = LeakyBucket(Rate(100, 2000, 60))
    assert done_in(bucket, 5) == pytest.approx(10_000 + 200, abs=2)


def test_a_lower_rate_bursts_longer() -> None:
    """1000 a second can be kept up for 120 seconds and more."""
    bucket = LeakyBucket(Rate(100, 2000, 60))
    for _ in range(130 * 10):
        assert bucket.wait() == 0
        bucket.add(100)
        bucket.leak(0.1)
    for _ in range(50):
        bucket.add(100)
        bucket.leak(0.1)
    assert bucket.wait() > 0


def test_idle_time_allows_another_burst() -> None:
    bucket = LeakyBucket(Rate(100, 2000, 60))
    done_in(bucket, 100)
    bucket.leak(600)  # half of the bucket
    assert done_in(bucket, 30) == pytest.approx(60_000 + 200, abs=2)
