"""An OpenPAI job (protocol 2) as documents of a catalogue; pure.

What its runtime did is done here once: `<% $parameters.x %>` and its like are replaced, commands of the deployment go around those of
the role. What has no counterpart here is said, and left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import InvalidDocument
from .item import document_name

_PLUGINS = "com.microsoft.pai.runtimeplugin"
_TAG = re.compile(r"<%\s*\$(parameters|secrets|data|script|output)\.([\w-]+)((?:\[\d+\]|\.\w+)*)\s*%>")
# OpenPAI runs commands by bash; a small image may have no other than sh.
_SHELL = ["/bin/sh", "-c", 'exec "$(command -v bash || command -v sh)" -c "$0"']


@dataclass(slots=True)
class Import:
    """What a job becomes: the fields of documents by `type/name`, and what could not be carried, in sentences."""

    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def documents_of(job: Mapping[str, Any], name: str) -> Import:
    """The documents that a job means; `name` is its name where it has none.

    Raises:
        InvalidDocument: it is no job, or refers to what is not in it.
    """
    job_name = document_name(str(job.get("name") or name))
    roles = _mapping(job.get("taskRoles") or {}, "taskRoles")
    if not roles:
        raise InvalidDocument("The file holds no OpenPAI job: it has no taskRoles. Give a job of protocol version 2.")
    made = Import()
    for key, role in roles.items():
        own = job_name if len(roles) == 1 else f"{job_name}-{document_name(str(key))}"
        _Role(job, job_name, str(key), _mapping(role, f"the role {key}"), made).add(own)
    made.left_out += _left_out_of_job(job, roles)
    made.left_out = list(dict.fromkeys(made.left_out))
    return made


class _Role:
    """One role of a job on its way to an Algorithm document."""

    def __init__(self, job: Mapping[str, Any], job_name: str, key: str, role: Mapping[str, Any], made: Import) -> None:
        self._job, self._job_name, self._key, self._role, self._made = job, job_name, key, role, made
        self._extras = _mapping(job.get("extras") or {}, "extras")
        self._local = {str(each.get("name")): each for each in _list(job.get("prerequisites"))}
        self._aliases = {str(each.get("name")): each for each in _list(self._extras.get("reference_prerequisites"))}
        self._secrets: dict[str, str] = {}

    def add(self, name: str) -> None:
        """Add the role's documents."""
        image = self._image()
        resources = _mapping(self._role.get("resourcePerInstance") or {}, "resourcePerInstance")
        options = _mapping(self._role.get("extraContainerOptions") or {}, "extraContainerOptions")
        prerequisites = [*self._storages(), *self._wishes(), *self._plugins()]
        algorithm: dict[str, Any] = {
            "docker_image": f"{{{{ prefect.blocks.docker-image.{image} }}}}",
            "command": [*_SHELL, self._script()],
            "gpu": bool(resources.get("gpu")),
            "gpu_count": resources.get("gpu") or 1,
            "cpus": resources.get("cpu") or 1,
            "memory": f"{resources['memoryMB']}MiB" if resources.get("memoryMB") else "1GiB",
            "shm_size": f"{options['shmMB']}MiB" if options.get("shmMB") else None,
            "network": True,
            "writable_root": True,
            "prerequisites": prerequisites,
            "secret_environment": self._secrets,
        }
        self._made.documents[f"algorithm/{name}"] = {
            key: value for key, value in algorithm.items() if value not in (None, [], {})
        }
        self._made.left_out += self._left_out(resources, options)

    def _image(self) -> str:
        wanted = str(self._role.get("dockerImage"))
        found = self._local.get(wanted, {})
        if found.get("type") != "dockerimage" or not found.get("uri"):
            raise InvalidDocument(
                f"The role {self._key} names the docker image {wanted!r}, which the job's prerequisites do not have. "
                "Add it there, with type: dockerimage and its uri."
            )
        name = f"{self._job_name}-{document_name(wanted)}"
        self._made.documents[f"docker-image/{name}"] = {"image_id": str(found["uri"])}
        if found.get("auth"):
            self._made.left_out.append(
                f"the login of the image {wanted}: make a docker-registry-credentials document, and refer to it in docker-image/{name}"
            )
        return name

    def _script(self) -> str:
        defaults = _mapping(self._job.get("defaults") or {}, "defaults")
        around: Mapping[str, Any] = {}
        for deployment in _list(self._job.get("deployments")):
            if deployment.get("name") == defaults.get("deployment"):
                around = _mapping(deployment.get("taskRoles") or {}, "taskRoles of a deployment").get(self._key) or {}
        lines = [
            *_list(around.get("preCommands"), str),
            *_list(self._role.get("commands"), str),
            *_list(around.get("postCommands"), str),
        ]
        return "\n".join(self._filled_in(line.strip()) for line in lines)

    def _filled_in(self, value: Any) -> Any:
        """The value, of any depth, with its tags replaced."""
        if isinstance(value, dict):
            return {key: self._filled_in(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._filled_in(each) for each in value]
        return _TAG.sub(self._replaced, value) if isinstance(value, str) else value

    def _replaced(self, tag: re.Match[str]) -> str:
        kind, name, rest = tag[1], tag[2], re.findall(r"\w+", tag[3])
        if kind == "secrets":
            variable, block = f"PAI_SECRET_{name.replace('-', '_')}", f"{self._job_name}-{document_name(name)}"
            self._secrets[variable] = block
            self._made.left_out.append(f"the value of the secret {name}: make a Secret block named {block}")
            return f"${variable}"
        found: Any = self._job.get("parameters") if kind == "parameters" else self._local.get(str(self._role.get(kind)))
        for key in (name, *rest):
            found = (
                found[int(key)]
                if isinstance(found, list) and key.isdigit() and int(key) < len(found)
                else (found.get(key) if isinstance(found, Mapping) else None)
            )
        if found is None or isinstance(found, list | Mapping):
            raise InvalidDocument(
                f"{tag[0]!r} in the role {self._key} refers to what the job does not have. Add it, or write the value."
            )
        return str(found)

    def _wishes(self) -> Iterator[Any]:
        for name in _list(self._role.get("prerequisites"), str):
            alias = self._aliases.get(name)
            if alias is not None and set(alias) <= {"name", "require", "type", "description"}:
                yield from alias.get("require") or []
            elif alias is not None or name in self._local:
                yield from self._local_item(name, alias or self._local[name])
            else:
                raise InvalidDocument(
                    f"The prerequisite {name!r} of the role {self._key} is neither in the job's prerequisites nor in "
                    "extras.reference_prerequisites. Add it there."
                )

    def _local_item(self, name: str, written: Mapping[str, Any]) -> Iterator[str]:
        if not {"plugin", "callbacks", "plugin_params", "require", "requireStorages"} & set(written):
            return  # an image, or data that commands only refer to
        document = f"{self._job_name}-{document_name(name)}"
        fields = self._filled_in({key: value for key, value in written.items() if key != "uri"})
        fields["require"] = [self._renamed(each) for each in fields.get("require") or []]
        self._made.documents[f"prerequisite/{document}"] = {key: value for key, value in fields.items() if value != []}
        yield document

    def _renamed(self, wish: Any) -> Any:
        """A requirement, by the name of the document that it becomes where it is one of the job's own."""
        name = str(wish.get("name") if isinstance(wish, dict) else wish)
        own = self._aliases.get(name) or self._local.get(name)
        if own is None:
            return wish
        document = next(self._local_item(name, own), f"{self._job_name}-{document_name(name)}")
        return {**wish, "name": document} if isinstance(wish, dict) else document

    def _storages(self) -> Iterator[str]:
        if storages := _list(self._extras.get("storages")):
            name = f"{self._job_name}-storages"
            wanted = [
                {"name": each.get("name"), "mountPath": each.get("mountPath") or f"/mnt/{each.get('name')}", "readOnly": False}
                for each in storages
            ]
            self._made.documents[f"prerequisite/{name}"] = {"requireStorages": wanted}
            yield name

    def _plugins(self) -> Iterator[str]:
        for number, written in enumerate(_list(self._extras.get(_PLUGINS))):
            if self._key not in (written.get("taskroles") or [self._key]):
                continue
            if written.get("plugin") != "cmd":
                self._made.left_out.append(f"the runtime plugin {written.get('plugin')}")
                continue
            given = self._filled_in(dict(_mapping(written.get("parameters") or {}, "parameters of a plugin")))
            old = (("taskStarts", given.get("preCommands")), ("taskSucceeds", given.get("postCommands")))
            callbacks = given.get("callbacks") or [
                {"event": event, "commands": commands} for event, commands in old if commands
            ]
            name = f"{self._job_name}-plugin-{number}"
            fields = {"plugin_params": {"callbacks": callbacks}, "failurePolicy": written.get("failurePolicy") or "fail"}
            self._made.documents[f"prerequisite/{name}"] = fields
            yield name

    def _left_out(self, resources: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
        role = f"of the role {self._key}"
        if (self._role.get("instances") or 1) != 1:
            yield f"{self._role['instances']} instances {role}: a run has one container"
        if resources.get("ports"):
            yield f"ports {role}: no container can be reached from outside"
        if options.get("infiniband"):
            yield f"infiniband {role}"
        if self._role.get("taskRetryCount"):
            yield f"taskRetryCount {role}: only what may succeed later is tried again"


def _left_out_of_job(job: Mapping[str, Any], roles: Mapping[str, Any]) -> Iterator[str]:
    if len(roles) > 1:
        yield f"that the {len(roles)} roles run at the same time: each is an algorithm of its own"
    if job.get("jobRetryCount"):
        yield "jobRetryCount: only what may succeed later is tried again"
    if cluster := (job.get("defaults") or {}).get("virtualCluster"):
        yield f"the virtual cluster {cluster}: choose a work pool"
    carried = ("storages", "reference_prerequisites", _PLUGINS, "submitFrom")
    yield from (f"extras.{key}" for key in job.get("extras") or {} if key not in carried)
    yield 'that OpenPAI\'s containers run as root: where the job needs that, write user: "0:0" into its algorithm'


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidDocument(f"The job cannot be read: {what} is {value!r} and must hold fields. Correct it.")
    return value


def _list(value: object, kind: type = dict) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
        raise InvalidDocument(
            f"The job cannot be read: {value!r} must be a list of {'texts' if kind is str else 'fields'}. Correct it."
        )
    return value
