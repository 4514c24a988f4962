"""kvcore._C: the page allocator and the facts about the build."""

import array
import copy
import os
import pickle
import subprocess
import sys
import threading

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import kvcore
from kvcore import _C
from kvcore._C import OutOfBlocksError, PageAllocator

pytestmark = pytest.mark.asan

SLAB_INDEX_BITS = 21
WIDTHS = (8, 4, 2)


def entry(slab, index):
    return slab << SLAB_INDEX_BITS | index


def test_slab_numbers_and_entries():
    allocator = PageAllocator()
    assert [allocator.add_slab(3, 4), allocator.add_slab(2, 8), allocator.add_slab(2, 4)] == [
        0,
        1,
        2,
    ]
    assert allocator.allocate(4, 4) == [entry(0, 0), entry(0, 1), entry(0, 2), entry(2, 0)]
    assert allocator.allocate(8, 1) == [entry(1, 0)]
    assert allocator.allocate(2, 0) == []


def test_lowest_free_blocks_are_reused_first():
    allocator = PageAllocator()
    allocator.add_slab(200, 4)
    entries = allocator.allocate(4, 200)
    allocator.free([entries[150], entries[3], entries[64]])
    assert allocator.allocate(4, 2) == [3, 64]
    allocator.free([entries[0]])
    assert allocator.allocate(4, 2) == [0, 150]


@pytest.mark.parametrize("num_blocks", [1, 63, 64, 65, 127, 128, 1000])
def test_every_block_is_handed_out_once(num_blocks):
    allocator = PageAllocator()
    allocator.add_slab(num_blocks, 2)
    assert allocator.allocate(2, num_blocks) == list(range(num_blocks))
    with pytest.raises(OutOfBlocksError):
        allocator.allocate(2, 1)


def test_largest_entry_is_an_int32():
    allocator = PageAllocator()
    for _ in range(PageAllocator.MAX_SLABS - 1):
        allocator.add_slab(1, 8)
    assert allocator.add_slab(PageAllocator.MAX_SLAB_BLOCKS, 4) == 1023
    entries = allocator.allocate(4, PageAllocator.MAX_SLAB_BLOCKS)
    assert entries[-1] == 2**31 - 1
    with pytest.raises(OutOfBlocksError, match="all 1024 slab numbers are in use"):
        allocator.add_slab(1, 4)


def test_stats():
    allocator = PageAllocator()
    allocator.add_slab(10, 4)
    allocator.add_slab(5, 4)
    allocator.add_slab(7, 2)
    allocator.allocate(4, 12)
    assert allocator.num_used(4) == 12
    assert allocator.num_free(4) == 3
    assert allocator.stats() == {
        8: {"num_slabs": 0, "num_blocks": 0, "num_used": 0, "num_free": 0},
        4: {"num_slabs": 2, "num_blocks": 15, "num_used": 12, "num_free": 3},
        2: {"num_slabs": 1, "num_blocks": 7, "num_used": 0, "num_free": 7},
    }


def test_allocating_too_much_changes_nothing():
    allocator = PageAllocator()
    allocator.add_slab(4, 4)
    allocator.allocate(4, 1)
    message = r"allocate: count must be at most 3 \(free 4-bit blocks\), got 4"
    with pytest.raises(OutOfBlocksError, match=message):
        allocator.allocate(4, 4)
    assert allocator.num_used(4) == 1
    assert allocator.allocate(4, 3) == [1, 2, 3]
    assert issubclass(OutOfBlocksError, MemoryError)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([0, 2, 2], r"entries\[2\] must be of a block in use, got 2"),
        ([1, 3], r"entries\[1\] must be of a block in use, got 3"),
        ([0, -1], r"entries\[1\] must be of a block of a slab, got -1"),
        ([0, 4], r"entries\[1\] must be of a block of a slab, got 4"),
        ([0, entry(1, 0)], r"entries\[1\] must be of a block of a slab, got 2097152"),
        ([0, 2**31], r"entries\[1\] must be of a block of a slab, got 2147483648"),
    ],
)
def test_free_rejects_and_frees_nothing(entries, message):
    allocator = PageAllocator()
    allocator.add_slab(4, 4)
    allocator.allocate(4, 3)
    with pytest.raises(ValueError, match=message):
        allocator.free(entries)
    assert allocator.num_used(4) == 3
    assert allocator.allocate(4, 1) == [3]


def test_keep_frees_what_is_not_named():
    allocator = PageAllocator()
    allocator.add_slab(100, 4)
    allocator.add_slab(3, 8)
    allocator.allocate(4, 80)
    allocator.allocate(8, 2)
    allocator.keep(array.array("i", [70, 3, entry(1, 1), 3]))
    assert (allocator.num_used(4), allocator.num_used(8)) == (2, 1)
    assert allocator.allocate(4, 5) == [0, 1, 2, 4, 5]
    assert allocator.allocate(8, 2) == [entry(1, 0), entry(1, 2)]
    allocator.keep(array.array("i"))
    assert (allocator.num_free(4), allocator.num_free(8)) == (100, 3)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([0, 3], r"keep: entries\[1\] must be of a block in use, got 3"),
        ([0, 4], r"keep: entries\[1\] must be of a block in use, got 4"),
        ([-1], r"keep: entries\[0\] must be of a block in use, got -1"),
        ([0, 1, entry(1, 0)], r"keep: entries\[2\] must be of a block in use, got 2097152"),
    ],
)
def test_keep_rejects_and_frees_nothing(entries, message):
    allocator = PageAllocator()
    allocator.add_slab(4, 4)
    allocator.allocate(4, 3)
    with pytest.raises(ValueError, match=message):
        allocator.keep(array.array("i", entries))
    assert allocator.num_used(4) == 3
    for wrong in (array.array("q", [0]), memoryview(array.array("i", [0, 1, 2]))[::2]):
        with pytest.raises(ValueError, match="entries must be a contiguous int32 vector"):
            allocator.keep(wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.add_slab(0, 4), r"add_slab: num_blocks must be in \[1, 2097152\], got 0"),
        (lambda a: a.add_slab(2**21 + 1, 4), r"num_blocks must be in .*, got 2097153"),
        (lambda a: a.add_slab(1, 3), r"add_slab: bits must be one of 8, 4, 2, got 3"),
        (lambda a: a.allocate(16, 1), r"allocate: bits must be one of 8, 4, 2, got 16"),
        (lambda a: a.allocate(4, -1), r"allocate: count must be at least 0, got -1"),
        (lambda a: a.num_free(1), r"bits must be one of 8, 4, 2, got 1"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call(PageAllocator())


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))]
)
def test_copies_keep_the_state_and_share_nothing(clone):
    allocator = PageAllocator()
    allocator.add_slab(70, 4)
    allocator.add_slab(3, 8)
    allocator.allocate(4, 66)
    allocator.free([5])
    other = clone(allocator)
    assert other.stats() == allocator.stats()
    assert other.allocate(4, 3) == [5, 66, 67]
    assert allocator.allocate(4, 1) == [5]
    assert other.allocate(8, 1) == allocator.allocate(8, 1)


def test_setstate_rejects_bits_beyond_the_slab():
    allocator = PageAllocator.__new__(PageAllocator)
    with pytest.raises(ValueError, match="used must be one bit for each of 4 blocks"):
        allocator.__setstate__(([(4, 4, b"\xff" * 8)],))


def test_threads_never_share_a_block():
    allocator = PageAllocator()
    allocator.add_slab(2000, 4)
    taken = [[] for _ in range(8)]

    def work(mine):
        for i in range(250):
            mine += allocator.allocate(4, 1)
            if i % 3 == 0:
                allocator.free([mine.pop(0)])

    threads = [threading.Thread(target=work, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = [e for mine in taken for e in mine]
    assert len(set(entries)) == len(entries) == allocator.num_used(4)


class AllocatorMachine(RuleBasedStateMachine):
    """Against a model of two sets, free and used, per width."""

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator()
        self.free = {bits: set() for bits in WIDTHS}
        self.used = {bits: set() for bits in WIDTHS}
        self.num_slabs = 0

    @rule(num_blocks=st.integers(1, 200), bits=st.sampled_from(WIDTHS))
    def add_slab(self, num_blocks, bits):
        slab = self.allocator.add_slab(num_blocks, bits)
        assert slab == self.num_slabs
        self.num_slabs += 1
        self.free[bits] |= {entry(slab, index) for index in range(num_blocks)}

    @rule(bits=st.sampled_from(WIDTHS), count=st.integers(0, 150))
    def allocate(self, bits, count):
        if count > len(self.free[bits]):
            with pytest.raises(OutOfBlocksError):
                self.allocator.allocate(bits, count)
            return
        expected = sorted(self.free[bits])[:count]
        assert self.allocator.allocate(bits, count) == expected
        self.free[bits] -= set(expected)
        self.used[bits] |= set(expected)

    @precondition(lambda self: any(self.used.values()))
    @rule(data=st.data())
    def free_some(self, data):
        in_use = sorted(set().union(*self.used.values()))
        entries = data.draw(st.lists(st.sampled_from(in_use), unique=True))
        self.allocator.free(entries)
        for bits in WIDTHS:
            returned = self.used[bits] & set(entries)
            self.used[bits] -= returned
            self.free[bits] |= returned

    @rule(data=st.data(), bad=st.integers(-(2**31), 2**31 - 1))
    def free_with_one_bad_entry(self, data, bad):
        in_use = sorted(set().union(*self.used.values()))
        good = data.draw(st.lists(st.sampled_from(in_use), unique=True)) if in_use else []
        if bad in in_use:
            good, bad = [*good, bad], bad  # given twice
        with pytest.raises(ValueError, match="must be of a block"):
            self.allocator.free([*good, bad])

    @rule(data=st.data())
    def keep_some(self, data):
        in_use = sorted(set().union(*self.used.values()))
        entries = data.draw(st.lists(st.sampled_from(in_use))) if in_use else []
        self.allocator.keep(array.array("i", entries))
        for bits in WIDTHS:
            freed = self.used[bits] - set(entries)
            self.used[bits] -= freed
            self.free[bits] |= freed

    @rule()
    def clone(self):
        self.allocator = copy.deepcopy(self.allocator)

    @invariant()
    def counts(self):
        for bits in WIDTHS:
            assert self.allocator.num_free(bits) == len(self.free[bits])
            assert self.allocator.num_used(bits) == len(self.used[bits])


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_build_info():
    info = _C.build_info()
    assert info["version"] == kvcore.__version__
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert "-ffp-contract=off" in info["flags"]
    assert info["torch_target"] == "2.11"
    assert info["isa_levels"][0] == "scalar"
    assert info["cxx_standard"] == 20
    assert isinstance(info["cuda_archs"], list)
    # `make asan` must run what it built, not the normal libraries.
    assert info["sanitized"] == ("libasan" in os.environ.get("LD_PRELOAD", ""))


def cpu_isa(level):
    code = "from kvcore import _C; isa = _C.cpu_isa(); print(isa['active'])"
    env = {**os.environ, "KVCORE_CPU_ISA": level}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.isa
def test_active_isa_is_the_highest_that_needs_no_naming():
    isa = _C.cpu_isa()
    expected = [level for level in isa["supported"] if level not in isa["opt_in"]][-1]
    assert cpu_isa("").stdout.strip() == expected


@pytest.mark.isa
def test_amx_is_opt_in_where_it_is_supported():
    isa = _C.cpu_isa()
    assert set(isa["opt_in"]) == {"amx"} & set(isa["supported"])
    for level, reason in isa["opt_in"].items():
        assert "never run on hardware" in reason
        assert cpu_isa("").stdout.strip() != level
        assert cpu_isa(level).stdout.strip() == level


@pytest.mark.parametrize("level", _C.cpu_isa()["supported"])
def test_isa_can_be_lowered(level):
    assert cpu_isa(level).stdout.strip() == level


@pytest.mark.parametrize("level", ["sse9", "AVX2"])
def test_unknown_isa_is_named_with_the_accepted_ones(level):
    accepted = ", ".join(_C.cpu_isa()["supported"])
    message = f"KVCORE_CPU_ISA must be one of {accepted} on this machine, got '{level}'"
    assert message in cpu_isa(level).stderr


def test_levels_that_do_not_run_say_why():
    isa = _C.cpu_isa()
    assert set(isa["obstacles"]) == set(isa["built"]) - set(isa["supported"])
    for level, obstacle in isa["obstacles"].items():
        assert obstacle
        assert f"got '{level}': {obstacle}" in cpu_isa(level).stderr
