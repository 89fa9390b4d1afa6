"""What a scripted request of the fake scheduler says: its tokens, one by one, and how it ends."""

from collections.abc import Callable

from infermesh.v1 import sampling_pb2
from infermesh.v1 import scheduler_service_pb2 as pb
from tests import tiny_tokenizer

# submit, choice -> the whole output of an undisturbed run, EOS included where it ends by it
Script = Callable[[pb.Submit, int], list[int]]


def words(submit: pb.Submit, choice: int) -> list[int]:
    """Readable and different for every choice: `word 0 of choice 1, word 1 of choice 1, ...`"""
    text = "".join(f" word {i} of choice {choice}," for i in range(60))
    token_ids: list[int] = tiny_tokenizer.byte_level().encode(text).ids
    return token_ids


def saying(text: str) -> Script:
    """Says one text and ends."""
    token_ids = [*tiny_tokenizer.byte_level().encode(text).ids, tiny_tokenizer.eos_id()]
    return lambda submit, choice: token_ids


class Stream:
    """One request of one session.

    Args:
        packs: a token with nothing beside it goes out packed.
    """

    def __init__(self, submit: pb.Submit, packs: bool) -> None:
        self.submit = submit
        self.packs = packs and not submit.sampling.HasField("top_logprobs")
        self.positions = {c.index: len(c.output_token_ids) for c in submit.choices}
        self.started: set[int] = set()
        # How far each choice had come when it ended, and how it did.
        self.ended: dict[int, tuple[int, pb.Finished]] = {}

    @property
    def open_choices(self) -> list[int]:
        return list(self.positions)

    def say(
        self,
        stream_id: int,
        choice: int,
        output: list[int],
        response: pb.SessionResponse,
        cached_prompt_tokens: int,
    ) -> None:
        """One more token of a choice, and its end where that is the last."""
        submit, start = self.submit, self.positions[choice]
        token_id = output[start]
        if self.packs and choice in self.started:
            packed = response.tokens
            packed.stream_ids.append(stream_id)
            packed.choices.append(choice)
            packed.starts.append(start)
            packed.token_ids.append(token_id)
        else:
            delta = response.deltas.add(stream_id=stream_id, choice=choice, start=start)
            delta.token_ids.append(token_id)
        if choice not in self.started:
            self.started.add(choice)
            delta.cached_prompt_tokens = cached_prompt_tokens
            delta.timings.queue.FromMicroseconds(1_000)
            delta.timings.prefill.FromMicroseconds(2_000)
        if submit.sampling.HasField("top_logprobs"):
            top = submit.sampling.top_logprobs
            ids = [token_id, *(i for i in range(top) if i != token_id)][:top]
            delta.logprobs.add(
                logprob=-0.5, top_token_ids=ids, top_logprobs=[-0.5 - i for i in range(len(ids))]
            )
        self.positions[choice] = end = start + 1
        ended_by_eos = token_id == tiny_tokenizer.eos_id() and not submit.stop.ignore_eos
        if not ended_by_eos and end < submit.stop.max_tokens and end < len(output):
            return
        finished = response.finished.add(stream_id=stream_id, choice=choice)
        finished.reason = (
            sampling_pb2.FINISH_REASON_STOP if ended_by_eos else sampling_pb2.FINISH_REASON_LENGTH
        )
        if ended_by_eos:
            finished.stop_token_id = token_id
        finished.cached_prompt_tokens = cached_prompt_tokens
        finished.timings.queue.FromMicroseconds(1_000)
        finished.timings.prefill.FromMicroseconds(2_000)
        finished.timings.decode.FromMicroseconds(3_000)
        self.ended[choice] = end, finished
        del self.positions[choice]
