import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from skyrl_train.errors import ModelError
from skyrl_train.models.folders import save_pretrained
from skyrl_train.models.loading import load_model, load_tokenizer
from skyrl_train.models.quiet import quiet
from skyrl_train.models.tokenizers import make_tokenizer

from .helpers import make_model


def load(path: Path | str):
    return load_model(str(path), dtype=torch.float32, device="cpu")


def change(folder: Path, file: str = "config.json", **fields) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(folder: Path, file: str, keep: int) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[:keep])


def drop_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def half_of_the_shards(folder: Path) -> None:
    with quiet():
        make_model("qwen3").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    next(iter(sorted(folder.glob("model-0000*.safetensors")))).unlink()


BROKEN = {
    "config missing": (lambda f: (f / "config.json").unlink(), "has no config.json.*skyrl warmup"),
    "config is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "no config.json"),
    "config empty": (lambda f: cut(f, "config.json", 0), "no readable JSON"),
    "config cut": (lambda f: cut(f, "config.json", 40), "no readable JSON"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "no readable JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "names no model_type"),
    "config without type": (lambda f: (f / "config.json").write_text("{}"), "names no model_type"),
    "type unknown": (lambda f: change(f, model_type="megabrain"), "megabrain"),
    "type a number": (lambda f: change(f, model_type=3), "copy"),
    "an encoder": (lambda f: change(f, model_type="bert"), "no causal language model"),
    "a vision model": (lambda f: change(f, model_type="vit"), "no causal language model"),
    "of another family": (lambda f: change(f, model_type="qwen2"), "lack 6 tensors"),
    "code of its own": (
        lambda f: change(f, model_type="mine", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}),
        "custom code",
    ),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "weights empty": (lambda f: cut(f, "model.safetensors", 0), "cannot be loaded"),
    "weights cut": (lambda f: cut(f, "model.safetensors", 5000), "cannot be loaded"),
    "weights are text": (lambda f: (f / "model.safetensors").write_text("<html>" * 99), "cannot be loaded"),
    "weights a git pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"),
        "cannot be loaded",
    ),
    "a tensor missing": (drop_tensor, r"lack 1 tensors.*model.layers.1.mlp.up_proj.weight"),
    "a shard missing": (half_of_the_shards, "cannot be loaded"),
    "hidden size wrong": (lambda f: change(f, hidden_size=64), "do not have the shape"),
    "hidden size a word": (lambda f: change(f, hidden_size="big"), "hidden_size"),
    "vocabulary wrong": (lambda f: change(f, vocab_size=999), r"shape.*\(999, 32\) in the config"),
    "heads do not fit": (lambda f: change(f, num_key_value_heads=3), "do not have the shape"),
    "activation unknown": (lambda f: change(f, hidden_act="square"), "square"),
    "one layer more": (
        lambda f: change(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "lack 11 tensors.*, ...",
    ),
    "quantized": (lambda f: change(f, quantization_config={"quant_method": "gptq", "bits": 4}), "cannot be loaded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_clear_error(copy, case, capfd):
    folder = copy()
    spoil, words = BROKEN[case]
    spoil(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load(folder)
    assert "copy" in str(caught.value)  # the folder's name
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert capfd.readouterr() == ("", "")  # the error says it all


BROKEN_TOKENIZERS = {
    "none": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "has no tokenizer"),
    "cut": (lambda f: cut(f, "tokenizer.json", 300), "cannot be loaded"),
    "empty": (lambda f: cut(f, "tokenizer.json", 0), "cannot be loaded"),
    "config cut": (lambda f: cut(f, "tokenizer_config.json", 30), "cannot be loaded"),
    "of an unknown kind": (
        lambda f: ((f / "tokenizer.json").unlink(), change(f, "tokenizer_config.json", tokenizer_class="Nope")),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_one_clear_error(copy, case):
    folder = copy()
    spoil, words = BROKEN_TOKENIZERS[case]
    spoil(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load_tokenizer(str(folder))
    assert "copy" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_end_is_refused(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no eos_token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("loader", [load, load_tokenizer])
@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing", "a/b/c", "~/not-there", "", "two words", "org/"])
def test_a_folder_that_is_not_there(loader, path):
    with pytest.raises(ModelError, match=r"there is no folder.*skyrl warmup"):
        loader(path)


@pytest.mark.parametrize("loader", [load, load_tokenizer])
def test_a_file_is_no_folder(loader, good_folder):
    with pytest.raises(ModelError, match="is a file"):
        loader(str(good_folder / "model.safetensors"))


@pytest.mark.parametrize("settings", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_hub_name_without_a_hub_fails_at_once(settings, tmp_path):
    code = (
        "from skyrl_train.models.loading import load_tokenizer\n"
        "from skyrl_train.errors import ModelError\n"
        "import time; begin = time.monotonic()\n"
        "try: load_tokenizer('some-org/some-model')\n"
        "except ModelError as error: print(error)\n"
        "print('seconds', time.monotonic() - begin)\n"
    )
    environ = os.environ | settings | {"HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120)
    message, seconds = done.stdout.strip().splitlines()
    assert "'some-org/some-model'" in message and "hub cannot be reached" in message and "skyrl warmup" in message
    assert float(seconds.split()[1]) < 15
    assert done.stderr == ""


def test_saving_again_replaces_the_folder_whole(tmp_path):
    tokenizer, folder = make_tokenizer(), tmp_path / "deep" / "model"
    save_pretrained(make_model("qwen3", vocab_size=len(tokenizer)), tokenizer, folder)
    (folder / "warmup.json").write_text("{}")
    save_pretrained(make_model("llama", vocab_size=len(tokenizer)), tokenizer, folder)
    assert load(folder).config.model_type == "llama"
    assert not (folder / "warmup.json").exists()  # it told of the older model
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_leftovers_of_a_kill_do_not_disturb(tmp_path):
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "junk").write_text("x")
    save_pretrained(make_model(), make_tokenizer(), tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "junk").exists()


def test_a_failed_save_leaves_the_older_model(tmp_path):
    class Full:
        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    save_pretrained(make_model(), make_tokenizer(), tmp_path / "model")
    with pytest.raises(OSError, match="no space"):
        save_pretrained(make_model(), Full(), tmp_path / "model")
    assert load(tmp_path / "model").config.model_type == "qwen3"


def test_what_is_no_model_folder_is_never_replaced(tmp_path, copy, monkeypatch):
    model, tokenizer = make_model(), make_tokenizer()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    nested = copy()
    (nested / "checkpoints").mkdir()
    for target in (tmp_path / "home", tmp_path / "file", nested):
        with pytest.raises(ModelError, match="a model would replace it"):
            save_pretrained(model, tokenizer, target)
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    save_pretrained(model, tokenizer, tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ModelError, match="folder of this process"):
        save_pretrained(model, tokenizer, Path())


def test_refusing_is_quick(tmp_path):
    begin = time.monotonic()
    with pytest.raises(ModelError):
        load(tmp_path / "missing" / "folder")
    assert time.monotonic() - begin < 2
