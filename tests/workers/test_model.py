"""Same tokens and logits as transformers, for every family, however the work is cut into steps."""

from pathlib import Path

import pytest
import torch

from cluster.messages import Sampling
from tests.workers.tiny_models import BLOCK, MODELS, build, generate, load, prompts, reference, sequence
from workers.architecture import layout, load_architecture, sizes
from workers.batch import build_batch
from workers.cache import KvCache
from workers.links import NoLinks
from workers.model import Decoder
from workers.rope import rope_table
from workers.runner import Chunk
from workers.shard import whole
from workers.weights import load_weights

GREEDY = Sampling(temperature=0.0, max_tokens=1000)
CPU = torch.device("cpu")
# the prompts fit the original context of llama-dynamic (32), where transformers rotates like us, and outgrow every
# sliding window; the outputs outgrow every original context
LENGTHS = [1, 3, 4, 5, 14, 23, 30]
NEW_TOKENS = 24


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    given = prompts(LENGTHS)
    expected = [reference(model, prompt, NEW_TOKENS) for prompt in given]
    assert generate(load(tmp_path), given, NEW_TOKENS, GREEDY) == expected


@pytest.mark.parametrize("name", ["llama-llama3", "llama-yarn", "llama-linear", "mistral", "qwen2-window"])
def test_greedy_tokens_equal_transformers_beyond_the_original_context(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    given = prompts([75, 90])
    expected = [reference(model, prompt, 12) for prompt in given]
    assert generate(load(tmp_path), given, 12, GREEDY, largest_chunk=80) == expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunks", [[29], [13, 15, 1], [1] * 29], ids=["whole", "chunks", "tokens"])
def test_logits_equal_transformers(name: str, chunks: list[int], tmp_path: Path) -> None:
    model = build(name, tmp_path)
    (prompt,) = prompts([29])
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(logits(tmp_path, "float32", prompt, chunks), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_bfloat16_logits_are_close_to_float32(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    (prompt,) = prompts([29])
    exact, rounded = (logits(tmp_path, dtype, prompt, [17, 12]) for dtype in ("float32", "bfloat16"))
    assert (exact - rounded).norm() < 0.05 * exact.norm()


def test_a_tile_boundary_inside_a_chunk_changes_nothing(tmp_path: Path) -> None:
    model = build("mistral", tmp_path, max_position_embeddings=512, sliding_window=70)
    (prompt,) = prompts([300])
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    for chunks in ([300], [129, 171], [64, 64, 172]):
        torch.testing.assert_close(logits(tmp_path, "float32", prompt, chunks), expected, rtol=1e-4, atol=1e-4)


def logits(directory: Path, dtype: str, prompt: list[int], takes: list[int]) -> torch.Tensor:
    """Logits after the prompt, computed in chunks of these sizes over a cache full of NaN."""
    architecture = load_architecture(directory)
    shape = layout(architecture, dtype, BLOCK)
    torch_dtype = getattr(torch, dtype)
    with torch.inference_mode():
        table = rope_table(architecture.rope, architecture.head_dim, len(prompt), torch_dtype)
        shard = whole(sizes(architecture))
        weights = load_weights(directory, architecture, shard, torch_dtype, CPU)
        decoder = Decoder(architecture, shard, weights, table, NoLinks())
        cache = KvCache(shape, 128, CPU)
        cache.blocks.fill_(float("nan"))
        made = sequence("a", prompt, torch.randperm(128)[: -(-len(prompt) // BLOCK)].tolist(), GREEDY)
        for take in takes:
            found = decoder.forward(
                build_batch([Chunk(made, made.computed, take)], shape, set(architecture.windows), CPU), cache
            )
            made.computed += take
    assert found is not None
    return found[0].float()
