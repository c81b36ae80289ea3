"""OpenPAI's jobs as documents: the seed's examples, and one job that holds everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from oasis_flows import catalogue, item, openpai
from oasis_flows.errors import InvalidDocument
from oasis_flows.prerequisites import Found, resolve

HERE = Path(__file__).parents[1] / "openpai"
SCRIPT = 'exec "$(command -v bash || command -v sh)" -c "$0"'


def imported(name: str) -> openpai.Import:
    return openpai.documents_of(item.loaded((HERE / "jobs" / f"{name}.yaml").read_text()), name)


def find(uri: str) -> Found:
    name = uri.removeprefix("marketplace://name/")
    return Found(item.parse(item.read((HERE / "marketplace" / f"{name}.yaml").read_text())), uri, "")


@pytest.mark.parametrize(
    ("name", "steps"),
    [("mnist", ["install_wget", "mnist"]), ("imagenet", ["confignfs_pvc", "imagenet"]), ("debug_hook", ["debug_hook"])],
)
def test_the_seeds_jobs_become_documents_that_resolve(name, steps, tmp_path):
    made = imported(name)
    own = name.replace("_", "-")
    algorithm = made.documents[f"algorithm/{own}"]

    assert made.documents[f"docker-image/{own}-docker-image-0"] == {"image_id": "openpai/standard:python_3.6-pytorch_1.2.0-gpu"}
    assert algorithm["command"] == ["/bin/sh", "-c", SCRIPT, "sleep 0s"]
    assert (algorithm["gpu"], algorithm["gpu_count"], algorithm["cpus"], algorithm["memory"]) == (True, 1, 3, "29065MiB")
    wishes = item.requirements(algorithm["prerequisites"], "prerequisites")
    found = resolve(own, wishes, find, working_dir="/work", network=algorithm["network"])
    assert [step.item.name for step in found.steps] == steps
    assert sorted(str(path.relative_to(tmp_path)) for path in catalogue.write(made.documents, tmp_path)) == [
        f"algorithm/{own}.yaml",
        f"docker-image/{own}-docker-image-0.yaml",
    ]
    assert {document.key for document in catalogue.read(tmp_path)} == set(made.documents)


def test_a_job_that_holds_everything_is_carried_over_and_what_cannot_be_is_said(tmp_path):
    made = imported("everything")
    documents = made.documents
    worker = documents["algorithm/cifar-10-worker"]

    assert sorted(documents) == [
        "algorithm/cifar-10-ps",
        "algorithm/cifar-10-worker",
        "docker-image/cifar-10-tf",
        "prerequisite/cifar-10-covid-19-data",
        "prerequisite/cifar-10-install-git",
        "prerequisite/cifar-10-plugin-0",
        "prerequisite/cifar-10-storages",
    ]
    assert worker["command"][-1] == (
        "echo pre\npython train.py --model resnet --batch 32\n"
        'curl https://example.org/cifar-10.tar.gz -H "$PAI_SECRET_token"\necho post'
    )
    assert worker["secret_environment"] == {"PAI_SECRET_token": "cifar-10-token"}
    assert (worker["shm_size"], worker["gpu"]) == ("64MiB", False)
    assert worker["prerequisites"] == ["cifar-10-storages", "cifar-10-covid-19-data", "cifar-10-plugin-0"]
    assert documents["prerequisite/cifar-10-covid-19-data"]["require"] == ["cifar-10-install-git"]
    assert documents["prerequisite/cifar-10-storages"]["requireStorages"] == [
        {"name": "confignfs", "mountPath": "/mnt/confignfs", "readOnly": False},
        {"name": "blob", "mountPath": "/data", "readOnly": False},
    ]
    assert documents["prerequisite/cifar-10-plugin-0"]["plugin_params"]["callbacks"] == [
        {"event": "taskStarts", "commands": ["echo before"]},
        {"event": "taskSucceeds", "commands": ["echo after"]},
    ]
    assert list(catalogue.write(documents, tmp_path))
    said = "\n".join(made.left_out)
    wanted = (
        "2 instances",
        "ports",
        "infiniband",
        "taskRetryCount",
        "jobRetryCount",
        "vc1",
        "hivedScheduler",
        "ssh",
        "login",
        "2 roles",
    )
    assert [word for word in (*wanted, "Secret block named cifar-10-token") if word not in said] == []
    assert "abc" not in str(documents)


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({}, "has no taskRoles"),
        ({"taskRoles": {"a": {"dockerImage": "x"}}}, "names the docker image 'x', which the job's prerequisites do not have"),
        ({"taskRoles": ["a"]}, "must hold fields"),
        (
            {
                "prerequisites": [{"name": "x", "type": "dockerimage", "uri": "a:1"}],
                "taskRoles": {"a": {"dockerImage": "x", "prerequisites": ["nothing"]}},
            },
            "The prerequisite 'nothing' of the role a is neither in",
        ),
        (
            {
                "prerequisites": [{"name": "x", "type": "dockerimage", "uri": "a:1"}],
                "taskRoles": {"a": {"dockerImage": "x", "commands": ["echo <% $parameters.y %>"]}},
            },
            "refers to what the job does not have",
        ),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(job, said):
    with pytest.raises(InvalidDocument) as refused:
        openpai.documents_of(job, "job")
    assert said in str(refused.value)


def test_an_import_replaces_no_other_document(tmp_path):
    documents = imported("mnist").documents
    list(catalogue.write(documents, tmp_path))
    assert len(list(catalogue.write(documents, tmp_path))) == 2
    (tmp_path / "algorithm" / "mnist.yaml").write_text("mine")

    with pytest.raises(InvalidDocument, match="There is already another"):
        list(catalogue.write(documents, tmp_path))
    assert (tmp_path / "algorithm" / "mnist.yaml").read_text() == "mine"
