"""`c2c-export serve --ray-config`: a file that Serve's own schema takes, with what the options said, but no secret."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import RunCli
from ray.serve.schema import ServeDeploySchema

from engines import cores
from engines.cores import physical_cores, whole_processors
from runtime import C2CError, UsageError
from runtime.server.ray.arguments import RayArguments

PAIR = "llama_from_gemma3_aligned"
TWO_SHARERS = "two_sharers_parallel"
BundleOf = Callable[[str], Path]

pytestmark = pytest.mark.xdist_group(PAIR)


def written(run_cli: RunCli, bundle: Path, folder: Path, *options: object) -> dict[str, Any]:
    """What the command writes; checked by Serve."""
    file = folder / "serve.yaml"
    code, _, err = run_cli("serve", bundle, "--ray-config", file, *options)
    assert code == 0, err
    assert "serve run" in err
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    ServeDeploySchema.model_validate(config)
    assert "&" not in file.read_text(), "people edit it, so nothing is said by reference"
    return config


def deployments_of(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    [application] = config["applications"]
    return {deployment["name"]: deployment for deployment in application["deployments"]}


def test_the_application_is_told_what_the_options_say(run_cli: RunCli, recorded_bundle: BundleOf, tmp_path: Path):
    bundle = recorded_bundle(PAIR)
    config = written(
        run_cli, bundle, tmp_path, "--slots", 3, "--threads", 1, "--port", 8123, "--max-waiting", 5, "--model-name", "m"
    )
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8123}
    [application] = config["applications"]
    arguments = RayArguments.model_validate(application["args"])
    assert arguments.bundle == str(bundle.absolute())
    assert (arguments.engine, arguments.precision, arguments.layout) == ("ort-cpu", "fp32", "whole")
    assert (arguments.num_slots, arguments.num_threads) == (3, 1)
    assert (arguments.scheduler.max_waiting, arguments.settings.model_name) == (5, "m")
    deployments = deployments_of(config)
    assert deployments.keys() == {"Ingress", "Pipeline"}
    pipeline = deployments["Pipeline"]
    assert pipeline["ray_actor_options"] == {"num_cpus": 1}
    assert pipeline["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 3}


def test_sharers_have_deployments_of_their_own(run_cli: RunCli, recorded_bundle: BundleOf, tmp_path: Path):
    config = written(run_cli, recorded_bundle(TWO_SHARERS), tmp_path, "--ray-layout", "disaggregated")
    deployments = deployments_of(config)
    assert deployments.keys() == {"Ingress", "Pipeline", "Sharer0", "Sharer1"}
    for name in ("Pipeline", "Sharer0", "Sharer1"):
        assert deployments[name]["ray_actor_options"] == {"num_cpus": min(physical_cores(), whole_processors())}


@pytest.mark.parametrize("quota", [None, 1.5])
def test_one_machine_has_the_cpus_for_a_whole_pipeline(
    quota: float | None, run_cli: RunCli, recorded_bundle: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Serve waited for ever for the ingress's half of a CPU, where there are no hyper-threads to take it from."""
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    code, _, err = run_cli("serve", recorded_bundle(PAIR), "--ray-config", tmp_path / "serve.yaml")
    assert code == 0
    assert "warning" not in err
    deployments = deployments_of(yaml.safe_load((tmp_path / "serve.yaml").read_text()))
    assert sum(options["ray_actor_options"]["num_cpus"] for options in deployments.values()) <= whole_processors()


def test_too_few_cpus_for_every_sharer_are_warned_of(
    run_cli: RunCli, recorded_bundle: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cores, "cpu_quota", lambda: 1.0)
    layout = ("--ray-layout", "disaggregated")
    code, _, err = run_cli("serve", recorded_bundle(PAIR), "--ray-config", tmp_path / "serve.yaml", *layout)
    assert code == 0
    assert "Pipeline 1, Sharer0 1; this machine has 1, so that by itself it cannot start them" in err


def test_a_file_that_is_there_is_left_as_it_is(run_cli: RunCli, recorded_bundle: BundleOf, tmp_path: Path):
    file = tmp_path / "serve.yaml"
    file.write_text("edited")
    code, _, err = run_cli("serve", recorded_bundle(PAIR), "--ray-config", file)
    assert (code, file.read_text()) == (2, "edited")
    assert f"--ray-config {file}: exists already" in err


def test_api_keys_are_not_in_the_file(
    run_cli: RunCli, recorded_bundle: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = written(run_cli, recorded_bundle(PAIR), tmp_path, "--api-key", "hush-hush")
    text = (tmp_path / "serve.yaml").read_text()
    assert "hush-hush" not in text
    assert "set C2C_EXPORT_API_KEYS where Ray is started" in text
    arguments = RayArguments.model_validate(config["applications"][0]["args"])
    monkeypatch.delenv("C2C_EXPORT_API_KEYS", raising=False)
    with pytest.raises(C2CError, match="C2C_EXPORT_API_KEYS: no API keys in this environment variable"):
        arguments.settings_with_keys()
    monkeypatch.setenv("C2C_EXPORT_API_KEYS", " ")
    with pytest.raises(UsageError, match="C2C_EXPORT_API_KEYS: this environment variable is set but blank"):
        arguments.settings_with_keys()
    monkeypatch.setenv("C2C_EXPORT_API_KEYS", "hush-hush other")
    assert arguments.settings_with_keys().api_keys == ("hush-hush", "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray-layout", "spread"], "--ray-layout: 'spread' is not allowed; expected whole or disaggregated"),
        (["--engine", "auto"], "auto is not allowed here, as all replicas must run the same engine"),
        (["--precision", "auto"], "auto is not allowed here"),
        (["--precision", "int4"], "has no engine ort-cpu in int4"),
    ],
)
def test_what_cannot_be_is_refused(
    options: list[str], message: str, run_cli: RunCli, recorded_bundle: BundleOf, tmp_path: Path
):
    file = tmp_path / "serve.yaml"
    code, _, err = run_cli("serve", recorded_bundle(PAIR), "--ray-config", file, *options)
    assert (code, file.exists()) == (2, False)
    assert message in err


@pytest.mark.xdist_group("gates_closed")
def test_a_bundle_without_computed_sharers_has_nothing_to_disaggregate(
    run_cli: RunCli, recorded_bundle: BundleOf, tmp_path: Path
):
    bundle = recorded_bundle("gates_closed")
    code, _, err = run_cli("serve", bundle, "--ray-config", tmp_path / "x.yaml", "--ray-layout", "disaggregated")
    assert code == 2
    assert "no sharer of this bundle computes anything" in err


def test_arguments_that_nobody_knows_are_refused(recorded_bundle: BundleOf):
    bundle = str(recorded_bundle(PAIR))
    with pytest.raises(ValueError, match="slots"):
        RayArguments.model_validate({"bundle": bundle, "slots": 3})
    with pytest.raises((ValueError, UsageError), match="max_body"):
        RayArguments.model_validate({"bundle": bundle, "settings": {"max_body": 0}})
    with pytest.raises(ValueError, match="max_bodies"):
        RayArguments.model_validate({"bundle": bundle, "settings": {"max_bodies": 5}})


def test_a_missing_ray_is_an_error_that_names_the_extra():
    code = "import sys; sys.modules['ray'] = None; import runtime.server.ray_app"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install -c constraints.txt '.[ray]'" in done.stderr.splitlines()[-1]
