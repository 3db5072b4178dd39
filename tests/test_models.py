"""The tiny model is fit for what tests do with it: any text encodes; greedy decoding is sharp, varied and can end."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import END_ID, VOCAB_SIZE, tiny_model

NEW_TOKENS = 100


def test_any_bytes_encode_and_come_back(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    text = "".join(map(chr, range(0x250))) + "日本語 🌍\n\t\0"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert len(tokenizer.encode("The capital of France is Paris.").ids) < 12


def test_chats_render_in_special_tokens(tiny: Path) -> None:
    ids = AutoTokenizer.from_pretrained(tiny).apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert ids[0] == 1
    assert ids.count(1) == 2
    assert ids.count(END_ID) == 1


def test_greedy_decoding_is_sharp_and_varied_and_ends_at_times(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    prompts = torch.randint(3, VOCAB_SIZE, (40, 20), generator=torch.Generator().manual_seed(0))
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(output.logits).topk(2).values  # [new tokens, prompts, 2]
    gaps = (best[..., 0] - best[..., 1]).flatten()
    assert gaps.median() > 0.3
    assert (gaps < 1e-3).float().mean() < 0.005  # two orders of summation differ by about 1e-5
    new = output.sequences[:, prompts.shape[1] :]
    assert all(row.unique().numel() > NEW_TOKENS // 2 for row in new)
    assert 0 < (new == END_ID).any(dim=1).float().mean() < 0.3


@pytest.mark.parametrize(
    "overrides", [{"tie_word_embeddings": True}, {"num_key_value_heads": 4, "num_hidden_layers": 3}]
)
def test_overrides_reach_the_model_and_the_same_seed_gives_the_same_weights(
    overrides: dict[str, object], tmp_path: Path
) -> None:
    first, second = (tiny_model(tmp_path / name, **overrides) for name in ("first", "second"))
    config = AutoModelForCausalLM.from_pretrained(first).config
    assert {name: getattr(config, name) for name in overrides} == overrides
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
