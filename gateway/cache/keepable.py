"""Which fresh answers are worth keeping, and what of them: whole ones, up to where they ended."""

from gateway.cache.verdict import StoredAnswer, StoredChoice
from gateway.generation import ChoiceLog
from gateway.reply import PromptReply
from gateway.text.choice_text import ChoiceText
from gateway.tokens import Finish, FinishReason

_WHOLE = (FinishReason.STOP, FinishReason.LENGTH)


def answer_to_keep(prompt: PromptReply, elapsed_s: float) -> StoredAnswer | None:
    """The answer as this reader had it; None where it is not whole.

    Args:
        elapsed_s: since its admission, where no scheduler has told its timings.
    """
    logs = prompt.reader.generation.choices
    choices = [_choice(log, text) for log, text in zip(logs, prompt.texts, strict=True)]
    whole = [choice for choice in choices if choice is not None]
    if len(whole) < len(choices):
        return None
    timings = prompt.timings()
    compute_s = elapsed_s if timings is None else timings.prefill_s + timings.decode_s
    return StoredAnswer(tuple(whole), prompt.prompt_len, compute_s)


def _choice(log: ChoiceLog, text: ChoiceText) -> StoredChoice | None:
    if text.finish_reason not in _WHOLE or not text.num_tokens:
        return None
    # a stop string ends a choice before the scheduler hears of it, and later tokens don't count
    by_stop_string = log.finish is None or text.num_tokens < len(log.token_ids)
    finish = Finish(FinishReason.STOP) if by_stop_string or log.finish is None else log.finish
    return StoredChoice(
        token_ids=tuple(log.token_ids[: text.num_tokens]),
        finish=finish,
        logprobs=tuple(log.logprobs[: text.num_tokens]),
    )
