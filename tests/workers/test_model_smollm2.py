"""SmolLM2-135M on real text: the tokens transformers generates, from the weights people would serve."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.messages import Sampling
from tests.workers.tiny_models import generate, reference
from workers.model_runner import ModelRunner

TEXT = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.timeout(300)
def test_greedy_tokens_equal_transformers(smollm2: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ids = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(TEXT.read_text()).ids
    given = [ids[:200], ids[:1], ids[30:47]]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    expected = [reference(model, prompt, 32) for prompt in given]
    runner = ModelRunner.load(smollm2, "float32", 16, 64 * 2**20, 512)
    assert generate(runner, given, 32, Sampling(temperature=0.0), largest_chunk=90) == expected
