"""The Dockerfiles and the Kubernetes manifest: their schema, and whether what they name exists."""

from __future__ import annotations

import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from serve.__main__ import COMMANDS, HttpConfig
from serve.cli import _parser, build_config
from serve.http import App, Limits

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
IMAGES = ("cpu", "gpu")


def instructions(kind: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, lines joined and comments gone."""
    parser = pytest.importorskip("dockerfile_parse", reason="needs the package dockerfile-parse")
    text = (DEPLOY / f"Dockerfile.{kind}").read_bytes()
    file = parser.DockerfileParser(fileobj=io.BytesIO(text), env_replace=False)
    return [
        (item["instruction"], item["value"])
        for item in file.structure
        if item["instruction"] != "COMMENT"
    ]


def only(kind: str, name: str) -> str:
    (value,) = [value for instruction, value in instructions(kind) if instruction == name]
    return value


def served(argv: list[str]) -> HttpConfig:
    """The settings that `python -m serve ARGV` would run with; every flag has to exist."""
    given = vars(_parser("serve", "", COMMANDS).parse_args(argv))
    assert given.pop("command") == "http" and given.pop("config_file") is None
    return build_config(HttpConfig, given)


def routes() -> set[str]:
    from serve_fake import FakeClassifier

    return set(App(FakeClassifier(), Limits())._rest.openapi()["paths"])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_is_pinned_small_and_not_roots(kind: str) -> None:
    steps = instructions(kind)
    bases = [value for name, value in steps if name == "FROM"]
    assert bases == ["python:${PYTHON} AS build", "python:${PYTHON}"]  # what builds stays behind
    assert re.fullmatch(r"PYTHON=3\.\d+\.\d+-slim-\w+", only(kind, "ARG"))
    user = only(kind, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # runAsNonRoot needs a number
    names = [name for name, _ in steps]
    assert names.index("USER") < names.index("ENTRYPOINT")
    last = names.index("FROM", names.index("FROM") + 1)
    assert "RUN" not in names[last:]  # the final image installs nothing
    copies = [value for name, value in steps if name == "COPY"]
    assert copies == [
        "pyproject.toml README.md ./", "serve ./serve", "--from=build /srv/metapt /srv/metapt"
    ]  # fmt: skip
    for value in copies[:2]:
        for source in value.split()[:-1]:
            assert (ROOT / source).exists()


@pytest.mark.parametrize("kind", IMAGES)
def test_what_is_copied_is_not_ignored(kind: str) -> None:
    lines = (DEPLOY / f"Dockerfile.{kind}.dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == {
        "pyproject.toml", "README.md", "serve"
    }  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_installs_extras_that_exist_and_no_torch(kind: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runs = [value for name, value in instructions(kind) if name == "RUN"]
    extras = [re.search(r"\.\[(\w+)\]", value) for value in runs]
    assert [match[1] for match in extras if match] == ["http"]
    installed = [*project["dependencies"], *project["optional-dependencies"]["http"]]
    heavy = ("torch", "transformers", "onnx>", "scikit", "gradio", "ray")
    assert not [item for item in installed if item.startswith(heavy)]
    if kind == "gpu":
        gone = next(i for i, value in enumerate(runs) if "uninstall --yes onnxruntime" in value)
        came = next(i for i, value in enumerate(runs) if "onnxruntime-gpu[cuda,cudnn]" in value)
        assert gone < came


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_starts_a_command_that_exists(kind: str) -> None:
    assert json.loads(only(kind, "ENTRYPOINT")) == ["python", "-m", "serve"]
    config = served(json.loads(only(kind, "CMD")))
    assert config.host == "0.0.0.0" and str(config.port) == only(kind, "EXPOSE")
    folders = [value for name, value in instructions(kind) if name == "WORKDIR"]
    assert config.bundle == folders[-1] == "/bundle"
    check = only(kind, "HEALTHCHECK")
    code = json.loads(check[check.index("CMD") + 3 :])[2]
    compile(code, "health check", "exec")
    assert "ProxyHandler({})" in code  # Docker puts the client's proxies into a container
    (url,) = re.findall(r"http://127\.0\.0\.1:(\d+)(/[^']*)", code)
    assert url[0] == str(config.port) and url[1] in routes()


# ---- Kubernetes ----------------------------------------------------------------------------------


def manifest() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    return {document["kind"]: document for document in documents}


@pytest.mark.parametrize("version", ["1.26", "1.33"])
def test_the_manifest_obeys_kubernetes_schema(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    documents = manifest()
    assert set(documents) == {
        "Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"
    }  # fmt: skip
    for document in documents.values():
        validate.validate(document, version, strict=True)


def container() -> dict[str, Any]:
    (only_one,) = manifest()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only_one


def test_the_container_may_write_nowhere_and_become_nobody() -> None:
    pod = manifest()["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert str(pod["securityContext"]["runAsUser"]) == only("cpu", "USER").split(":")[0]
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all(mount["readOnly"] for mount in container()["volumeMounts"])
    assert {v["name"] for v in pod["volumes"]} == {
        mount["name"] for mount in container()["volumeMounts"]
    }


def test_the_container_starts_a_command_that_exists_and_ends_in_time() -> None:
    config = served(container()["args"])
    assert config.bundle in [mount["mountPath"] for mount in container()["volumeMounts"]]
    (port,) = container()["ports"]
    assert port["containerPort"] == config.port and config.host == "0.0.0.0"
    grace = manifest()["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > config.linger + config.drain
    ready = container()["readinessProbe"]
    assert config.linger > ready["periodSeconds"] * ready["failureThreshold"]


def test_probes_ask_routes_that_exist() -> None:
    paths = routes()
    wanted = {"startupProbe": "ready", "readinessProbe": "ready", "livenessProbe": "live"}
    for probe, end in wanted.items():
        get = container()[probe]["httpGet"]
        assert get == {"path": f"/v2/health/{end}", "port": "http"} and get["path"] in paths
    notes = manifest()["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert notes["prometheus.io/path"] in paths


def test_selectors_and_targets_meet() -> None:
    documents = manifest()
    deployment = documents["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    assert documents["Service"]["spec"]["selector"].items() <= labels
    assert documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    target = documents["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]  # or applying it again would undo the autoscaler
    # A pod may go for maintenance only because there is always another.
    assert documents["HorizontalPodAutoscaler"]["spec"]["minReplicas"] >= 2
