"""KV blocks: who holds which, and which prefixes they still know.

A full block is published under a chain hash (the hash of the block before it, its token ids; the salt at the root), as in
vLLM's automatic prefix caching (Kwon et al., 2023, PagedAttention). A block is

| state | references | in the free list | hash |
|---|---|---|---|
| used | 1 or more | no | none, or published |
| cached | 0 | yes | published: a prefix may still take it |
| empty | 0 | yes, before every cached one | none |
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from fairlead.llm.sequence import Sequence

ROOT = b"root of a chain"
LINK = b"link of a chain"


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. It only counts: the memory itself is `batch.LayerCache`.

    Tokens of a sequence are only ever appended: a block that is full keeps its hash.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a block pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """The next to be taken first: empty ones, then cached ones, the least recently used first."""
        self._hash: list[bytes | None] = [None] * num_blocks
        """Under which a block is published."""
        self._published: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses; those that hold a cached prefix are among them."""
        return len(self._free)

    @property
    def num_published(self) -> int:
        return len(self._published)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, seq: Sequence) -> list[int]:
        """Published blocks that hold the longest prefix of `seq`. At least its last token is left out: its logits are wanted."""
        blocks: list[int] = []
        if self.prefix_caching:
            for index in range((seq.num_tokens - 1) // self.block_size):
                block = self._published.get(self._chain(seq, index))
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def num_taken(self, num_blocks: int, matched: list[int]) -> int:
        """By how much `num_free` falls for a table of `num_blocks` whose head are the `matched` ones."""
        return num_blocks - sum(1 for block in matched if self._references[block])

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these published blocks."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """So many blocks of unknown content, each with one reference. The caller has asked `num_free`."""
        assert num_blocks <= len(self._free), f"{num_blocks} blocks wanted, {len(self._free)} free"
        blocks = []
        for _ in range(num_blocks):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, seq: Sequence) -> None:
        """Take back all blocks of `seq`."""
        # Last block first, so that the head of a prefix, which more sequences share, is taken again last.
        for block in reversed(seq.blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if self._hash[block] is None:
                    self._free.move_to_end(block, last=False)
        seq.blocks = []

    def publish(self, seq: Sequence, first: int, end: int) -> list[int]:
        """Let others find the blocks `first : end` of `seq`'s table, which are full. Returns those that are new to the cache."""
        if not self.prefix_caching:
            return []
        new = []
        for index in range(first, end):
            digest = self._chain(seq, index)
            # The same tokens computed twice: the first copy serves, this one stays its sequence's own.
            if digest in self._published:
                continue
            block = seq.blocks[index]
            assert self._hash[block] is None, f"block {block} is published already"
            self._hash[block] = digest
            self._published[digest] = block
            new.append(block)
        return new

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Nobody finds these any more: their content was never computed."""
        for block in blocks:
            self._forget(block)
            if not self._references[block]:
                self._free.move_to_end(block, last=False)

    def clear(self) -> None:
        """The memory of all blocks is gone: no prefix is known any longer. Nobody holds a block."""
        assert len(self._free) == self.num_blocks, "blocks are in use"
        for block in list(self._published.values()):
            self._forget(block)

    def digest(self, block: int) -> bytes | None:
        """Under which it is published: of all tokens up to its last one."""
        return self._hash[block]

    def is_published(self, block: int) -> bool:
        return self._hash[block] is not None

    def _forget(self, block: int) -> None:
        digest = self._hash[block]
        if digest is not None:
            del self._published[digest]
            self._hash[block] = None

    def _chain(self, seq: Sequence, index: int) -> bytes:
        """Hash of the sequence's full block `index` and of all before it; kept in `seq.hashes`."""
        hashes = seq.hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else _root(seq.salt)
            hashes.append(_link(parent, seq.token_ids[start : start + self.block_size]))
        return hashes[index]

    def check_integrity(self, live_sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError where the books disagree with each other or with the tables of `live_sequences`, all that hold blocks."""
        live = list(live_sequences)
        held = Counter(block for seq in live for block in seq.blocks)
        for block, references in enumerate(self._references):
            assert references == held[block], f"block {block}: {references} references, {held[block]} tables hold it"
            assert (references == 0) == (block in self._free), f"block {block}: {references} references, free: {block in self._free}"
        assert held.keys() <= set(range(self.num_blocks)), "a table holds a block outside the pool"
        assert len(self._free) <= self.num_blocks, "the free list holds a block outside the pool"

        published = {digest: block for block, digest in enumerate(self._hash) if digest is not None}
        assert published == self._published, "the hash table and the blocks' own hashes disagree"
        assert self.prefix_caching or not published, "blocks are published though prefix caching is off"
        cached = [self._hash[block] is not None for block in self._free]
        assert cached == sorted(cached), "a cached block would be taken before an empty one"

        for seq in live:
            assert len(set(seq.blocks)) == len(seq.blocks), f"{seq} holds a block twice"
            assert seq.num_computed <= len(seq.blocks) * self.block_size, f"{seq} has computed more than its blocks hold"
            digest = _root(seq.salt)
            for index, block in enumerate(seq.blocks):
                ids = seq.token_ids[index * self.block_size : (index + 1) * self.block_size]
                digest = _link(digest, ids)
                if self._hash[block] is not None:
                    assert len(ids) == self.block_size and self._hash[block] == digest, f"{seq}: block {index} is published as another's"


def _root(salt: str) -> bytes:
    return blake2b(salt.encode(), digest_size=32, person=ROOT).digest()


def _link(parent: bytes, token_ids: list[int]) -> bytes:
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=32, person=LINK).digest()
