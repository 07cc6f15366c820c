"""Loading the trained models of a bundle: from the manifest's sources or the options', and what is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from checked_bundles import options_of
from recorded_cases import GOLDEN

from c2c_export.bundle import Manifest, ModelRecord, read_manifest
from c2c_export.check.options import CheckOptions
from c2c_export.check.trained.pair import TrainedPair
from c2c_export.errors import C2CError, UsageError

ALIGNED, UNALIGNED = "qwen3_from_llama_aligned", "qwen3_from_qwen2"
pytestmark = pytest.mark.xdist_group(ALIGNED)


@pytest.fixture
def bundle(recorded_bundle: Callable[[str], Path]) -> Path:
    return recorded_bundle(ALIGNED)


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


def with_receiver(manifest: Manifest, **fields: str) -> Manifest:
    receiver: ModelRecord = manifest.receiver.model_copy(update=fields)
    return manifest.model_copy(update={"receiver": receiver})


def test_the_sources_of_the_manifest_are_taken_where_none_are_given(manifest: Manifest, bundle: Path):
    at_home = with_receiver(manifest, source=str(GOLDEN / ALIGNED / "receiver"))
    options = dataclasses.replace(options_of(bundle, ALIGNED), receiver=None)
    pair = TrainedPair.load(at_home, options)
    assert pair.receiver_source.source == at_home.receiver.source
    assert pair.receiver.num_layers == manifest.receiver.num_layers
    assert (len(pair.sharers), len(pair.fusers), len(pair.sharer_sources)) == (1, 1, 1)


def test_a_source_that_is_gone_is_named_with_its_field_and_option(manifest: Manifest, bundle: Path):
    options = dataclasses.replace(options_of(bundle, ALIGNED), receiver=None)
    with pytest.raises(C2CError, match=r"receiver\.source names /gone, which cannot be read(.|\n)*--receiver"):
        TrainedPair.load(with_receiver(manifest, source="/gone"), options)
    options = dataclasses.replace(options_of(bundle, ALIGNED), fusers=())
    sharer = manifest.sharers[0].model_copy(update={"fuser_source": "/gone"})
    with pytest.raises(C2CError, match=r"sharers\.0\.fuser_source names /gone(.|\n)*--fuser"):
        TrainedPair.load(manifest.model_copy(update={"sharers": (sharer,)}), options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sharers": ["a", "b"]}, "2 --sharer given, expected 1"),
        ({"fusers": ["a", "b"]}, "2 --fuser given, expected 1"),
        ({"sharer_chat_templates": [Path("a"), Path("b")]}, "2 --sharer-chat-template given, expected 1"),
    ],
)
def test_as_many_as_the_bundle_has_are_expected(manifest: Manifest, bundle: Path, given: dict, message: str):
    with pytest.raises(UsageError, match=message):
        TrainedPair.load(manifest, CheckOptions(bundle, **given))


def test_a_fuser_of_other_models_is_refused(manifest: Manifest, bundle: Path):
    other = str(GOLDEN / "llama_from_gemma3_aligned" / "fuser")
    with pytest.raises(C2CError, match=r"give the (receiver|sharer) that this fuser was trained with"):
        TrainedPair.load(manifest, options_of(bundle, ALIGNED, fusers=[other]))


def test_the_chat_template_that_was_given_as_a_file_is_found_or_asked_for(
    manifest: Manifest, bundle: Path, tmp_path: Path
):
    template = tmp_path / "receiver.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    named = with_receiver(manifest, chat_template=f"file {template}")
    options = options_of(bundle, ALIGNED)
    assert TrainedPair.load(named, options).receiver_source.chat_template == template.read_text()
    moved = template.rename(tmp_path / "moved.jinja")
    with pytest.raises(C2CError, match=r"receiver\.chat_template names the file .*give it with --receiver-chat"):
        TrainedPair.load(named, options)
    found = TrainedPair.load(named, dataclasses.replace(options, receiver_chat_template=moved))
    assert found.receiver_source.chat_template == moved.read_text()
