"""The manifests: valid for Kubernetes (kubernetes-validate brings its schemas), and what they start is one gang."""

import json
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
KINDS = ("statefulset", "leaderworkerset")
VERSIONS = ("1.28", kubernetes_validate.latest_version())  # pods know their ordinal since 1.28
Object = dict[str, Any]


def objects(kind: str) -> list[Object]:
    """What `kubectl apply -k` would send, images and all untouched."""
    folder = IMAGE / "k8s" / kind
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert set(listed) == {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    return [made for name in listed for made in yaml.safe_load_all((folder / name).read_text())]


def one(kind: str, wanted: str) -> Object:
    return next(made for made in objects(kind) if made["kind"] == wanted)


def template(kind: str) -> Object:
    if kind == "statefulset":
        return one(kind, "StatefulSet")["spec"]["template"]  # type: ignore[no-any-return]
    return one(kind, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["workerTemplate"]  # type: ignore[no-any-return]


def serving(kind: str) -> Object:
    [container] = template(kind)["spec"]["containers"]
    return container  # type: ignore[no-any-return]


def of_kubernetes(kind: str) -> Iterator[Object]:
    """Its own kinds; of the LeaderWorkerSet, which is not one, the template of its pods."""
    for made in objects(kind):
        if made["kind"] == "LeaderWorkerSet":
            made = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template(kind)}
        yield made


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_kubernetes_takes_them(kind: str, version: str) -> None:
    for made in of_kubernetes(kind):
        kubernetes_validate.validate(made, version, strict=True)


def test_the_validator_bites() -> None:
    broken = template("statefulset")
    broken["spec"]["containers"][0]["readynessProbe"] = {}
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": broken}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)


def test_the_leader_worker_set_has_only_fields_of_its_own() -> None:
    """leaderworkerset.x-k8s.io/v1, as far as it is used."""
    spec = one("leaderworkerset", "LeaderWorkerSet")["spec"]
    assert set(spec) == {"replicas", "startupPolicy", "leaderWorkerTemplate"}
    assert set(spec["leaderWorkerTemplate"]) == {"size", "restartPolicy", "workerTemplate"}
    assert spec["leaderWorkerTemplate"]["restartPolicy"] == "None"
    assert spec["startupPolicy"] == "LeaderCreated"


def environment(kind: str, index: int, file: Path) -> dict[str, str]:
    """What the container of the pod with this index is given, as kubelet and controller fill it in."""
    found = {}
    for entry in serving(kind)["env"]:
        if "value" in entry:
            found[entry["name"]] = entry["value"].replace("$(LWS_LEADER_ADDRESS)", "rtp-llm-0.rtp-llm")
        elif "fieldRef" in entry["valueFrom"]:
            assert entry["name"] == "WORLD_INDEX"
            found["WORLD_INDEX"] = str(index)
    return found | ({"DISTRIBUTE_CONFIG_FILE": str(file)} if "DISTRIBUTE_CONFIG_FILE" in found else {})


def gang_file(kind: str, folder: Path) -> Path:
    """By the init container's own command."""
    file = folder / "gang.json"
    if kind == "statefulset":
        [init] = template(kind)["spec"]["initContainers"]
        program, path, *arguments = init["command"]
        assert (program, path) == ("make-gang", dict_of(serving(kind))["DISTRIBUTE_CONFIG_FILE"])
        wait = arguments.index("--wait")  # for names that only a cluster has
        command = [sys.executable, str(IMAGE / program), str(file), *arguments[:wait], *arguments[wait + 2 :]]
        subprocess.run(command, check=True)
    return file


def dict_of(container: Object) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def size(kind: str) -> int:
    spec = one(kind, "StatefulSet" if kind == "statefulset" else "LeaderWorkerSet")["spec"]
    return int(spec["replicas"] if kind == "statefulset" else spec["leaderWorkerTemplate"]["size"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_pod_finds_its_place_in_one_plan(kind: str, tmp_path: Path) -> None:
    file, gpus = gang_file(kind, tmp_path), int(serving(kind)["resources"]["limits"]["nvidia.com/gpu"])
    plans: list[Plan] = []
    for index in range(size(kind)):
        loaded = load([], environment(kind, index, file))
        assert not loaded.warnings
        plans.append(make_plan(loaded.config, gpus))
    assert [rank for plan in plans for rank in plan.ranks] == list(range(plans[0].world_size))
    assert {plan.device for plan in plans} == {"cuda"}
    assert len({json.dumps(plan.fingerprint(), sort_keys=True) for plan in plans}) == 1


def test_the_distribute_file_names_the_pods_of_the_headless_service(tmp_path: Path) -> None:
    members = json.loads(gang_file("statefulset", tmp_path).read_text())
    made = one("statefulset", "StatefulSet")
    name, domain = made["metadata"]["name"], made["spec"]["serviceName"]
    assert [m["ip"] for m in members.values()] == [f"{name}-{n}.{domain}" for n in range(made["spec"]["replicas"])]
    headless = next(o for o in objects("statefulset") if o["metadata"]["name"] == domain)
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["publishNotReadyAddresses"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_the_pods_are_as_the_doctor_wants_them(kind: str) -> None:
    spec, container = template(kind)["spec"], serving(kind)
    assert spec["enableServiceLinks"] is False  # N-15
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}  # S-01
    assert "emptyDir" in mounts["/tmp"]  # L-11, with a read-only root
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert spec["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_probes_and_grace_outlast_loading_and_draining(kind: str) -> None:
    spec, container = template(kind)["spec"], serving(kind)
    startup, ready, live = (container[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
    assert (ready["httpGet"]["path"], live["httpGet"]["path"]) == ("/health", "/liveness")
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = Config.model_validate({}).drain_seconds + DRAIN_MARGIN_SECONDS + RANK_STOP_SECONDS
    assert spec["terminationGracePeriodSeconds"] > pause + drain


@pytest.mark.parametrize("kind", KINDS)
def test_only_http_is_open_to_others(kind: str) -> None:
    spec = one(kind, "NetworkPolicy")["spec"]
    labels = template(kind)["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"] == labels
    within, without = spec["ingress"]
    assert within == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert without == {"ports": [{"protocol": "TCP", "port": Config.model_validate({}).start_port}]}


@pytest.mark.parametrize("kind", KINDS)
def test_selectors_find_the_pods(kind: str) -> None:
    labels = template(kind)["metadata"]["labels"]
    for made in objects(kind):
        selector = made["spec"].get("selector")
        if selector:
            assert labels.items() <= selector.get("matchLabels", selector).items()
    assert one(kind, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 0
