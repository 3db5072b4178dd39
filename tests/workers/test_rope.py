"""Rotary tables against the textbook; scaled kinds are compared with transformers in test_model."""

import math

import pytest
import torch

from kernels import reference
from kernels.norm_rope import rope_inplace
from workers.architecture import Rope
from workers.rope import rope_table

KINDS = [
    Rope("default", 1e4),
    Rope("linear", 1e4, 4.0, 32),
    Rope("dynamic", 1e4, 4.0, 32),
    Rope("llama3", 1e4, 4.0, 32),
    Rope("yarn", 1e4, 4.0, 32, attention_factor=1.1),
]


def test_default_angles_are_position_times_theta_to_the_dimension() -> None:
    cos, sin = rope_table(Rope("default", 100.0), 8, 50, torch.float32)[37]
    angles = [37 * 100.0 ** (-2 * i / 8) for i in range(4)]
    torch.testing.assert_close(cos, torch.tensor([math.cos(angle) for angle in angles] * 2))
    torch.testing.assert_close(sin[4:], torch.tensor([math.sin(angle) for angle in angles]))


def test_the_table_rotates_as_the_reference_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 3, 8)
    angles = torch.arange(20.0)[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    expected = reference.rope(x, angles)
    rope_inplace(x, *rope_table(Rope("default", 100.0), 8, 20, torch.float32).unbind(1))
    torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rope", KINDS, ids=lambda rope: rope.kind)
def test_a_position_is_rotated_the_same_whatever_the_context(rope: Rope) -> None:
    short, long = (rope_table(rope, 16, length, torch.float32) for length in (40, 128))
    assert torch.equal(short, long[:40])


def test_dynamic_scaling_starts_beyond_the_original_context() -> None:
    plain, dynamic = (rope_table(rope, 16, 40, torch.float32) for rope in (KINDS[0], KINDS[2]))
    torch.testing.assert_close(dynamic[:32], plain[:32])
    assert not torch.allclose(dynamic[32], plain[32])
