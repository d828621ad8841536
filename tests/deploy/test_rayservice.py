import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.serve.schema import ServeDeploySchema

from forkkv_cluster import __version__
from forkkv_cluster.app import resolve_config
from forkkv_cluster.core.config import parse_config

SCHEMA = Path(__file__).resolve().parents[3] / "shared" / "data" / "kuberay" / "rayservice-v1.schema.json"


@pytest.fixture(scope="module")
def manifest(deploy_dir: Path) -> dict[str, Any]:
    return yaml.safe_load((deploy_dir / "kuberay" / "rayservice.yaml").read_text())


@pytest.fixture(scope="module")
def serve_config(manifest: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(manifest["spec"]["serveConfigV2"])


def pod_of(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterConfig"]
    return [pod_of(cluster["headGroupSpec"]), *(pod_of(group) for group in cluster["workerGroupSpecs"])]


def ports_of(pod: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}


def as_json_schema(node: Any) -> Any:
    """Kubernetes' structural OpenAPI as JSON schema: nullable, int-or-string, and no field that it does not know."""
    if isinstance(node, list):
        return [as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: as_json_schema(value) for key, value in node.items() if not key.startswith("x-kubernetes-")}
    if node.get("x-kubernetes-int-or-string") is True:
        return {"type": ["integer", "string"]}
    if node.get("nullable") is True and isinstance(node.get("type"), str):
        result["type"] = [node["type"], "null"]
    is_object = node.get("type") == "object" and isinstance(node.get("properties"), dict)
    if is_object and not node.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


@pytest.mark.skipif(not SCHEMA.is_file(), reason="the RayService schema is not at hand (../shared/data/kuberay)")
def test_the_manifest_fits_the_schema_of_rayservice(manifest: dict[str, Any]):
    schema = as_json_schema(json.loads(SCHEMA.read_text()))
    schema["properties"]["metadata"] = {"type": "object"}  # Left to the API server in a structural schema.
    errors = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(manifest)]
    assert errors == []


@pytest.mark.skipif(not SCHEMA.is_file(), reason="the RayService schema is not at hand (../shared/data/kuberay)")
def test_a_slip_of_the_pen_does_not_fit_the_schema(manifest: dict[str, Any]):
    schema = as_json_schema(json.loads(SCHEMA.read_text()))
    wrong = json.loads(json.dumps(manifest))
    wrong["spec"]["rayClusterConfig"]["autoscalerOptions"]["version"] = "v3"
    wrong["spec"]["rayClusterConfig"]["headGroup"] = {}
    assert len(list(Draft202012Validator(schema["properties"]["spec"]).iter_errors(wrong["spec"]))) == 2


def test_the_containers_name_their_ports_as_the_operator_looks_for_them(manifest: dict[str, Any]):
    head, worker = (ports_of(pod) for pod in pods(manifest))
    assert head == {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "serve": 8000, "serve-grpc": 9000}
    assert worker == {"serve": 8000, "serve-grpc": 9000, "metrics": 8080}


def test_the_ports_are_those_of_the_serve_config(manifest: dict[str, Any], serve_config: dict[str, Any]):
    for pod in pods(manifest):
        assert ports_of(pod)["serve"] == serve_config["http_options"]["port"]
        assert ports_of(pod)["serve-grpc"] == serve_config["grpc_options"]["port"]


def test_the_head_runs_no_replicas_gets_no_requests_and_survives_its_death(manifest: dict[str, Any]):
    spec = manifest["spec"]
    assert spec["excludeHeadPodFromServeSvc"] is True
    assert spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"] == "forkkv-redis:6379"


def test_the_redis_that_it_names_is_there(manifest: dict[str, Any], serve_config: dict[str, Any], deploy_dir: Path):
    documents = list(yaml.safe_load_all((deploy_dir / "kuberay" / "redis.yaml").read_text()))
    service = next(document for document in documents if document["kind"] == "Service")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert manifest["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"] == address
    assert serve_config["applications"][0]["args"]["gateway"]["session_store"] == f"redis://{address}/1"


def test_a_pod_has_time_to_drain_and_memory_for_the_object_store(manifest: dict[str, Any]):
    for pod in pods(manifest):
        stop = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        drain_s = int(stop.split(";")[0].removeprefix("sleep ")) if stop.startswith("sleep ") else 0
        assert pod["terminationGracePeriodSeconds"] >= drain_s + 30
        assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"
        assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/dev/shm"


def test_every_container_runs_the_image_that_the_dockerfile_builds(manifest: dict[str, Any], deploy_dir: Path):
    image = f"forkkv-cluster:{__version__}"
    assert {pod["containers"][0]["image"] for pod in pods(manifest)} == {image}
    assert f"-t {image} " in (deploy_dir / "Dockerfile").read_text()


def test_serve_reads_its_config_and_its_arguments_are_a_configuration(serve_config: dict[str, Any]):
    ServeDeploySchema.model_validate(serve_config)
    config = parse_config(serve_config["applications"][0]["args"])
    assert (config.server.http_port, config.server.grpc_port, config.server.host) == (8000, 9000, "0.0.0.0")


def test_the_workers_pods_hold_the_replicas_that_the_configuration_asks_for(
    manifest: dict[str, Any], serve_config: dict[str, Any]
):
    config = parse_config(serve_config["applications"][0]["args"])
    group = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    cpus = group["replicas"] * float(pod_of(group)["containers"][0]["resources"]["limits"]["cpu"])
    needed = config.worker.num_replicas * config.worker.num_cpus + config.gateway.num_replicas * config.gateway.num_cpus
    assert needed <= cpus


def test_without_a_model_it_serves_the_one_that_the_image_installs_with_the_package(
    serve_config: dict[str, Any], deploy_dir: Path
):
    args = serve_config["applications"][0]["args"]
    assert not {"model", "adapters"} & set(args)
    config = resolve_config(parse_config(args))
    package = deploy_dir.parent / "forkkv_cluster"
    assert all(Path(each.path).is_relative_to(package) for each in (config.model, *config.adapters))
    dockerfile = (deploy_dir / "Dockerfile").read_text()
    assert dockerfile.index("COPY forkkv_cluster forkkv_cluster") < dockerfile.index("constraints.txt .\n")
