"""The folder `deploy`: its files match the command's options and the cluster's schemas."""

import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import typer
import yaml
from dockerfile_parse import DockerfileParser

from expertoken.cli.app import app

DEPLOY = Path(__file__).parents[1] / "deploy"


def serve(arguments: list[str]) -> dict:
    """Parse a container's arguments with the command and return its parameters."""
    name, *rest = arguments
    command = typer.main.get_command(app).commands[name]
    with command.make_context(name, list(rest)) as context:
        return context.params


def manifests():
    return [
        document
        for file in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        if file.name != "kustomization.yaml"
        for document in yaml.safe_load_all(file.read_text())
    ]


@pytest.mark.parametrize(
    "manifest", manifests(), ids=lambda manifest: f"{manifest['kind']} {manifest['metadata']['name']}"
)
def test_each_manifest_is_what_the_clusters_schema_allows(manifest):
    kubernetes_validate.validate(manifest, "1.30", strict=True)


def test_a_wrong_manifest_is_told():
    broken = manifests()[0]
    broken["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(broken, "1.30", strict=True)


def test_kustomize_reads_files_that_are_there():
    listed = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert {"kustomization.yaml", *listed} == {file.name for file in (DEPLOY / "kubernetes").iterdir()}


def test_the_cluster_gives_a_gateway_the_time_it_asks_for_to_stop():
    pod = manifests()[0]["spec"]["template"]["spec"]
    given = serve(pod["containers"][0]["args"])
    assert pod["terminationGracePeriodSeconds"] > given["drain"] + given["shutdown"]


def test_image_compose_and_cluster_start_the_command_with_options_that_it_has():
    (image,) = [
        step for step in DockerfileParser(path=str(DEPLOY / "Dockerfile")).structure if step["instruction"] == "CMD"
    ]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["gateway"]
    pod = manifests()[0]["spec"]["template"]["spec"]["containers"][0]
    for arguments in (yaml.safe_load(image["value"]), compose["command"], pod["args"]):
        given = serve(arguments)
        assert (given["composite"], given["host"], given["port"]) == (Path("/composite"), "0.0.0.0", 8000)


def test_the_balancers_file_is_well_formed():
    if not (haproxy := shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")):
        pytest.skip("no haproxy here")
    done = subprocess.run([haproxy, "-c", "-f", str(DEPLOY / "haproxy.cfg")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
