"""What stands in for what a worker has not measured."""

from dataclasses import replace

from cluster.perfmodel import PRIOR
from router.experience import Experience

SLOW = replace(PRIOR, prefill=(9.0, 9.0, 0.0), decode=(7.0, 7.0, 7.0))


def test_a_prior_stands_until_somebody_has_measured() -> None:
    experience = Experience()
    assert experience.filled(PRIOR) == PRIOR
    assert experience.filled(SLOW) == SLOW, "not measured either, so nobody learns from it"
    assert experience.filled(PRIOR) == PRIOR


def test_each_half_is_learnt_from_who_measured_it() -> None:
    experience = Experience()
    prompts = replace(SLOW, decode=PRIOR.decode, prefill_error=0.1)
    steps = replace(SLOW, prefill=PRIOR.prefill, decode_error=0.1)
    assert experience.filled(prompts) == prompts
    assert experience.filled(steps) == replace(steps, prefill=SLOW.prefill)
    assert experience.filled(prompts) == replace(prompts, decode=SLOW.decode)
    assert experience.filled(PRIOR) == replace(PRIOR, prefill=SLOW.prefill, decode=SLOW.decode)


def test_who_has_measured_keeps_its_own() -> None:
    experience = Experience()
    experience.filled(replace(SLOW, prefill_error=0.1, decode_error=0.1))
    own = replace(PRIOR, prefill_error=0.3, decode_error=0.3)
    assert experience.filled(own) == own


def test_nobody_learns_from_another_kind_of_gpu() -> None:
    experience = Experience()
    measured = replace(SLOW, prefill_error=0.1, decode_error=0.1)
    experience.filled(measured, "NVIDIA L40S")
    assert experience.filled(PRIOR, "NVIDIA H200") == PRIOR
    assert experience.filled(PRIOR, "NVIDIA L40S") == replace(PRIOR, prefill=SLOW.prefill, decode=SLOW.decode)
