"""Jobs as the pipeline makes them."""

import dataclasses
from typing import Any

from gateway.request import Fingerprint, Job, Priority, RequestId, Sampling, StopRules

JOB = Job(
    request_id=RequestId("r"),
    model_id="tiny",
    fingerprint=Fingerprint("f"),
    prompt_token_ids=(1, 2, 3),
    num_choices=1,
    sampling=Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=5),
    stop=StopRules(max_tokens=16),
    priority=Priority.NORMAL,
    tenant="local",
    sharing_domain="local",
    traceparent="",
    deadline=None,
    temperature_given=True,
    shareable_seed=None,
)


def job(**changes: Any) -> Job:
    """JOB with changes; those of sampling and stop by their own names."""
    sampling = {k: v for k, v in changes.items() if k in Sampling.__dataclass_fields__}
    stop = {k: v for k, v in changes.items() if k in StopRules.__dataclass_fields__}
    rest = {k: v for k, v in changes.items() if k not in sampling and k not in stop}
    return dataclasses.replace(
        JOB,
        sampling=dataclasses.replace(JOB.sampling, **sampling),
        stop=dataclasses.replace(JOB.stop, **stop),
        **rest,
    )
