import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from skyrl_train.errors import ModelError
from skyrl_train.models.loading import load_model, load_tokenizer, supports_packing
from skyrl_train.models.scoring import score
from skyrl_train.models.tokenizers import make_tokenizer

from .helpers import FAMILIES, GPT2, make_model, ragged

CPU = {"dtype": torch.float32, "device": "cpu"}


def test_a_good_folder_loads_as_it_was_saved(good_folder):
    model, tokenizer = load_model(str(good_folder), **CPU), load_tokenizer(str(good_folder))
    plain = AutoModelForCausalLM.from_pretrained(good_folder, attn_implementation="sdpa")
    batch = ragged()
    ours, theirs = (score(m, batch, temperature=1.0, packed=False, with_entropy=False)[0] for m in (model, plain))
    assert torch.equal(ours, theirs)
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(good_folder).get_vocab()
    assert supports_packing(model)


def test_dtype_and_attention_are_as_asked(good_folder):
    model = load_model(str(good_folder), dtype=torch.bfloat16, device="cpu", attn="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_a_home_folder_may_be_written_with_a_tilde(good_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(good_folder.parent))
    assert load_model("~/good", **CPU).config.model_type == "qwen3"
    assert load_tokenizer("~/good").eos_token == "<|im_end|>"


def test_dropout_is_off_even_when_the_folder_asks_for_it(tmp_path):
    from skyrl_train.models.folders import save_pretrained

    tokenizer = make_tokenizer()
    wet = make_model("gpt2", vocab_size=len(tokenizer), **dict.fromkeys((*list(GPT2)[-2:], "embd_pdrop"), 0.5))
    save_pretrained(wet, tokenizer, tmp_path / "gpt2")
    model, batch = load_model(str(tmp_path / "gpt2"), **CPU).train(), ragged()
    first, second = (score(model, batch, temperature=1.0, packed=True, with_entropy=False)[0] for _ in range(2))
    assert torch.equal(first, second)
    wet.train()
    first, second = (score(wet, batch, temperature=1.0, packed=False, with_entropy=False)[0] for _ in range(2))
    assert not torch.equal(first, second)  # this test can fail


def test_rope_changes_what_the_model_computes(good_folder):
    batch, path = ragged(), str(good_folder)

    def logprobs(**changes):
        model = load_model(path, **CPU, **changes)
        return score(model, batch, temperature=1.0, packed=True, with_entropy=False)[0], model.config.rope_parameters

    plain, _ = logprobs()
    linear, parameters = logprobs(rope_scaling={"type": "linear", "factor": 4.0})
    assert parameters["rope_type"] == "linear" and parameters["factor"] == 4.0
    wide, parameters = logprobs(rope_theta=100.0)
    assert parameters["rope_theta"] == 100.0
    assert not torch.allclose(plain, linear) and not torch.allclose(plain, wide)


def test_config_fields_are_overridden(good_folder):
    model = load_model(str(good_folder), **CPU, config_kwargs={"rms_norm_eps": 0.5})
    assert model.config.rms_norm_eps == 0.5
    assert model.model.norm.variance_epsilon == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config_kwargs": {"rms_norm_esp": 0.1}}, "model_config_kwargs.rms_norm_esp=0.1.*Did you mean rms_norm_eps"),
        ({"config_kwargs": {"intermediate_size": 99}}, "do not have the shape"),
        ({"config_kwargs": {"intermediate_size": "wide"}}, "intermediate_size"),
        ({"config_kwargs": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}}, "lack 11 tensors"),
        ({"config_kwargs": {"num_hidden_layers": 3}}, "num_hidden_layers"),
        ({"config_kwargs": {"hidden_act": "square"}}, "square"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"attn": "quick"}, "quick"),
    ],
)
def test_overrides_that_cannot_be(good_folder, changes, words):
    with pytest.raises(ModelError, match=words):
        load_model(str(good_folder), **CPU, **changes)


def test_a_model_without_rotary_embedding_refuses_its_keys(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"rope_scaling.*has no rotary embedding"):
        load_model(str(tmp_path / "gpt2"), **CPU, rope_theta=1e6)


def test_left_out_tensors_are_told(good_folder, caplog):
    with caplog.at_level(logging.WARNING, "skyrl.models"):
        load_model(str(good_folder), **CPU, config_kwargs={"num_hidden_layers": 1, "layer_types": ["full_attention"]})
    assert "11 tensors that the config does not describe" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_pack(family):
    assert supports_packing(make_model(family))


def test_the_probe_leaves_no_trace():
    model, state = make_model().train(), torch.get_rng_state()
    supports_packing(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_that_knows_no_plan_runs_padded_with_the_reason_logged(attention, caplog):
    with caplog.at_level(logging.WARNING, "skyrl.models"):
        assert not supports_packing(make_model("qwen3", attention=attention))
    assert "Qwen3ForCausalLM runs padded: packed log-probs differ by" in caplog.text


def test_a_recurrent_model_runs_padded(caplog):
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=37, hidden_size=16, num_hidden_layers=1, state_size=4)
    with caplog.at_level(logging.WARNING, "skyrl.models"):
        assert not supports_packing(AutoModelForCausalLM.from_config(config))
    assert "MambaForCausalLM runs padded" in caplog.text


def test_a_model_of_nans_does_not_count_as_packing(caplog):
    model = make_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    assert not supports_packing(model)


def test_soft_capped_attention_is_not_taken_for_ours(tmp_path):
    make_model("gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=5).save_pretrained(tmp_path / "gemma2")
    model = load_model(str(tmp_path / "gemma2"), **CPU)
    assert model.config._attn_implementation == "eager"
    assert not supports_packing(model)


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path):
    core = make_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<|im_end|>"


def test_a_tokenizer_needs_no_weights_beside_it(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode("a")
