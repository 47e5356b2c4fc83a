"""Tests of the manifests: they match the schemas of kubernetes-validate, and their pods form one gang."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from rtp_llm.config import Config, load
from rtp_llm.parallel.plan import Plan, make_plan
from rtp_llm.supervise.supervisord import DRAIN_MARGIN_SECONDS, RANK_STOP_SECONDS

IMAGE = Path(__file__).parents[2] / "image"
VARIANTS = ("statefulset", "leaderworkerset")  # folders of image/k8s
VERSIONS = ("1.28", kubernetes_validate.latest_version())  # 1.28 introduced the label pod-index
Object = dict[str, Any]


def load_objects(variant: str) -> list[Object]:
    """Returns the objects that `kubectl apply -k` would send, before the image names are replaced."""
    folder = IMAGE / "k8s" / variant
    resources = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert set(resources) == {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    return [manifest for name in resources for manifest in yaml.safe_load_all((folder / name).read_text())]


def load_object(variant: str, kind: str) -> Object:
    return next(manifest for manifest in load_objects(variant) if manifest["kind"] == kind)


def pod_template(variant: str) -> Object:
    if variant == "statefulset":
        return load_object(variant, "StatefulSet")["spec"]["template"]  # type: ignore[no-any-return]
    spec = load_object(variant, "LeaderWorkerSet")["spec"]
    return spec["leaderWorkerTemplate"]["workerTemplate"]  # type: ignore[no-any-return]


def server_container(variant: str) -> Object:
    [container] = pod_template(variant)["spec"]["containers"]
    return container  # type: ignore[no-any-return]


def built_in_objects(variant: str) -> Iterator[Object]:
    """Yields the objects of Kubernetes' own kinds. Replaces the LeaderWorkerSet by its pod template."""
    for manifest in load_objects(variant):
        if manifest["kind"] == "LeaderWorkerSet":
            template = pod_template(variant)
            manifest = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        yield manifest


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_manifests_match_the_kubernetes_schemas(variant: str, version: str) -> None:
    for manifest in built_in_objects(variant):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_every_part_of_the_compose_file_keeps_downloads_in_a_volume() -> None:
    [home] = re.findall(r"HF_HOME=(\S+)", (IMAGE / "Dockerfile").read_text())
    compose = yaml.safe_load((IMAGE.parent / "docker-compose.yml").read_text())
    parts = [service for service in compose["services"].values() if "CHECKPOINT_PATH" in service.get("environment", {})]
    assert len(parts) == 4
    for part in parts:
        assert f"${{HUB_DIR:-hub}}:{home}" in part["volumes"]
        assert part["environment"]["HF_TOKEN"] is None, "passed on, but no empty value where it is unset"
    assert "hub" in compose["volumes"]


def test_validator_rejects_an_unknown_field() -> None:
    template = pod_template("statefulset")
    template["spec"]["containers"][0]["readynessProbe"] = {}
    manifest = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


def test_leader_worker_set_has_only_known_fields() -> None:
    """Compares with the fields of leaderworkerset.x-k8s.io/v1 that the manifest uses."""
    spec = load_object("leaderworkerset", "LeaderWorkerSet")["spec"]
    assert set(spec) == {"replicas", "startupPolicy", "leaderWorkerTemplate"}
    assert set(spec["leaderWorkerTemplate"]) == {"size", "restartPolicy", "workerTemplate"}
    assert spec["leaderWorkerTemplate"]["restartPolicy"] == "None"
    assert spec["startupPolicy"] == "LeaderCreated"


def pod_environment(variant: str, index: int, file: Path) -> dict[str, str]:
    """Returns the environment of the pod with this index, with the values of kubelet and controller filled in."""
    env = {}
    for entry in server_container(variant)["env"]:
        if "value" in entry:
            env[entry["name"]] = entry["value"].replace("$(LWS_LEADER_ADDRESS)", "rtp-llm-0.rtp-llm")
        elif "fieldRef" in entry["valueFrom"]:
            assert entry["name"] == "WORLD_INDEX"
            env["WORLD_INDEX"] = str(index)
    return env | ({"DISTRIBUTE_CONFIG_FILE": str(file)} if "DISTRIBUTE_CONFIG_FILE" in env else {})


def write_distribute_file(variant: str, folder: Path) -> Path:
    """Returns the path of the distribute file (member list of the gang), which the init container's command writes
    here.

    Leaves out the command's wait for DNS. Writes nothing for the LeaderWorkerSet, which has no such file.
    """
    file = folder / "gang.json"
    if variant == "statefulset":
        [init] = pod_template(variant)["spec"]["initContainers"]
        program, path, *arguments = init["command"]
        assert (program, path) == ("make-gang", env_values(server_container(variant))["DISTRIBUTE_CONFIG_FILE"])
        wait = arguments.index("--wait")  # for host names that exist only in a cluster
        command = [sys.executable, str(IMAGE / program), str(file), *arguments[:wait], *arguments[wait + 2 :]]
        subprocess.run(command, check=True)
    return file


def env_values(container: Object) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def num_pods(variant: str) -> int:
    spec = load_object(variant, "StatefulSet" if variant == "statefulset" else "LeaderWorkerSet")["spec"]
    return int(spec["replicas"] if variant == "statefulset" else spec["leaderWorkerTemplate"]["size"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_pods_get_the_same_plan(variant: str, tmp_path: Path) -> None:
    file = write_distribute_file(variant, tmp_path)
    gpus = int(server_container(variant)["resources"]["limits"]["nvidia.com/gpu"])
    plans: list[Plan] = []
    for index in range(num_pods(variant)):
        loaded = load([], pod_environment(variant, index, file))
        assert not loaded.warnings
        plans.append(make_plan(loaded.config, gpus))
    assert [rank for plan in plans for rank in plan.ranks] == list(range(plans[0].world_size))
    assert {plan.device for plan in plans} == {"cuda"}
    assert len({json.dumps(plan.fingerprint(), sort_keys=True) for plan in plans}) == 1


def test_distribute_file_has_the_pod_names_of_the_headless_service(tmp_path: Path) -> None:
    members = json.loads(write_distribute_file("statefulset", tmp_path).read_text())
    stateful_set = load_object("statefulset", "StatefulSet")
    name, domain = stateful_set["metadata"]["name"], stateful_set["spec"]["serviceName"]
    replicas = stateful_set["spec"]["replicas"]
    assert [m["ip"] for m in members.values()] == [f"{name}-{n}.{domain}" for n in range(replicas)]
    headless = next(o for o in load_objects("statefulset") if o["metadata"]["name"] == domain)
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["publishNotReadyAddresses"] is True


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_meet_the_requirements_of_the_doctor(variant: str) -> None:
    spec, container = pod_template(variant)["spec"], server_container(variant)
    assert spec["enableServiceLinks"] is False  # N-15
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}  # S-01
    assert "emptyDir" in mounts["/tmp"]  # L-11, with a read-only root
    assert mounts[env_values(container)["HF_HOME"]]["name"] == "hub"  # M-20
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert spec["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("variant", VARIANTS)
def test_probes_and_grace_period_outlast_loading_and_draining(variant: str) -> None:
    spec, container = pod_template(variant)["spec"], server_container(variant)
    startup, readiness, liveness = (container[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
    assert (readiness["httpGet"]["path"], liveness["httpGet"]["path"]) == ("/health", "/liveness")
    pre_stop_seconds = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_seconds = Config.model_validate({}).drain_seconds + DRAIN_MARGIN_SECONDS + RANK_STOP_SECONDS
    assert spec["terminationGracePeriodSeconds"] > pre_stop_seconds + drain_seconds


@pytest.mark.parametrize("variant", VARIANTS)
def test_network_policy_opens_only_http_to_others(variant: str) -> None:
    spec = load_object(variant, "NetworkPolicy")["spec"]
    labels = pod_template(variant)["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"] == labels
    from_gang, from_all = spec["ingress"]
    assert from_gang == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert from_all == {"ports": [{"protocol": "TCP", "port": Config.model_validate({}).start_port}]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_selectors_match_the_pods(variant: str) -> None:
    labels = pod_template(variant)["metadata"]["labels"]
    for manifest in load_objects(variant):
        selector = manifest["spec"].get("selector")
        if selector:
            assert labels.items() <= selector.get("matchLabels", selector).items()
    assert load_object(variant, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 0
