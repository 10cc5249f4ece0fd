"""A copy of a state costs the memory of the host as long as it is needed."""

import weakref

import torch

from onecard.training.host_copy import HostCopy, has_room


def test_a_copy_that_is_given_up_gives_its_memory_back() -> None:
    copy, parts = HostCopy(), {"masters": {"a": torch.ones(4)}}
    found = copy.take(parts)
    copy.wait()
    parts["masters"]["a"].zero_()
    assert found["masters"]["a"].tolist() == [1.0] * 4
    buffer = weakref.ref(found["masters"]["a"])
    del found
    assert buffer() is not None
    copy.release()
    assert buffer() is None


def test_page_locked_buffers_may_take_twice_their_size() -> None:
    assert has_room(100, 201)
    assert not has_room(100, 200)
