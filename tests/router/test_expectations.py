"""What is expected of requests follows those before."""

from router.expectations import ComputedShare, OutputLength


def test_outputs_are_as_long_as_others_were_and_never_over() -> None:
    outputs = OutputLength()
    for _ in range(400):
        outputs.observe(40)
    assert outputs.remaining(0) == 40
    assert outputs.remaining(30) == 10
    assert outputs.remaining(40) == 40, "one that goes on is expected to go on"


def test_a_typical_output_of_nothing_still_leaves_a_token() -> None:
    outputs = OutputLength()
    for _ in range(400):
        outputs.observe(0)
    assert outputs.remaining(3) == 1


def test_prompts_cost_the_part_that_others_computed() -> None:
    share = ComputedShare()
    assert share.of(1_000) == 1_000
    for _ in range(400):
        share.observe(100, 25)
    assert share.of(1_000) == 250
    assert share.of(1) == 1
