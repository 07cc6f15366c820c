"""Where models and fusers come from: folders, `.gguf` files, and hub ids out of a cache, without any network."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from c2c_export.checkpoint import read_fuser
from c2c_export.errors import C2CError, UsageError
from c2c_export.sources import resolve_fuser, resolve_model

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen3_from_qwen2"
MAIN, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline hub cache with the model org/tiny, in two revisions, and the fusers org/fusers:first and :deep/er."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = cache / "models--org--tiny"
    for commit in (MAIN, OLDER):
        shutil.copytree(GOLDEN / "receiver", model / "snapshots" / commit)
    fusers = cache / "models--org--fusers"
    for subfolder in ("first+second_Fuser", "deep/er"):
        shutil.copytree(GOLDEN / "fuser", fusers / "snapshots" / MAIN / subfolder)
    for repository, refs in ((model, {"main": MAIN, "v1.0": OLDER, "pr/3": OLDER}), (fusers, {"main": MAIN})):
        for name, commit in refs.items():
            (repository / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / "refs" / name).write_text(commit)
    return cache


def refusal(resolve: object, source: str, kind: type[C2CError]) -> str:
    with pytest.raises(C2CError) as caught:
        resolve(source)  # type: ignore[operator]
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith(f"{source}:")
    assert len(message.splitlines()) <= 2
    return message


def test_a_folder_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(GOLDEN / "receiver")) == GOLDEN / "receiver"
    assert resolve_fuser(str(GOLDEN / "fuser")) == GOLDEN / "fuser"
    monkeypatch.chdir(GOLDEN)
    assert resolve_model("receiver") == Path("receiver")


def test_a_local_folder_wins_over_a_hub_id_of_the_same_name(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert resolve_model("org/tiny") == Path("org/tiny")


@pytest.mark.parametrize(
    ("source", "commit"),
    [
        ("org/tiny", MAIN),
        ("org/tiny@main", MAIN),
        ("org/tiny@v1.0", OLDER),
        ("org/tiny@pr/3", OLDER),
        (f"org/tiny@{OLDER}", OLDER),
    ],
)
def test_a_hub_id_is_found_in_the_cache_in_the_revision_that_it_names(hub: Path, source: str, commit: str) -> None:
    assert resolve_model(source) == hub / "models--org--tiny" / "snapshots" / commit


@pytest.mark.parametrize(
    ("source", "subfolder"),
    [
        ("org/fusers:first+second_Fuser", "first+second_Fuser"),
        ("org/fusers:first+second_Fuser@main", "first+second_Fuser"),
        ("org/fusers:deep/er", "deep/er"),
        ("org/fusers:deep/er/", "deep/er"),
        (f"org/fusers:deep/er@{MAIN}", "deep/er"),
    ],
)
def test_a_fuser_may_lie_in_a_folder_of_a_repository(hub: Path, source: str, subfolder: str) -> None:
    folder = resolve_fuser(source)
    assert folder == hub / "models--org--fusers" / "snapshots" / MAIN / subfolder
    assert len(read_fuser(folder).links) == 4


@pytest.mark.parametrize("source", ["org/other", "org/tiny@v2.0", f"org/tiny@{'c' * 40}"])
def test_what_is_not_in_the_cache_is_refused_when_offline(hub: Path, source: str) -> None:
    message = refusal(resolve_model, source, C2CError)
    assert "hub" in message
    assert "network" in message


def test_a_folder_that_the_repository_lacks_is_named(hub: Path) -> None:
    assert "'third'" in refusal(resolve_fuser, "org/fusers:third", C2CError)


@pytest.mark.parametrize(
    "source", ["./model", "/no/such/model", "~/model", "model", "a/b/c", "org/tiny@", "org name/x"]
)
def test_what_is_neither_a_path_nor_a_hub_id_is_refused_with_the_forms_that_are(hub: Path, source: str) -> None:
    for resolve in (resolve_model, resolve_fuser):
        message = refusal(resolve, source, UsageError)
        assert "folder" in message
        assert "hub id" in message


def test_an_empty_name_is_not_the_current_folder() -> None:
    for resolve in (resolve_model, resolve_fuser):
        with pytest.raises(UsageError):
            resolve("")


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    assert "no such .gguf file" in refusal(resolve_model, str(tmp_path / "model.gguf"), UsageError)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"1234")
    assert ".gguf" in refusal(resolve_model, str(path), UsageError)
    assert "folder" in refusal(resolve_fuser, str(path), UsageError)
