"""Garbage collection inside a compilation."""

import gc
import weakref

import pytest

from fxq.heap import young


class Ring:
    """Refers to itself: only the collector can free it."""

    def __init__(self) -> None:
        self.me = self


def test_old_objects_are_out_of_reach_and_new_ones_are_not() -> None:
    assert gc.get_freeze_count() == 0
    old = Ring()
    before = weakref.ref(old)
    with young():
        del old
        inside = weakref.ref(Ring())
        gc.collect()
        assert inside() is None and before() is not None
    gc.collect()
    assert before() is None and gc.get_freeze_count() == 0


def test_an_error_ends_it_and_what_the_caller_froze_stays_frozen() -> None:
    with pytest.raises(ZeroDivisionError), young():
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with young():
            assert gc.get_freeze_count() == count
        assert gc.get_freeze_count() == count
    finally:
        gc.unfreeze()
