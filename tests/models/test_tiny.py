import pytest
import yaml

from skyrl_train.errors import ConfigError
from skyrl_train.models.attention import NAME
from skyrl_train.models.tiny import make_model
from skyrl_train.models.tokenizers import make_tokenizer

TOKENIZER = make_tokenizer()
SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 50,
}


def test_the_default_is_a_qwen3_of_under_half_a_million_parameters():
    model = make_model(None, TOKENIZER, longest=100)
    assert model.config.model_type == "qwen3" and model.config._attn_implementation == NAME
    assert model.config.vocab_size == len(TOKENIZER) and model.config.eos_token_id == TOKENIZER.eos_token_id
    assert 300_000 < sum(p.numel() for p in model.parameters()) < 500_000


def test_a_file_describes_any_family(tmp_path):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(SMALL))
    model = make_model(tmp_path / "m.yaml", TOKENIZER, longest=50)
    assert model.config.model_type == "llama" and model.config.hidden_size == 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "megabrain"}, "megabrain"),
        ({"model_type": "bert"}, "is no causal"),
        ({"model_type": "vit"}, "has no field max_position_embeddings"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": 15}, "no model can be made"),
        ({"hiden_size": 32}, "has no field hiden_size"),
        ({"vocab_size": 50}, "vocab_size 50 is less than the"),
        ({"max_position_embeddings": 49}, "longest sequence has 50 tokens, the model takes 49"),
    ],
)
def test_descriptions_that_cannot_be(tmp_path, changes, words):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(SMALL | changes))
    with pytest.raises(ConfigError, match=f"--model-config=.*m.yaml.*{words}"):
        make_model(tmp_path / "m.yaml", TOKENIZER, longest=50)


@pytest.mark.parametrize("text", ["", "[]", "hidden_size: 3", "{", "just words", "a: b: c"])
def test_files_that_describe_nothing(tmp_path, text):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ConfigError, match="--model-config"):
        make_model(tmp_path / "m.yaml", TOKENIZER, longest=50)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            make_model(path, TOKENIZER, longest=50)
