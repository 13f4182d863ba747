from memlab.meters.allocator.driver import Driver
from memlab.units import MiB, TiB


def test_it_gives_up_to_its_limit_and_remembers_the_most():
    driver = Driver(limit=10, allowed=None)
    assert driver.take(6) and not driver.take(5) and driver.take(4)
    driver.give_back(8)
    assert (driver.taken, driver.most_taken) == (2, 10)


def test_what_is_allowed_may_be_less():
    driver = Driver(limit=None, allowed=10)
    assert driver.allows(10) and not driver.allows(11)


def test_addresses_rise_are_aligned_and_do_not_touch():
    driver = Driver(None, None)
    first, second, third = (driver.address_for(size * MiB) for size in (2, 3, 2))
    assert first % (2 * MiB) == second % (2 * MiB) == third % (2 * MiB) == 0
    assert second > first + 2 * MiB and third > second + 3 * MiB


def test_a_recorded_address_is_taken_where_the_size_agrees():
    driver = Driver(None, None)
    driver.recorded.append((4096, 20))
    assert driver.address_for(21) != 4096
    assert driver.address_for(20) == 4096
    assert driver.address_for(20) != 4096


def test_an_expandable_segment_has_an_eighth_more_addresses_than_there_is_memory():
    assert Driver(8 * MiB, None).address_space() == 9 * MiB
    assert Driver(None, None).address_space() == TiB + TiB // 8
