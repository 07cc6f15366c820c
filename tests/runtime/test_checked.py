"""The runtime warns of an engine that was never checked, once, and refuses one that failed, unless told otherwise."""

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime
import pytest
from command_line import RunCli

from c2c_export import __version__
from c2c_export.bundle import Bundle, read_manifest, write_manifest
from c2c_export.check_record import CheckRecord, Divergence, LevelRecord
from engines.select import portable_on_cuda
from runtime import C2CError, C2CPipeline, FailedEngineError, UncheckedEngineWarning
from runtime.checked import refuse_failed

PAIR = "qwen3_from_qwen2"
pytestmark = pytest.mark.xdist_group(PAIR)


HERE = {"onnxruntime": onnxruntime.__version__, "c2c-export": __version__, "torch": "1.0"}


def check_of(*, passed: bool, versions: Mapping[str, str] = HERE) -> CheckRecord:
    divergence = Divergence(graph="receiver", layer=2, kind="key", message="the row is off by 1.4 of its length")
    level = LevelRecord(name="caches", passed=passed, seconds=1.0, divergences=() if passed else (divergence,))
    return CheckRecord(
        passed=passed,
        date="2026-11-27T00:00:00+00:00",
        versions=dict(versions),
        calibration="",
        num_prompts=1,
        levels=(level,),
    )


@pytest.fixture
def bundle(recorded_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    copy = tmp_path / "pair.bundle"
    shutil.copytree(recorded_bundle(PAIR), copy)
    mark(copy, None)
    return copy


def mark(bundle: Path, check: CheckRecord | None) -> None:
    """Give every engine of the bundle this result."""
    manifest = read_manifest(bundle)
    engines = {name: record.model_copy(update={"check": check}) for name, record in manifest.engines.items()}
    write_manifest(bundle, manifest.model_copy(update={"engines": engines}))


def warnings_of(open_it: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_it()
    return [str(warning.message) for warning in caught if warning.category is UncheckedEngineWarning]


def test_an_unchecked_engine_warns_once(bundle: Path):
    (message,) = warnings_of(lambda: C2CPipeline.from_bundle(bundle, num_threads=1))
    assert f"{bundle}: engine ort-cpu in fp32 was never checked" in message
    assert "c2c-export check" in message
    assert not warnings_of(lambda: C2CPipeline.from_bundle(bundle, num_threads=1))


def test_an_unchecked_engine_that_is_allowed_does_not_warn(bundle: Path):
    assert not warnings_of(lambda: C2CPipeline.from_bundle(bundle, num_threads=1, allow_unchecked=True))


def test_an_engine_that_passed_does_not_warn(bundle: Path):
    mark(bundle, check_of(passed=True))
    assert not warnings_of(lambda: C2CPipeline.from_bundle(bundle, num_threads=1))


def test_an_engine_that_failed_is_refused_with_the_level_and_what_to_do(bundle: Path):
    mark(bundle, check_of(passed=False))
    with pytest.raises(FailedEngineError) as caught:
        C2CPipeline.from_bundle(bundle, num_threads=1, allow_unchecked=True)
    message = str(caught.value)
    assert "ort-cpu in fp32 failed its check at level caches: the row is off by 1.4 of its length" in message
    assert "c2c-export check" in message
    assert "allow_failed=True" in message


def test_an_engine_that_failed_runs_where_that_is_allowed(bundle: Path):
    mark(bundle, check_of(passed=False))
    pipe = C2CPipeline.from_bundle(bundle, num_threads=1, allow_failed=True)
    assert pipe.generate("Hi", max_new_tokens=2, ignore_eos=True).token_ids


def test_auto_passes_over_an_engine_that_failed_and_says_why(bundle: Path):
    manifest = read_manifest(bundle)
    good = manifest.engines["ort-cpu-fp32"]
    failed = good.model_copy(update={"check": check_of(passed=False)})
    other = good.model_copy(update={"precision": "int8", "check": check_of(passed=True)})
    engines = {"ort-cpu-fp32": failed, "ort-cpu-int8": other}
    write_manifest(bundle, manifest.model_copy(update={"engines": engines}))
    pipe = C2CPipeline.from_bundle(bundle, "ort-cpu", "auto", num_threads=1)
    assert pipe.engine_choice.precision == "int8"
    assert "failed its check at level caches" in pipe.engine_choice.reason


def test_auto_without_any_engine_that_passed_is_an_error(bundle: Path):
    mark(bundle, check_of(passed=False))
    with pytest.raises(C2CError, match="failed its check at level caches"):
        C2CPipeline.from_bundle(bundle, "auto", num_threads=1)


def test_the_command_line_warns_and_is_told_otherwise(run_cli: RunCli, bundle: Path):
    options = ("-p", "Hi", "--max-new-tokens", "1", "--threads", "1")
    mark(bundle, check_of(passed=False))
    code, _, err = run_cli("generate", bundle, *options)
    assert code == 1
    assert "failed its check at level caches" in err
    assert run_cli("generate", bundle, *options, "--allow-failed")[0] == 0
    code, _, err = run_cli("bench", bundle, "--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1")
    assert code == 1
    assert "failed its check at level caches" in err


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("onnxruntime", "0.1", f"was checked with onnxruntime 0.1, this is {onnxruntime.__version__}"),
        ("c2c-export", "0.0.1", f"was checked with c2c-export 0.0.1, this is {__version__}"),
    ],
)
def test_an_engine_that_was_checked_with_other_libraries_warns(bundle: Path, name: str, version: str, expected: str):
    mark(bundle, check_of(passed=True, versions={**HERE, name: version}))
    (message,) = warnings_of(lambda: C2CPipeline.from_bundle(bundle, num_threads=1))
    assert expected in message
    assert "never" not in message
    assert not warnings_of(lambda: C2CPipeline.from_bundle(bundle, num_threads=1, allow_unchecked=True))


def test_what_to_do_about_a_failure_fits_the_engine(bundle: Path):
    opened, failed = Bundle.open(bundle), {"check": check_of(passed=False)}
    with pytest.raises(FailedEngineError, match=r"\nBuild it again, and check it with"):
        refuse_failed(opened, opened.manifest.engines["ort-cpu-fp32"].model_copy(update=failed))
    with pytest.raises(FailedEngineError, match=r"nobody builds: export the bundle again, and check it with"):
        refuse_failed(opened, portable_on_cuda(opened).model_copy(update=failed))
