"""The worker that scores: the model's log-probs, however the rows are cut."""

from __future__ import annotations

import pytest
import torch

from skyrl_train.learner.worker import ScoringWorker


def plain(folder, batch, temperature: float = 1.0) -> torch.Tensor:
    """Each row alone through stock transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found = torch.zeros(batch.response_ids.shape)
    for row in range(len(batch)):
        prompt, response = batch.prompt(row), batch.response(row)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0] / temperature
        for place, token in enumerate(response):
            found[row, place] = logits[len(prompt) + place - 1].log_softmax(-1)[token]
    return found


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("micro", [1, 3, 100])
def test_log_probs_are_those_of_each_row_alone(config, model_folder, batch, packing, micro) -> None:
    worker = ScoringWorker(
        config(f"trainer.use_sample_packing={packing}", f"trainer.micro_forward_batch_size_per_gpu={micro}"), "policy"
    )
    assert worker.packed == (packing == "true")
    assert torch.allclose(worker.logprobs(batch), plain(model_folder, batch), atol=1e-5)


def test_under_the_temperature_of_the_sampling(config, model_folder, batch) -> None:
    worker = ScoringWorker(config("generator.sampling_params.temperature=0.5"), "policy")
    assert torch.allclose(worker.logprobs(batch), plain(model_folder, batch, 0.5), atol=1e-5)


def test_the_role_decides_the_model(config, model_folder, tmp_path) -> None:
    settings = config(f"trainer.ref.model.path={model_folder}", "trainer.policy.model.path=elsewhere")
    facts = ScoringWorker(settings, "ref").describe()
    assert facts["role"] == "ref" and facts["device"] == "cpu" and facts["dtype"] == "float32" and facts["packed"]
    assert facts["vocabulary"] >= 100 and facts["parameters"] > 10_000


def test_bfloat16_is_near_and_its_result_is_float32(config, model_folder, batch) -> None:
    worker = ScoringWorker(config("trainer.bf16=true"), "policy")
    assert worker.describe()["dtype"] == "bfloat16"
    assert all(p.dtype == torch.float32 for p in worker.model.parameters())
    found, exact = worker.logprobs(batch), plain(model_folder, batch)
    assert found.dtype == torch.float32 and 1e-5 < (found - exact).abs().max() < 0.3


def test_an_export_is_the_model(config, tmp_path, batch, model_folder) -> None:
    from transformers import AutoTokenizer

    worker = ScoringWorker(config(), "policy")
    with torch.no_grad():
        next(worker.model.parameters()).mul_(1.5)
    worker.export(str(tmp_path / "deep" / "folder"))
    assert torch.allclose(plain(tmp_path / "deep" / "folder", batch), worker.logprobs(batch), atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "deep" / "folder").eos_token == "<|im_end|>"


def test_threads_are_those_of_the_config(config) -> None:
    ScoringWorker(config("trainer.num_threads=2"), "policy")
    assert torch.get_num_threads() == 2
