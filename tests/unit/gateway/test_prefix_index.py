"""The index of a replica's blocks equals a plain model of it, whatever is reported."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gateway.prefix_index import EXPECTED_S, BlockEvents, PrefixIndex
from infermesh.block_hash import ShortHash

hashes = st.integers(0, 15).map(ShortHash)
lists = st.lists(hashes, max_size=6, unique=True)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class IndexMachine(RuleBasedStateMachine):
    """Any sequence of snapshots, events, gaps, losses, expectations and time."""

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.index = PrefixIndex(self.clock)
        self.held: set[int] = set()
        self.expected: dict[int, float] = {}
        self.sequence: int | None = None

    @rule(stored=lists, sequence=st.integers(1, 5), size=st.sampled_from([0, 16]))
    def snapshot(self, stored: list[ShortHash], sequence: int, size: int) -> None:
        assert self.index.apply(BlockEvents(sequence, True, stored, [], size))
        self.held, self.sequence = set(stored), sequence
        assert self.index.block_size == size

    @rule(stored=lists, removed=lists, gap=st.sampled_from([1, 1, 1, 0, 2]))
    def events(self, stored: list[ShortHash], removed: list[ShortHash], gap: int) -> None:
        sequence = (self.sequence or 0) + gap
        gone = [one for one in removed if one not in stored]
        whole = self.index.apply(BlockEvents(sequence, False, stored, gone, 16))
        assert whole is (self.sequence is not None and gap == 1)
        if not whole:
            self.lost()
            return
        self.sequence = sequence
        self.held = (self.held | set(stored)) - set(gone)
        for one in stored:
            self.expected.pop(one, None)

    @rule()
    def replica_goes(self) -> None:
        self.index.clear()
        self.lost()

    def lost(self) -> None:
        self.held, self.expected, self.sequence = set(), {}, None
        assert self.index.block_size == 0

    @rule(prompt=lists)
    def expect(self, prompt: list[ShortHash]) -> None:
        self.index.expect(prompt)
        until = self.clock.now_s + EXPECTED_S
        self.expected |= {one: until for one in prompt if one not in self.held}

    @rule(seconds=st.sampled_from([0.5, EXPECTED_S / 2, EXPECTED_S]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule(prompt=lists)
    def ask(self, prompt: list[ShortHash]) -> None:
        now_s = self.clock.now_s
        known = self.held | {one for one, until in self.expected.items() if until > now_s}
        count = next((i for i, one in enumerate(prompt) if one not in known), len(prompt))
        assert self.index.num_matched(prompt) == count

    @invariant()
    def sizes_agree(self) -> None:
        assert len(self.index) == len(self.held)


IndexMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestIndex = IndexMachine.TestCase


@given(st.lists(st.tuples(st.booleans(), lists), max_size=30))
def test_index_never_grows_beyond_its_bounds(changes: list[tuple[bool, list[ShortHash]]]) -> None:
    index = PrefixIndex(Clock(), max_blocks=5, max_expected=4)
    index.apply(BlockEvents(1, True, [ShortHash(i) for i in range(9)], [], 16))
    assert index.num_matched([ShortHash(i) for i in range(9)]) == 5  # the first were used last
    for number, (is_report, some) in enumerate(changes):
        if is_report:
            index.apply(BlockEvents(2 + number, False, some, [], 16))
            index.apply(BlockEvents(1 + number, True, some, [], 16))
            index.apply(BlockEvents(2 + number, False, [ShortHash(99)], [], 16))
        index.expect(some)
        assert len(index) <= 5
        assert len(index._expected) <= 4


def test_oldest_block_goes_first_when_there_are_too_many() -> None:
    index = PrefixIndex(Clock(), max_blocks=3)
    index.apply(BlockEvents(1, True, [ShortHash(3), ShortHash(2), ShortHash(1)], [], 16))
    index.apply(BlockEvents(2, False, [ShortHash(4)], [], 16))
    assert [index.num_matched([ShortHash(i)]) for i in (1, 2, 3, 4)] == [0, 1, 1, 1]
