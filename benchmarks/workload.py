"""What is asked, equal for every contestant: prompts as token ids or as text, with or without a
common beginning. Draws only; asking is `load`'s."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

Prompt: TypeAlias = list[int] | str

# Of text prompts; each is one or a few tokens, whatever the tokenizer.
_TEXT = (
    "river stone window garden paper music winter bridge silver letter forest engine market "
    "shadow copper island button candle harbour mirror needle orange pencil rocket saddle "
    "timber valley wagon yellow anchor basket cellar desert feather"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths are in tokens, of text prompts in words.

    Attributes:
        shared_prefix_tokens: of `prompt_tokens`, so many are the same in every prompt.
        vocab: prompts' token ids are drawn from here, first included, last not.
    """

    prompt_tokens: int = 128
    output_tokens: int = 64
    shared_prefix_tokens: int = 0
    vocab: tuple[int, int] = (300, 2000)
    temperature: float = 1.0
    seed: int = 0
    as_text: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.shared_prefix_tokens < self.prompt_tokens:
            raise ValueError(
                f"shared_prefix_tokens is {self.shared_prefix_tokens}, allowed are 0 to "
                f"{self.prompt_tokens - 1}: every prompt has a token of its own"
            )

    def endless(self) -> Iterator[Prompt]:
        """Prompts without end; the same for the same workload."""
        draw = random.Random(self.seed)
        prefix = self._draw(draw, self.shared_prefix_tokens)
        own = self.prompt_tokens - self.shared_prefix_tokens
        while True:
            prompt = prefix + self._draw(draw, own)
            yield " ".join(_WORDS[i] for i in prompt) if self.as_text else prompt

    def prompts(self, count: int) -> list[Prompt]:
        """The first `count` of them."""
        return list(itertools.islice(self.endless(), count))

    def _draw(self, draw: random.Random, count: int) -> list[int]:
        bounds = (0, len(_WORDS)) if self.as_text else self.vocab
        return [draw.randrange(*bounds) for _ in range(count)]
