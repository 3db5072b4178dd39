"""The analytic prior against published step times, and that it is a usable start for the fit."""

import pytest

from cluster.perfmodel import PRIOR, PerfModel, decode_ms, fetch_ms, prefill_ms
from cluster.roofline import GPUS, MODELS, find, kv_tokens, prior, step_ms


def prefill(model: str, gpu: str, tp: int, dtype: str, tokens: int) -> float:
    return step_ms(MODELS[model], GPUS[gpu], tp, 1, dtype, [(tokens, 0)])


def decode(model: str, gpu: str, tp: int, dtype: str, batch: int, context: int) -> float:
    return step_ms(MODELS[model], GPUS[gpu], tp, 1, dtype, [], batch, batch * context)


@pytest.mark.parametrize(
    ("model", "gpu", "tp", "dtype", "tokens", "ms"),
    [
        ("Llama-3-8B", "H100", 1, "bfloat16", 1024, 20),
        ("Llama-3-8B", "H100", 1, "bfloat16", 8192, 174),
        ("Llama-3-70B", "H100", 1, "fp8", 8192, 1257),
        ("Llama-3-70B", "H100", 2, "fp8", 8192, 730),
        ("Llama-3-70B", "H100", 4, "fp8", 8192, 447),
        ("Llama-3-70B", "H100", 8, "bfloat16", 8192, 332),
    ],
)
def test_prefill_of_a_whole_prompt_in_one_step(
    model: str, gpu: str, tp: int, dtype: str, tokens: int, ms: float
) -> None:
    assert prefill(model, gpu, tp, dtype, tokens) == pytest.approx(ms, rel=0.05)


@pytest.mark.parametrize(
    ("model", "gpu", "tp", "dtype", "batch", "context", "ms"),
    [
        ("Llama-3-8B", "H100", 1, "bfloat16", 1, 0, 7.4),
        ("Llama-3-8B", "H100", 1, "bfloat16", 64, 2048, 13.6),
        ("Llama-3-70B", "H100", 4, "fp8", 1, 0, 11.2),
        ("Llama-3-70B", "H100", 4, "fp8", 64, 2048, 18.7),
        ("Llama-3-70B", "H200", 1, "fp8", 1, 0, 21.6),
        ("Llama-3-70B", "H100", 8, "bfloat16", 1, 0, 11.8),
    ],
)
def test_decode_steps(model: str, gpu: str, tp: int, dtype: str, batch: int, context: int, ms: float) -> None:
    assert decode(model, gpu, tp, dtype, batch, context) == pytest.approx(ms, rel=0.05)


@pytest.mark.parametrize(("model", "billions"), [("Llama-3-8B", 8.03), ("Llama-3-70B", 70.6), ("Qwen3-32B", 32.8)])
def test_the_shapes_have_the_parameters_that_their_models_have(model: str, billions: float) -> None:
    assert MODELS[model].parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_the_kv_that_fits_beside_the_weights() -> None:
    """vLLM finds room for 461,376 tokens there; 2 GB a GPU for all else is on the safe side."""
    assert kv_tokens(MODELS["Llama-3-70B"], GPUS["H100"], 4, 1, "bfloat16") == pytest.approx(461_376, rel=0.1)
    assert kv_tokens(MODELS["Llama-3-70B"], GPUS["H100"], 1, 1, "bfloat16") < 0


@pytest.mark.parametrize("gpu", list(GPUS))
@pytest.mark.parametrize(("model", "tp", "pp"), [("Llama-3-8B", 1, 1), ("Qwen3-32B", 2, 1), ("Llama-3-70B", 4, 2)])
@pytest.mark.parametrize("step_tokens", [16, 512, 8192])
def test_the_coefficients_give_the_steps_that_they_were_taken_from(
    gpu: str, model: str, tp: int, pp: int, step_tokens: int
) -> None:
    rates = prior(MODELS[model], f"NVIDIA {gpu} 80GB", tp, pp, "bfloat16", step_tokens)
    shape = (MODELS[model], GPUS[gpu], tp, pp, "bfloat16")
    assert min(*rates.prefill, *rates.decode, *rates.memory, *rates.disk, *rates.remote) >= 0
    assert rates.step_tokens == step_tokens
    for tokens, context in [(step_tokens, 0), (step_tokens, 4096), (step_tokens // 2, 1024)]:  # the last is off a bend
        assert prefill_ms(rates, tokens, context) == pytest.approx(step_ms(*shape, [(tokens, context)]), rel=0.15)
    for batch, kv in [(1, 0), (1, 8192), (16, 16_384), (64, 131_072)]:
        assert decode_ms(rates, batch, kv) == pytest.approx(step_ms(*shape, [], batch, kv), rel=0.1)


def test_more_ranks_are_faster_and_stages_are_not() -> None:
    model, gpu = MODELS["Llama-3-70B"], GPUS["H100"]
    times = [step_ms(model, gpu, tp, 1, "bfloat16", [(2048, 0)]) for tp in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert step_ms(model, gpu, 1, 4, "bfloat16", [(2048, 0)]) > times[0]


def test_fetching_from_memory_beats_a_network_beats_a_disk_and_all_beat_computing() -> None:
    model = MODELS["Llama-3-70B"]
    rates, size = prior(model, "H100", 4, 1, "bfloat16", 2048), 4096 * model.kv_token_bytes
    memory, remote, disk = (fetch_ms(rates, size, path) for path in ("memory", "remote", "disk"))
    assert memory < remote < disk
    assert remote < prefill_ms(rates, 4096, 0)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("H200", "H200"),  # as Ray labels it
    ],
)
def test_a_gpu_is_found_by_its_whole_name(device: str, name: str) -> None:
    assert find(device) is GPUS[name]


def test_of_other_devices_nothing_is_known() -> None:
    assert find("NVIDIA L40") is None  # neither an L4 nor an L40S
    assert find("Intel Xeon") is None
    for device, dtype in [("cpu", "bfloat16"), ("NVIDIA H100", "float32")]:
        rates = prior(MODELS["Llama-3-8B"], device, 1, 1, dtype, 256)
        assert (rates.prefill, rates.step_tokens) == (PRIOR.prefill, 256)


def test_a_model_starts_from_its_prior_and_leaves_it_for_what_it_measures() -> None:
    rates = prior(MODELS["Llama-3-8B"], "NVIDIA H100 80GB HBM3", 1, 1, "bfloat16", 2048)
    model = PerfModel(2048, rates)
    assert model.rates().decode == pytest.approx(rates.decode)
    assert model.prefill_ms(5000, 100) == pytest.approx(prefill_ms(rates, 5000, 100))
    for batch in [1, 8, 32] * 100:
        model.observe_step([(1, 1000)] * batch, 2 * decode_ms(rates, batch, 1000 * batch))
    assert model.rates().decode == pytest.approx([2 * value for value in rates.decode], rel=0.05)
