"""cluster/ holds what KubeRay, Ray and raycap's own parsers accept: fields, flags, images, sizes, secrets, the lock, commands."""

import json
import re
import runpy
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from raycap.config import TRAIN_PRESETS, CaptionBucketConfig, DemoConfig, EvaluateConfig, PrepareConfig, ServeConfig

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray Serve's own classes
ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
README = (CLUSTER / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE_JOBS = "/opt/raycap/jobs/"  # where cluster/Dockerfile puts jobs/
LOOPBACK = ("127.0.0.1", "localhost", "::1")
RAY_JOBS, RAY_SERVICE = ("rayjob-train.yaml", "rayjob-caption.yaml"), "rayservice.yaml"
PRESETS: dict[str, dict[str, Any]] = {
    "train_blip": TRAIN_PRESETS,
    "prepare_shards": {"coco": PrepareConfig()},
    "evaluate": {"evaluate": EvaluateConfig()},
    "caption_bucket": {"caption_bucket": CaptionBucketConfig()},
    "serve": {"serve": ServeConfig()},
    "demo": {"demo": DemoConfig()},
}

# Type: its fields; * stands behind those that must be there, and :Type where a field is looked into. KubeRay's types: its CRD API
# reference, ray.io/v1, KubeRay 1.7; Kubernetes' types: the fields of core/v1 that a Ray pod has a use for.
SCHEMA = """
RayJob: apiVersion* kind* metadata*:ObjectMeta spec*:RayJobSpec
RayService: apiVersion* kind* metadata*:ObjectMeta spec*:RayServiceSpec
ObjectMeta: name namespace labels annotations
RayJobSpec: entrypoint* runtimeEnvYAML jobId submissionMode entrypointNumCpus entrypointNumGpus entrypointResources
  shutdownAfterJobFinishes ttlSecondsAfterFinished activeDeadlineSeconds preRunningDeadlineSeconds backoffLimit suspend metadata
  clusterSelector submitterPodTemplate submitterConfig deletionStrategy managedBy rayClusterSpec*:RayClusterSpec
RayServiceSpec: serveConfigV2* upgradeStrategy serveService excludeHeadPodFromServeSvc rayClusterDeletionDelaySeconds suspend
  rayClusterConfig*:RayClusterSpec
RayClusterSpec: rayVersion* enableInTreeAutoscaling autoscalerOptions gcsFaultToleranceOptions tlsOptions networkPolicy
  historyServerOptions upgradeStrategy authOptions*:AuthOptions headGroupSpec*:HeadGroupSpec workerGroupSpecs*:WorkerGroupSpec
AuthOptions: mode* secretName enableK8sTokenAuth
HeadGroupSpec: rayStartParams* template*:PodTemplate headService serviceType enableIngress resources labels
WorkerGroupSpec: groupName* replicas* minReplicas* maxReplicas* idleTimeoutSeconds numOfHosts scaleStrategy rayStartParams*
  template*:PodTemplate resources labels suspend
PodTemplate: metadata:ObjectMeta spec*:PodSpec
PodSpec: containers*:Container initContainers:Container tolerations:Toleration nodeSelector affinity serviceAccountName
  imagePullSecrets volumes restartPolicy priorityClassName securityContext terminationGracePeriodSeconds
Toleration: key operator value effect tolerationSeconds
Container: name* image* imagePullPolicy command args workingDir env:EnvVar envFrom ports:ContainerPort resources*:Resources
  volumeMounts lifecycle securityContext livenessProbe readinessProbe startupProbe
ContainerPort: name containerPort* protocol
Resources: requests limits claims
EnvVar: name* value valueFrom:EnvVarSource
EnvVarSource: secretKeyRef:SecretKeyRef configMapKeyRef fieldRef resourceFieldRef
SecretKeyRef: name* key* optional
"""
TYPES = {
    line.partition(": ")[0]: dict(re.findall(r"([A-Za-z0-9]+\*?)(?::(\w+))?(?: |$)", line.partition(": ")[2]))
    for line in SCHEMA.replace("\n  ", " ").strip().splitlines()
}


def faults(value: Any, kind: str, where: str = "") -> list[str]:
    """What KubeRay's schema does not know or misses in `value`."""
    if isinstance(value, list):
        return [fault for n, item in enumerate(value) for fault in faults(item, kind, f"{where}[{n}]")]
    if not isinstance(value, dict):
        return [f"{where} is no {kind}"]
    fields = {name.rstrip("*"): below for name, below in TYPES[kind].items()}
    found = [f"{where}.{name} is unknown" for name in value if name not in fields]
    found += [
        f"{where}.{name[:-1]} is missing" for name in TYPES[kind] if name.endswith("*") and name[:-1] not in value
    ]
    for name, below in fields.items():
        if below and name in value:
            found += faults(value[name], below, f"{where}.{name}")
    return found


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return content


def cluster_spec(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    cluster: dict[str, Any] = spec["rayClusterConfig"] if name == RAY_SERVICE else spec["rayClusterSpec"]
    return cluster


def containers(name: str) -> list[dict[str, Any]]:
    """Those of the head first."""
    groups = [cluster_spec(name)["headGroupSpec"], *cluster_spec(name)["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def capacity(name: str, resource: str) -> int:
    """Of all workers together."""
    groups = cluster_spec(name)["workerGroupSpecs"]
    return sum(
        group["replicas"] * int(container["resources"]["limits"].get(resource, 0))
        for group in groups
        for container in group["template"]["spec"]["containers"]
    )


def serve_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(read(name)["spec"]["serveConfigV2"]) if name == RAY_SERVICE else read(name)
    return config


def parse_job(job_module: ModuleType, words: list[str]) -> Any:
    """The config of `... jobs/X.py --flags`, read by the job's own parser."""
    at = next(n for n, word in enumerate(words) if word.endswith(".py"))
    job = Path(words[at]).stem
    assert (ROOT / "jobs" / f"{job}.py").is_file()
    return job_module.parse(job, PRESETS[job], words[at + 1 :])


# KubeRay


@pytest.mark.parametrize("name", [*RAY_JOBS, RAY_SERVICE])
def test_kuberay_knows_every_field_and_misses_none(name: str) -> None:
    document = read(name)
    assert document["apiVersion"] == "ray.io/v1"
    assert document["kind"] == ("RayService" if name == RAY_SERVICE else "RayJob")
    assert faults(document, document["kind"]) == []


def test_a_misspelt_or_missing_field_is_found() -> None:
    document = read("rayjob-train.yaml")
    document["spec"]["backOffLimit"] = 1
    container = document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["environment"] = container.pop("env")
    del document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]
    assert sorted(faults(document, "RayJob")) == [
        ".spec.backOffLimit is unknown",
        ".spec.rayClusterSpec.headGroupSpec.template.spec.containers[0].environment is unknown",
        ".spec.rayClusterSpec.workerGroupSpecs[0].groupName is missing",
    ]


@pytest.mark.parametrize("name", RAY_JOBS)
def test_a_ray_job_retries_and_leaves_no_cluster_behind(name: str) -> None:
    spec = read(name)["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] >= 1
    assert spec["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize("name", [*RAY_JOBS, RAY_SERVICE])
def test_the_head_takes_no_work_and_the_cluster_asks_for_a_token(name: str) -> None:
    cluster = cluster_spec(name)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in containers(name)[0]["resources"]["limits"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for container in containers(name):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


@pytest.mark.parametrize("name", [*RAY_JOBS, RAY_SERVICE])
def test_every_ray_start_parameter_is_text(name: str) -> None:
    cluster = cluster_spec(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


# The commands in them


@pytest.mark.parametrize("name", RAY_JOBS)
def test_the_entrypoint_runs_a_job_of_the_image_with_flags_that_it_has(name: str, job_module: ModuleType) -> None:
    words = shlex.split(read(name)["spec"]["entrypoint"])
    assert words[0] == "python"
    assert words[1].startswith(IMAGE_JOBS)
    config = parse_job(job_module, words)
    for root in (*config.ROOTS, *(["checkpoint"] if hasattr(config, "checkpoint") else [])):
        assert getattr(config, root).startswith("s3://"), f"{root} must be on storage that every node sees"


def test_the_cluster_for_training_holds_what_the_command_asks_for(job_module: ModuleType) -> None:
    config = parse_job(job_module, shlex.split(read("rayjob-train.yaml")["spec"]["entrypoint"]))
    assert config.device == "cuda"
    assert capacity("rayjob-train.yaml", "nvidia.com/gpu") == config.num_workers
    assert capacity("rayjob-train.yaml", "cpu") >= config.num_workers * (config.cpus_per_worker + 1)


def test_the_cluster_for_captions_holds_what_the_command_asks_for(job_module: ModuleType) -> None:
    config = parse_job(job_module, shlex.split(read("rayjob-caption.yaml")["spec"]["entrypoint"]))
    assert config.device == "cuda"
    assert capacity("rayjob-caption.yaml", "nvidia.com/gpu") == config.concurrency * config.num_gpus
    assert capacity("rayjob-caption.yaml", "cpu") >= config.concurrency + config.cpus_for_data


# Serve


@pytest.mark.parametrize("name", ["serve.yaml", RAY_SERVICE])
def test_serve_accepts_the_config_and_the_application_its_arguments(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = serve_config(name)
    (application,) = ServeDeploySchema.model_validate(config).applications
    module, _, attribute = application.import_path.partition(":")
    assert callable(getattr(import_module(module), attribute))
    settings = ServeConfig(**application.args)
    assert settings.checkpoint.startswith("s3://")
    assert (settings.host, settings.port) == (config["http_options"]["host"], config["http_options"]["port"])


@pytest.mark.parametrize("name", ["serve.yaml", RAY_SERVICE])
def test_the_proxies_keep_the_limits_of_the_application_and_answer_after_it(name: str) -> None:
    from raycap.serving.app import limits_of
    from raycap.serving.door import front_environment
    from raycap.serving.run import SERVE_GRACE_S

    config = serve_config(name)
    settings = ServeConfig(**config["applications"][0]["args"])
    given, wanted = config["controller_options"]["runtime_env"]["env_vars"], front_environment(limits_of(settings), "")
    assert set(given) == set(wanted)
    for variable, value in wanted.items():
        if value.startswith("{"):
            limits = json.loads(value)
            del limits["digest"]  # the proxies take it from RAYCAP_TOKEN
            assert json.loads(given[variable]) == limits
        else:
            assert given[variable] == value
    assert config["http_options"]["request_timeout_s"] == settings.request_timeout_s + SERVE_GRACE_S


@pytest.mark.parametrize("name", ["serve.yaml", RAY_SERVICE])
def test_host_and_port_are_written_once(name: str) -> None:
    text = (CLUSTER / name).read_text()
    assert re.findall(r"^ *host: (\S+)", text, re.M) == ["&host", "*host"], "one edit reaches both"
    assert re.findall(r"^ *port: (\S+)", text, re.M) == ["&port", "*port"]


def test_every_pod_of_the_service_needs_the_bearer_token_and_the_gpus_suffice() -> None:
    settings = ServeConfig(**serve_config(RAY_SERVICE)["applications"][0]["args"])
    assert settings.host not in LOOPBACK
    for container in containers(RAY_SERVICE):
        env = {item["name"]: item for item in container["env"]}
        assert set(env["RAYCAP_TOKEN"]["valueFrom"]["secretKeyRef"]) == {"name", "key"}, (
            "an optional one can be missing"
        )
        assert {"name": "serve", "containerPort": settings.port} in container["ports"]
    assert settings.device == "cuda"
    assert capacity(RAY_SERVICE, "nvidia.com/gpu") == settings.num_replicas * settings.num_gpus
    captioners_of_a_pod = settings.num_replicas // cluster_spec(RAY_SERVICE)["workerGroupSpecs"][0]["replicas"]
    cpus = int(containers(RAY_SERVICE)[-1]["resources"]["limits"]["cpu"])
    assert cpus >= settings.decode_workers + captioners_of_a_pod  # one pod holds the HTTP replica too


# Secrets


@pytest.mark.parametrize("name", [*RAY_JOBS, RAY_SERVICE])
def test_credentials_come_from_secrets_that_must_exist(name: str) -> None:
    for container in containers(name):
        env = {item["name"]: item for item in container["env"]}
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(env)
        for variable, item in env.items():
            if re.search("TOKEN|SECRET|KEY|PASSWORD", variable):
                assert "value" not in item, f"{variable} is written out"
                assert item["valueFrom"]["secretKeyRef"]["key"] == variable
                assert set(item["valueFrom"]["secretKeyRef"]) == {"name", "key"}
                assert f"create secret generic {item['valueFrom']['secretKeyRef']['name']}" in README


@pytest.mark.parametrize("path", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_no_secret_is_written_out(path: Path) -> None:
    if path.is_file():
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}", text)
        assert not re.search(
            r"(?i)(token|secret|password|access_key)\w*[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+_-]{16,}", text
        )
        assert "kind: Secret" not in text


# The image


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, lines joined, comments gone."""
    lines = [line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def build_arguments() -> dict[str, str]:
    """Name -> default of the Dockerfile's build arguments."""
    return dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)


def copied() -> list[str]:
    """Sources of the Dockerfile's COPY lines, as paths in the repository."""
    lines = [shlex.split(rest) for word, rest in instructions() if word == "COPY"]
    return [source for words in lines for source in [w for w in words if not w.startswith("--")][:-1]]


def ray_range() -> Requirement:
    return next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray")


def test_the_dockerfile_builds_on_a_ray_that_pyproject_allows() -> None:
    assert {word for word, _ in instructions()} <= {"ARG", "FROM", "USER", "WORKDIR", "ENV", "COPY", "RUN"}
    (base,) = [rest for word, rest in instructions() if word == "FROM"]
    for name, value in build_arguments().items():
        base = base.replace(f"${{{name}}}", value)
    match = re.fullmatch(r"rayproject/ray:(\d+\.\d+\.\d+)-py(\d)(\d+)", base)
    assert match is not None, base
    assert match[1] in ray_range().specifier
    assert f"{match[2]}.{match[3]}" in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert ("ENV", "DS_BUILD_OPS=0") in instructions()


def test_the_image_runs_as_the_user_of_its_base() -> None:
    assert [rest for word, rest in instructions() if word == "USER"] == ["ray"]
    first = [word for word, _ in instructions()]
    assert first.index("USER") < min(first.index("COPY"), first.index("RUN"))


@pytest.mark.parametrize("rest", [rest for word, rest in instructions() if word == "RUN"])
def test_every_run_line_is_a_shell_command(rest: str) -> None:
    subprocess.run(["sh", "-n", "-c", re.sub(r"^(--\S+\s+)+", "", rest)], check=True)


def test_what_the_dockerfile_copies_exists_and_is_enough_to_install_raycap() -> None:
    assert all((ROOT / source).exists() for source in copied())
    needed = {"pyproject.toml", "raycap", "jobs", PROJECT["readme"], *PROJECT["license-files"]}
    assert needed <= set(copied())
    places = [shlex.split(rest)[-1] for word, rest in instructions() if word == "COPY"]
    assert IMAGE_JOBS.rstrip("/") in places


def ignored(path: str) -> bool:
    """Docker's rule: the last pattern that matches the path or a folder above it decides."""
    result = False
    folders = ["/".join(path.split("/")[: n + 1]) for n in range(path.count("/") + 1)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            names = [folder.rpartition("/")[2] if "**/" in line else folder for folder in folders]
            if any(fnmatchcase(name, pattern) for name in names):
                result = not line.startswith("!")
    return result


def test_the_build_context_holds_what_is_copied_and_nothing_big_or_private() -> None:
    assert not [source for source in copied() if ignored(source)]
    assert not ignored("raycap/training/driver.py")
    private = [
        ".git/config",
        ".venv/bin/python",
        "runs/demo/train.json",
        "tests/conftest.py",
        "raycap/__pycache__/x.pyc",
    ]
    assert [path for path in private if not ignored(path)] == []


@pytest.mark.parametrize("name", [*RAY_JOBS, RAY_SERVICE])
def test_every_image_has_the_ray_that_the_manifest_and_pyproject_name(name: str) -> None:
    for container in containers(name):
        match = re.fullmatch(r"[a-z-]+/raycap:(\d+\.\d+\.\d+)-ray(\d+\.\d+\.\d+)-gpu", container["image"])
        assert match is not None, container["image"]
        assert match[1] == PROJECT["version"]
        assert match[2] == cluster_spec(name)["rayVersion"] == build_arguments()["RAY_VERSION"]
        assert match[2] in ray_range().specifier


# The lock


def locked() -> dict[str, Version]:
    lines = [line for line in (CLUSTER / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*", line)] == []
    assert lines == sorted(set(lines), key=lambda line: line.partition("==")[0])
    return {name: Version(number) for name, _, number in (line.partition("==") for line in lines)}


def script() -> dict[str, Any]:
    return runpy.run_path(str(CLUSTER / "lock.py"))


def test_the_lock_holds_every_direct_dependency_in_its_range() -> None:
    direct = script()["direct"]()
    assert {r.name for r in map(Requirement, PROJECT["dependencies"])} <= {r.name for r in direct}
    pins = locked()
    for requirement in direct:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is missing: python cluster/lock.py > cluster/requirements.lock"
        assert pins[name] in requirement.specifier, f"{name} {pins[name]} is not in {requirement.specifier}"


def test_the_lock_holds_the_ray_of_the_image() -> None:
    assert str(locked()["ray"]) == build_arguments()["RAY_VERSION"]


def test_the_lock_is_closed_and_consistent() -> None:
    """Judged by the packages that are installed here in the locked version; make check installs newer ones as they appear."""
    module, pins, looked_at = script(), locked(), 0
    todo, seen = module["direct"](), set()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        name = key[0]
        assert name in pins, f"{name} is missing: python cluster/lock.py > cluster/requirements.lock"
        assert pins[name] in requirement.specifier or str(requirement.specifier) == "", (
            f"{name} {pins[name]}: {requirement}"
        )
        if Version(version(name)).public == str(pins[name]):
            looked_at += 1
            todo += module["needed_by"](requirement)
    assert looked_at, "nothing is installed in its locked version: python cluster/lock.py > cluster/requirements.lock"


def test_the_command_in_the_lock_makes_a_lock() -> None:
    text = script()["lock"]()
    assert "python cluster/lock.py > cluster/requirements.lock" in text
    made = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    assert set(made) >= {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    for name, number in made.items():
        try:
            assert Version(number) == Version(Version(version(name)).public)
        except PackageNotFoundError:
            pytest.fail(f"{name} is in the lock but not installed")


def test_the_runtime_environment_is_one_that_ray_accepts_and_ships_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.runtime_env import RuntimeEnv

    monkeypatch.chdir(ROOT)  # its paths count from where `ray job submit` runs
    content = read("runtime-env.yaml")
    env = RuntimeEnv(**content)
    assert [line for line in env["pip"]["packages"] if not line.startswith("#")] == [
        f"{n}=={v}" for n, v in locked().items()
    ]
    assert env["env_vars"]["DS_BUILD_OPS"] == "0"
    assert (ROOT / content["working_dir"] / "jobs" / "train_blip.py").is_file()


# The page for operators


def commands() -> Iterator[str]:
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip()
            if command:
                yield command


def parse_click(command: click.Command, words: list[str]) -> None:
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


@pytest.mark.parametrize("line", list(commands()))
def test_every_command_of_the_page_parses(line: str, job_module: ModuleType) -> None:
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    files = [word for word in words if re.match(r"(cluster|jobs)/\S+\.\w+$", word)]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    job = next((n for n, word in enumerate(words) if re.search(r"jobs/\w+\.py$", word)), None)
    if job is not None:
        parse_job(job_module, words[job:])
    match words:
        case ["docker", "build", *rest]:
            arguments = re.findall(r"--build-arg (\w+)=", line)
            assert set(arguments) <= set(build_arguments())
            assert rest[rest.index("-f") + 1] == "cluster/Dockerfile"
        case ["ray", *rest]:
            from ray.scripts.scripts import cli

            parse_click(cli, rest)
        case ["serve", *rest]:
            from ray.serve.scripts import cli as serve_cli

            parse_click(serve_cli, rest)
        case ["python", *_] | ["export", *_] | ["docker", "push", _]:
            pass
        case ["kubectl", verb, *_]:
            assert verb in {"create", "apply", "get", "logs", "port-forward", "delete", "describe"}
        case ["curl", *rest]:
            assert any(word.endswith("/v1/caption") for word in rest)
        case _:
            assert not words, f"the test does not know how to check {line!r}"


def test_the_page_names_every_file_once_in_its_table_and_only_files_that_exist() -> None:
    rows = re.findall(r"^\| \[`([^`]+)`\]\(([^)]+)\) \|", README, re.M)
    assert sorted(name for name, _ in rows) == sorted(
        path.name for path in CLUSTER.iterdir() if path.is_file() and path.name != "README.md"
    )
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (CLUSTER / target).is_file(), target
    for target in re.findall(r"`((?:cluster|jobs)/[\w.-]+)`", README):
        assert (ROOT / target).is_file(), target


def test_the_names_in_the_page_are_those_of_the_manifests() -> None:
    for name in (*RAY_JOBS, RAY_SERVICE):
        document = read(name)
        assert f"{document['kind'].lower()} {document['metadata']['name']}" in README
    assert IMAGE_JOBS in README
