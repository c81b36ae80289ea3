"""Words that algorithms end with when their description, or the machine, could mend what went wrong.

A symptom is looked for only in a container that ended with a non-zero exit code, in its last words, the newest first. Each
has the captured sentences that it was made for in `tests/unit/test_verdict.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Blame(StrEnum):
    """Whose turn it is."""

    ALGORITHM = "algorithm"
    DATA = "data"
    DESCRIPTION = "description"
    PLATFORM = "platform"
    POLICY = "policy"
    USER = "user"


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """What `pattern` in a line means: `what` completes the sentence "it ended with exit code 1, because …"."""

    code: str
    blame: Blame
    pattern: re.Pattern[str]
    what: str
    advice: str


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


GPU_MEMORY = Symptom(
    code="gpu_out_of_memory",
    blame=Blame.DESCRIPTION,
    pattern=_any(
        r"cuda out of memory",
        r"cuda(_error|runtime)? ?error:? ?\(?(2\)?:? )?out of memory",
        r"CUDA_ERROR_OUT_OF_MEMORY",
        r"OutOfMemoryError: CUDA",
        r"RESOURCE_EXHAUSTED: .*(alloc|memory)",
        r"cudaErrorMemoryAllocation",
    ),
    what="the memory of the GPU did not suffice",
    advice="Let it work on smaller pieces (a smaller batch), or run it on a GPU with more memory; `memory` is not the GPU's.",
)
GPU_ABSENT = Symptom(
    code="no_gpu",
    blame=Blame.DESCRIPTION,
    pattern=_any(
        r"found no nvidia driver",
        r"no cuda-capable device is detected",
        r"no cuda gpus are available",
        r"torch\.cuda\.is_available\(\) is false",
        r"libcuda\.so\.1: cannot open shared object file",
    ),
    what="it looked for a GPU and saw none",
    advice="Set `gpu: true` in the Algorithm document, or let it compute without.",
)
GPU_UNUSABLE = Symptom(
    code="no_gpu",
    blame=Blame.PLATFORM,
    pattern=GPU_ABSENT.pattern,
    what="it could not use the GPU that it was given",
    advice="Look at the machine (`nvidia-smi`), its NVIDIA Container Toolkit, and whether the image holds the CUDA that it needs.",
)
GPU_DRIVER = Symptom(
    code="gpu_driver",
    blame=Blame.PLATFORM,
    pattern=_any(
        r"cuda driver version is insufficient",
        r"driver on your system is too old",
        r"forward compatibility was attempted on non supported hw",
        r"driver/library version mismatch",
    ),
    what="the machine's NVIDIA driver does not fit the CUDA in the image",
    advice="Update the driver of the machine, or build the image for an older CUDA.",
)
GPU_KIND = Symptom(
    code="gpu_kind",
    blame=Blame.DESCRIPTION,
    pattern=_any(r"no kernel image is available for execution on the device", r"is not compatible with the current pytorch"),
    what="its program is not built for this kind of GPU",
    advice="Build the image for this GPU's compute capability, or use a pool with other GPUs.",
)
GPU_BROKEN = Symptom(
    code="gpu_broken",
    blame=Blame.PLATFORM,
    pattern=_any(r"uncorrectable ecc error", r"gpu is lost", r"fallen off the bus", r"unable to determine the device handle"),
    what="the GPU itself failed",
    advice="Look at the machine (`nvidia-smi`, the kernel's log: NVRM Xid), and run it elsewhere meanwhile.",
)
CUDA = Symptom(
    code="cuda_error",
    blame=Blame.ALGORITHM,
    pattern=_any(
        r"cuda error:", r"cuda runtime error", r"device-side assert triggered", r"illegal memory access was encountered"
    ),
    what="a CUDA call failed",
    advice="See its log; with the variable CUDA_LAUNCH_BLOCKING=1 in `environment` the line that failed is named.",
)
SHARED_MEMORY = Symptom(
    code="shm_full",
    blame=Blame.DESCRIPTION,
    pattern=_any(
        r"insufficient shared memory",
        r"out of shared memory",
        r"unable to (allocate|open|write to|resize) .*shared memory",
        r"/dev/shm.*no space left on device",  # noqa: S108
        r"no space left on device.*/dev/shm",
    ),
    what="its shared memory, /dev/shm, is too small",
    advice="Set `shm_size` in the Algorithm document, such as 2GiB, or use fewer worker processes.",
)
ALLOCATION = Symptom(
    code="allocation_failed",
    blame=Blame.DESCRIPTION,
    pattern=_any(
        r"^memoryerror\b",
        r"arraymemoryerror",
        r"unable to allocate .* for an array",
        r"std::bad_alloc",
        r"java\.lang\.outofmemoryerror",
        r"javascript heap out of memory",
        r"cannot allocate (memory|vector of size)",
    ),
    what="it asked for more memory than it could get",
    advice="Raise `memory` in the Algorithm document (and a heap limit of its own, if it has one), or give it smaller files.",
)
DISK_FULL = Symptom(
    code="disk_full",
    blame=Blame.PLATFORM,
    pattern=_any(r"no space left on device", r"disk quota exceeded"),
    what="there was no room left where it wrote",
    advice="Free space on the disk of the workspaces, or set OASIS_FLOWS_HOME to a folder with room.",
)
TMP_FULL = Symptom(
    code="tmp_full",
    blame=Blame.DESCRIPTION,
    pattern=DISK_FULL.pattern,
    what="there was no room left in a file system in its memory, such as /tmp",
    advice="Raise `tmp_size` and `memory` in the Algorithm document, or let it write its temporary files below output.",
)
READ_ONLY = Symptom(
    code="read_only",
    blame=Blame.POLICY,
    pattern=_any(r"read-only file ?system", r"\bEROFS\b"),
    what="it may write only below output and /tmp",
    advice=(
        "Let it write there (often HOME=/tmp or a cache folder in `environment` is enough), or set `writable_root: true`; "
        "its input is never writable."
    ),
)
NO_NETWORK = Symptom(
    code="no_network",
    blame=Blame.POLICY,
    pattern=_any(
        r"could not resolve host",
        r"name or service not known",
        r"temporary failure in name resolution",
        r"network is unreachable",
        r"bad address '",
        r"no such host",
        r"getaddrinfo (failed|EAI_AGAIN|ENOTFOUND)",
        r"nodename nor servname provided",
        r"failed to resolve '",
    ),
    what="it wanted the network, which its document does not give it",
    advice="Put what it downloads into the image or the dataset, or set `network: true` in the Algorithm document.",
)
NETWORK_FAILED = Symptom(
    code="network_failed",
    blame=Blame.PLATFORM,
    pattern=NO_NETWORK.pattern,
    what="a name or an address on the network could not be reached",
    advice="Check the address, and the network of the engine's machine.",
)
PIDS = Symptom(
    code="pids_limit",
    blame=Blame.POLICY,
    pattern=_any(
        r"can't fork",
        r"cannot fork",
        r"fork: (retry: )?resource temporarily unavailable",
        r"can't start new thread",
        r"unable to create (new )?native thread",
        r"pthread_create failed",
        r"thread-create.*resource temporarily unavailable",
    ),
    what="it wanted more processes or threads at once than it may have",
    advice="Raise `pids_limit` in the Algorithm document, or let it use fewer (such as OMP_NUM_THREADS=1 in `environment`).",
)
MODULE = Symptom(
    code="module_missing",
    blame=Blame.ALGORITHM,
    pattern=_any(
        r"modulenotfounderror: ", r"^importerror: ", r"error while loading shared libraries: ", r"cannot find module '"
    ),
    what="its image lacks a module or library",
    advice="Install it in the image, and build the image again.",
)

_BY_WORDS = (
    SHARED_MEMORY, GPU_MEMORY, GPU_ABSENT, GPU_DRIVER, GPU_KIND, GPU_BROKEN, CUDA, PIDS, ALLOCATION, DISK_FULL, READ_ONLY, NO_NETWORK, MODULE,
)  # fmt: skip

# A disk with this much room was not the one that was full.
_ROOM = 64 << 20


def recognise(
    last_words: Sequence[str],
    *,
    network: bool,
    gpu: bool,
    writable_root: bool,
    forks_refused: int,
    disk_free_bytes: int | None,
) -> tuple[Symptom, str] | None:
    """The symptom in the last words of a container that failed, and the line that shows it.

    Args:
        network: it had the network.
        gpu: it had a GPU.
        writable_root: it could write elsewhere than to its output and /tmp.
        forks_refused: how often its limit of processes refused one.
        disk_free_bytes: what its output's disk had left at the end; `None` where nobody looked.
    """
    for line in reversed(_decisive(last_words)):
        for symptom in _BY_WORDS:
            if symptom.pattern.search(line):
                if symptom is NO_NETWORK and network:
                    symptom = NETWORK_FAILED
                if symptom is GPU_ABSENT and gpu:
                    symptom = GPU_UNUSABLE
                if symptom is DISK_FULL and (disk_free_bytes or 0) > _ROOM and not writable_root:
                    symptom = TMP_FULL
                return symptom, line
    if forks_refused:
        return PIDS, f"the kernel refused it a new process {forks_refused} times"
    return None


# Libraries that find no GPU say so and go on without; TensorFlow and glog mark warnings by a W.
_WARNING = re.compile(r"\bwarn(ing)?\b|warning:|^\S* ?\S* ?W[\d ]|could not load dynamic library|dlerror", re.IGNORECASE)
_TRACEBACK = "Traceback (most recent call last):"


def _decisive(last_words: Sequence[str]) -> list[str]:
    """The lines that may say why it ended: no warnings, and of a Python program that raised what came with the exception."""
    lines = [line.strip() for line in last_words]
    if _TRACEBACK in lines:
        lines = lines[len(lines) - lines[::-1].index(_TRACEBACK) :]
    return [line for line in lines if not _WARNING.search(line)]
