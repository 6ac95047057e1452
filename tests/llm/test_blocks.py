"""Blocks are counted, found again by their content, and taken again in order of their last use."""

import pytest

from fairlead.core.generation import Sampling
from fairlead.llm.blocks import BlockPool
from fairlead.llm.sequence import Sequence


def sequence(token_ids: list[int], *, salt: str = "") -> Sequence:
    return Sequence(0, token_ids, Sampling(), salt=salt)


def compute(pool: BlockPool, seq: Sequence) -> Sequence:
    """Give `seq` blocks for all of its tokens, and publish the full ones."""
    seq.blocks = pool.match(seq)
    pool.acquire(seq.blocks)
    cached = len(seq.blocks)
    seq.blocks += pool.allocate(pool.num_blocks_for(seq.num_tokens) - cached)
    pool.publish(seq, cached, seq.num_tokens // pool.block_size)
    seq.num_computed = seq.num_tokens
    return seq


def test_a_prefix_is_found_again_by_who_knows_the_same_tokens():
    pool = BlockPool(8, 4)
    first = compute(pool, sequence(list(range(10))))
    assert first.blocks == [0, 1, 2]  # block 0 is a block like any other

    assert pool.match(sequence([*range(8), 99, 99])) == [0, 1]
    assert pool.match(sequence([*range(7), 99, 99])) == [0]
    assert pool.match(sequence([99, *range(1, 10)])) == []  # a chain: what follows another head is other content
    second = compute(pool, sequence([*range(8), 99]))
    assert second.blocks == [0, 1, 3]
    pool.check_integrity([first, second])


def test_at_least_the_last_token_is_left_to_compute():
    pool = BlockPool(8, 4)
    compute(pool, sequence(list(range(8))))
    assert len(pool.match(sequence(list(range(8))))) == 1
    assert len(pool.match(sequence(list(range(9))))) == 2
    assert pool.match(sequence([0, 1, 2, 3])) == []
    assert pool.match(sequence([0])) == []


def test_another_salt_sees_nothing():
    pool = BlockPool(8, 4)
    compute(pool, sequence(list(range(9)), salt="tenant a"))
    assert pool.match(sequence(list(range(9)), salt="tenant b")) == []
    assert pool.match(sequence(list(range(9)))) == []
    assert len(pool.match(sequence(list(range(9)), salt="tenant a"))) == 2


def test_large_token_ids_are_told_apart():
    pool = BlockPool(8, 2)
    compute(pool, sequence([1, 2**32 + 1, 5]))
    assert pool.match(sequence([1, 1, 5])) == []


def test_released_blocks_stay_found_until_they_are_taken():
    pool = BlockPool(3, 4)
    seq = compute(pool, sequence(list(range(9))))
    pool.release(seq)
    assert seq.blocks == [] and pool.num_free == 3 and pool.num_published == 2
    again = compute(pool, sequence(list(range(9))))
    assert again.blocks[:2] == [0, 1]
    pool.release(again)

    other = sequence(list(range(100, 109)))
    other.blocks = pool.allocate(3)
    assert pool.num_published == 0 and pool.match(again) == []
    pool.check_integrity([other])


def test_empty_blocks_are_taken_first_then_the_least_recently_used_and_the_head_of_a_prefix_last():
    pool = BlockPool(7, 4)
    old = compute(pool, sequence(list(range(0, 9))))  # blocks 0, 1 full, 2 half
    new = compute(pool, sequence(list(range(50, 59))))  # 3, 4 full, 5 half
    pool.release(old)
    pool.release(new)
    # 6 was never used, 2 and 5 hold no full block; then `old` tail first, then `new` tail first.
    assert {*pool.allocate(3)} == {2, 5, 6}
    assert [pool.allocate(1)[0] for _ in range(4)] == [1, 0, 4, 3]


def test_a_prefix_that_is_used_again_outlives_one_that_is_not():
    pool = BlockPool(6, 4)
    old, new = compute(pool, sequence(list(range(9)))), compute(pool, sequence(list(range(50, 59))))
    pool.release(old)
    pool.release(new)
    pool.release(compute(pool, sequence(list(range(9)))))
    pool.allocate(4)  # the two half ones, and all of `new`
    assert len(pool.match(old)) == 2 and pool.match(new) == []


def test_a_shared_block_is_free_when_the_last_one_leaves():
    pool = BlockPool(8, 4)
    first = compute(pool, sequence(list(range(9))))
    second = compute(pool, sequence(list(range(9))))
    assert pool.num_free == 4
    assert pool.num_taken(3, pool.match(first)) == 1
    pool.release(first)
    assert pool.num_free == 5
    pool.check_integrity([second])
    pool.release(second)
    assert pool.num_free == 8 and pool.num_taken(3, pool.match(first)) == 3


def test_two_who_computed_the_same_keep_their_own_copies():
    pool = BlockPool(8, 4)
    first = compute(pool, sequence(list(range(9))))
    second = sequence(list(range(9)))
    second.blocks = pool.allocate(3)
    assert pool.publish(second, 0, 2) == []
    pool.release(first)
    assert pool.match(second) == [0, 1]
    pool.check_integrity([second])


def test_what_is_unpublished_is_not_found_and_taken_first():
    pool = BlockPool(4, 4)
    seq = compute(pool, sequence(list(range(13))))
    pool.unpublish([2])
    assert pool.match(seq) == [0, 1]
    pool.release(seq)
    pool.unpublish([0])
    assert pool.match(seq) == [] and pool.num_published == 1
    pool.check_integrity([])
    assert {*pool.allocate(3)} == {0, 2, 3} and pool.allocate(1) == [1]


def test_without_prefix_caching_nothing_is_kept():
    pool = BlockPool(4, 4, prefix_caching=False)
    seq = compute(pool, sequence(list(range(9))))
    assert pool.match(seq) == [] and pool.num_published == 0 and seq.hashes == []
    pool.check_integrity([seq])


def test_hashes_are_computed_only_as_far_as_they_are_asked_for():
    pool = BlockPool(64, 4)
    seq = sequence(list(range(200)))
    assert pool.match(seq) == [] and len(seq.hashes) == 1


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_a_pool_of_nothing_is_refused(num_blocks: int, block_size: int):
    with pytest.raises(ValueError, match="at least one block of one token"):
        BlockPool(num_blocks, block_size)


def lose_a_block(pool: BlockPool, seq: Sequence) -> None:
    seq.blocks.pop()


def hold_a_strangers_block(pool: BlockPool, seq: Sequence) -> None:
    seq.blocks.append(3)


def change_a_published_token(pool: BlockPool, seq: Sequence) -> None:
    seq.token_ids[0] = 99


def swap_blocks(pool: BlockPool, seq: Sequence) -> None:
    seq.blocks[0], seq.blocks[1] = seq.blocks[1], seq.blocks[0]


def compute_beyond_the_blocks(pool: BlockPool, seq: Sequence) -> None:
    seq.num_computed = 100


def release_twice(pool: BlockPool, seq: Sequence) -> None:
    blocks = seq.blocks
    pool.release(seq)
    seq.blocks = blocks


@pytest.mark.parametrize(
    "damage", [lose_a_block, hold_a_strangers_block, change_a_published_token, swap_blocks, compute_beyond_the_blocks, release_twice]
)
def test_the_integrity_check_sees(damage):
    pool = BlockPool(8, 4)
    seq = compute(pool, sequence(list(range(9))))
    pool.check_integrity([seq])
    damage(pool, seq)
    with pytest.raises(AssertionError):
        pool.check_integrity([seq])


def test_a_pool_whose_memory_is_gone_knows_no_prefix():
    pool = BlockPool(8, 4)
    first = compute(pool, sequence(list(range(10))))
    with pytest.raises(AssertionError, match="blocks are in use"):
        pool.clear()
    pool.release(first)
    pool.clear()
    assert pool.num_published == 0 and pool.match(sequence(list(range(10)))) == []
    pool.check_integrity([])
    assert pool.match(compute(pool, sequence(list(range(10))))) != [], "it learns anew"
