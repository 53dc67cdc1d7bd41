"""Deploying the server: valid manifests, not root, and a dashboard of metrics that exist."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = [
    manifest
    for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text("utf-8"))
]
[DEPLOYMENT] = [m for m in MANIFESTS if m["kind"] == "Deployment" and "selector" in m["spec"]]


def load(place: Path) -> Any:
    spec = importlib.util.spec_from_file_location(place.stem, place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def merged(base: Any, change: Any) -> Any:
    """Strategic merge of a patch, as kustomize does it: tables by key, lists of tables by name."""
    if isinstance(base, dict) and isinstance(change, dict):
        return base | {key: merged(base.get(key), value) for key, value in change.items()}
    if isinstance(base, list) and all(isinstance(item, dict) and "name" in item for item in change):
        by_name = {item["name"]: item for item in change}
        return [merged(item, by_name.get(item["name"], {})) for item in base]
    return change


def test_manifests_satisfy_the_schemas_of_kubernetes():
    validate = pytest.importorskip("kubernetes_validate")
    patched = merged(DEPLOYMENT, yaml.safe_load((DEPLOY / "kubernetes/gpu/gpu.yaml").read_text()))
    whole = [m for m in MANIFESTS if m["kind"] not in ("Kustomization", "Deployment")]
    for manifest in [*whole, DEPLOYMENT, patched]:
        validate.validate(manifest, "1.37", strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate(merged(DEPLOYMENT, {"spec": {"replica": 2}}), "1.37", strict=True)
    limits = patched["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"


def test_parts_of_the_manifests_fit_together():
    pod = DEPLOYMENT["spec"]["template"]
    [container] = pod["spec"]["containers"]
    names = {claim["metadata"]["name"] for claim in MANIFESTS if claim["kind"].endswith("Claim")}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    claims = {v["persistentVolumeClaim"]["claimName"] for n, v in volumes.items() if n != "tmp"}
    assert claims == names and {m["name"] for m in container["volumeMounts"]} == volumes.keys()
    [service] = [m for m in MANIFESTS if m["kind"] == "Service"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    for place in (DEPLOY / "kubernetes").rglob("kustomization.yaml"):
        content = yaml.safe_load(place.read_text())
        files = [*content["resources"], *(patch["path"] for patch in content.get("patches", ()))]
        assert all((place.parent / name).exists() for name in files)


def test_nothing_runs_as_root_or_writes_to_its_root():
    user = re.findall(r"^USER (\d+)$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    pod = DEPLOYMENT["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert user == [str(pod["securityContext"]["runAsUser"])]
    security = pod["containers"][0]["securityContext"]
    assert security["readOnlyRootFilesystem"] and security["capabilities"] == {"drop": ["ALL"]}
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["opennemo"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    gpu = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]["opennemo"]
    assert gpu.keys() <= {"build", "tmpfs", "deploy"}


def test_what_is_copied_into_the_image_is_there_and_sent_to_the_builder():
    sent = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    for names in re.findall(r"^COPY (?!--from)(.*)$", (DEPLOY / "Containerfile").read_text(), re.M):
        for name in names.split()[:-1]:
            assert (ROOT / name).exists() and f"!{name}" in sent


def test_probes_are_routes_without_a_key():
    pytest.importorskip("fastapi", reason="needs the extra serve")
    from opennemo.serve.protocols.nim import OPEN

    text = (DEPLOY / "Containerfile").read_text()
    [container] = DEPLOYMENT["spec"]["template"]["spec"]["containers"]
    probes = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("readiness", "liveness")}
    assert probes | set(re.findall(r"127\.0\.0\.1:8000([/\w]+)", text)) <= set(OPEN)


def test_the_dashboard_shows_every_metric_and_no_other():
    pytest.importorskip("prometheus_client", reason="needs the extra serve")
    pytest.importorskip("pydantic_settings", reason="needs the extra serve")
    dashboard = load(DEPLOY / "dashboard.py").render()
    queries = " ".join(t["expr"] for panel in dashboard["panels"] for t in panel["targets"])
    shown = set(re.findall(r"opennemo_\w+", queries))
    suffixes = {"counter": "_total", "histogram": "_bucket", "gauge": ""}
    families = load(ROOT / "docs/reference.py").every_metric()
    assert shown == {metric.name + suffixes[metric.type] for metric in families}
    labels = {"finished_reason", "status", "le"}
    assert set(re.findall(r"by \((\w+)\)", queries)) == labels
    json.dumps(dashboard)
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
