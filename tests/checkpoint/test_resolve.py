"""Paths and Hugging Face ids, without a network."""

import huggingface_hub
import huggingface_hub.constants
import pytest

from qserve_jax.checkpoint import CheckpointError, load_model
from qserve_jax.checkpoint.resolve import resolve

ID = "some-org/some-model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub client, which is told that there is no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(path)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/dir", "no_such_dir", "./no/dir", "../a/b", "a/b/c"])
def test_no_such_directory(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(path)
    assert message.startswith(f"no such directory: {path}; ") and "org/name" in message


def test_empty_path():
    assert refusal("").startswith("the model path is empty: pass a checkpoint's directory")


@pytest.mark.parametrize(
    "path", ["x" * 5000, "/a" * 2500, "some-org/" + "x" * 4991], ids=["name", "path", "id"]
)
def test_long_paths_are_shortened(path):
    message = refusal(path)
    assert "5000 characters exceed the system's limit" in message and len(message) < 450
    assert message.startswith(f"{path[:50]}")


def test_long_ids_are_shortened(cache):
    assert len(refusal("some-org/" + "x" * 250)) < 600


@pytest.mark.parametrize("path", ["~no-such-user/x", 5, None, b"x"])
def test_what_cannot_be_a_path(path):
    message = refusal(path)
    assert message.startswith(f"{path} is no path (") and "pass a checkpoint's" in message


def test_directory_and_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model" == resolve(tmp_path / "model")


def test_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    assert refusal(file) == f"{file} is a file: pass the directory that holds config.json"


def test_directory_goes_before_id(tmp_path, monkeypatch):
    (tmp_path / ID).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(ID).samefile(tmp_path / ID)


def test_id_without_network(cache):
    message = refusal(ID)
    assert message.startswith(f"'{ID}' is no directory here and cannot be fetched from the Hugging")
    assert message.endswith("download it elsewhere and pass its directory")


def test_id_in_the_cache_needs_no_network(cache, checkpoint):
    snapshot = cache / "models--some-org--some-model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    checkpoint.folder = snapshot
    checkpoint.write()
    loaded = load_model(ID, precision="w16a16kv16")
    assert loaded.path == snapshot and loaded.config.vocab_size == 32


def test_what_is_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(hub_id, **options):
        asked.update(options, id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve(ID) == tmp_path and asked.pop("id") == ID
    files = {
        *("config.json", "generation_config.json", "model-00001-of-00002.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "merges.txt"),
        *("vocab.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    others = {
        *("pytorch_model.bin", "README.md", "consolidated.safetensors", "modeling.py"),
        *("original/params.json", "onnx/model.safetensors", "consolidated.00.pth"),
    }
    filtered = huggingface_hub.utils.filter_repo_objects(files | others, **asked)
    assert set(filtered) == files
