"""Every error of this package, sorted by what its reader has to do.

    OasisError
    ├── DescriptionError         fix the description; trying again cannot help
    │   ├── ImageNotFound            no registry has it under that name
    │   ├── InvalidImageFile         the archive is not one usable image
    │   ├── InvalidDocument          files of a catalogue are wrong
    │   └── InvalidPrerequisite      one cannot be found, read, or given what it asks for
    ├── DatasetError             fix the data or the store
    │   ├── DatasetNotFound          nothing there, or a run that never published
    │   ├── UnsafeName               a file name or link that cannot be carried safely
    │   ├── DuplicateName            two shards of a batch wrote the same name
    │   ├── DatasetChanged *         it is another than it was listed as
    │   ├── ChecksumMismatch         the bytes are not those of the manifest
    │   ├── StoreDenied              wrong credentials, or no right to do this
    │   ├── StoreFull
    │   └── StoreUnavailable *       the store did not answer
    ├── EngineError              the verdict is unknown: mend the machine, or try again
    │   ├── EngineUnavailable *      no engine answered
    │   ├── ImageDenied              the registry refuses these credentials
    │   ├── RegistryUnavailable *    the registry did not answer
    │   ├── NoCapacity               no machine is large enough, however long one waits
    │   ├── UnsupportedByEngine      it cannot do what the description asks for
    │   │   └── NoGpu
    │   ├── NoRoom *                 the cluster had no place in the time that one waits
    │   └── ContainerLost *          it vanished before its exit was known
    │       ├── Evicted *                the cluster took it from its node
    │       └── Preempted *              it had to make room for a more important one
    ├── ServerUnavailable *      the Prefect server did not answer
    ├── ServerDenied             the Prefect server refuses this process
    ├── MarketplaceUnavailable * what publishes prerequisites did not answer
    ├── ProcessGone *            a run's process was killed; told by the reaper, never raised
    ├── RunInUse                 another process works on this very run
    ├── InternalError            a fault of this package, or of a library beneath
    ├── ProtocolError            a train's answer is none of the Train API
    ├── TrainRefused             a station does not let a train run, or not travel on; nothing of it stays
    ├── TrainFailed              a train ran, and says or shows that it did not succeed
    │   └── TrainStopped             it says that it neither succeeded nor failed
    ├── ChainBroken              a train's record does not hold: signature, order, image or summary
    ├── FilesFailed              some files of a batch failed alone; the others' output is published
    └── AlgorithmFailed          it ran and failed: read its log; its code is its verdict's

`*` marks `transient`: the same call may succeed later, and the tasks try again. A message says what happened to which
object, why (the outside world's words quoted), and what to do. The first sentence stands alone: it becomes the message
of the run's state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .job import ContainerExit
    from .verdict import Verdict


class OasisError(Exception):
    """Root of the tree. `code` is stable; `exit_code` is what the command line ends with.

    In a run, `stage` is the step that raised it, and `tries` how often that step was tried.
    """

    code: str = "error"
    transient: ClassVar[bool] = False
    exit_code: ClassVar[int] = 3
    stage: str = "plan"
    tries: int = 1


class DescriptionError(OasisError):
    """The request is wrong as written."""

    code = "invalid_description"
    exit_code = 2


class ImageNotFound(DescriptionError):
    """No image answers to this reference."""

    code = "image_not_found"


class InvalidImageFile(DescriptionError):
    """The archive cannot be used as one image."""

    code = "image_invalid"


class InvalidDocument(DescriptionError):
    """One or more files of a catalogue are wrong; the message has a line for each problem."""

    code = "invalid_document"


class InvalidPrerequisite(DescriptionError):
    """A prerequisite of an algorithm cannot be found, read, or given what it asks for."""

    code = "invalid_prerequisite"


class DatasetError(OasisError):
    """The data or their store need mending."""

    code = "invalid_dataset"
    exit_code = 2


class DatasetNotFound(DatasetError):
    """There is no dataset at this place."""

    code = "dataset_not_found"


class UnsafeName(DatasetError):
    """A name, link or special file that cannot be carried from one place to another safely."""

    code = "unsafe_name"


class DuplicateName(DatasetError):
    """Two shards of a batch wrote a file of the same name."""

    code = "duplicate_name"


class DatasetChanged(DatasetError):
    """A file is another than it was listed as: it was changed, or a listing arrived damaged. Another try lists it anew."""

    transient = True


class ChecksumMismatch(DatasetError):
    """The bytes differ from those that the manifest promises."""

    code = "checksum_mismatch"
    exit_code = 3


class StoreDenied(DatasetError):
    """The store refuses: wrong credentials, or no right to do this."""

    code = "store_denied"
    exit_code = 3


class StoreFull(DatasetError):
    """The store or the disk has no room left."""

    code = "disk_full"
    exit_code = 3


class StoreUnavailable(DatasetError):
    """The store did not answer, or broke off."""

    code = "store_unavailable"
    transient = True
    exit_code = 3


class EngineError(OasisError):
    """The container engine failed; what the algorithm would have done is unknown."""

    code = "engine_failed"


class EngineUnavailable(EngineError):
    """No engine answered."""

    code = "engine_unavailable"
    transient = True


class ImageDenied(EngineError):
    """The registry refuses to hand out the image."""

    code = "image_denied"


class RegistryUnavailable(EngineError):
    """The registry did not answer."""

    code = "registry_unavailable"
    transient = True


class NoCapacity(EngineError):
    """No machine is large enough for the algorithm, even if nothing else ran there."""

    code = "no_capacity"
    exit_code = 2


class UnsupportedByEngine(EngineError):
    """The engine cannot do what the description asks for, and said so before anything started."""

    code = "unsupported"


class NoGpu(UnsupportedByEngine):
    """The algorithm wants a GPU and the engine has none to give."""

    code = "no_gpu"


class ContainerLost(EngineError):
    """The container vanished before its exit was known."""

    code = "lost"
    transient = True


class Evicted(ContainerLost):
    """The cluster took the container from its node."""

    code = "evicted"


class Preempted(ContainerLost):
    """The cluster ended the container to make room for a more important one."""

    code = "preempted"


class NoRoom(EngineError):
    """The cluster found no place for the container in the time that it may wait."""

    code = "no_room"
    transient = True


class ServerUnavailable(OasisError):
    """The Prefect server did not answer."""

    code = "server_unavailable"
    transient = True


class ServerDenied(OasisError):
    """The Prefect server refuses this process."""

    code = "server_denied"


class MarketplaceUnavailable(OasisError):
    """What publishes a prerequisite did not answer."""

    code = "marketplace_unavailable"
    transient = True


class ProcessGone(OasisError):
    """The process that worked on a run is gone. The reaper tells Prefect so; nobody raises it."""

    code = "process_gone"
    transient = True


class RunInUse(OasisError):
    """Another process works on this very run."""

    code = "run_in_use"


class InternalError(OasisError):
    """What nobody foresaw: a fault of this package, or of a library beneath. The run's log has the traceback."""

    code = "internal"


class FilesFailed(OasisError):
    """Some files of a batch made the algorithm fail, each alone. What came of the others is published, or too many failed."""

    code = "files_failed"
    exit_code = 1
    stage = "run_container"


class ProtocolError(OasisError):
    """A train's answer is none of the Train API; the message quotes the end of it."""

    code = "protocol_error"
    exit_code = 1


class TrainRefused(OasisError):
    """A station does not let a train run, or not travel on: requirements, policy, or a person's answer."""

    code = "train_refused"
    exit_code = 2


class TrainFailed(OasisError):
    """A train ran and did not succeed: by its own word, or because its word and its exit code differ."""

    code = "train_failed"
    exit_code = 1


class TrainStopped(TrainFailed):
    """A train ended in the state `application`: by its own word neither a success nor a failure."""

    code = "train_application"


class ChainBroken(OasisError):
    """The record of a train's visits does not hold; the message names the first thing that does not."""

    code = "chain_broken"
    exit_code = 1


class AlgorithmFailed(OasisError):
    """The container ran and did not succeed.

    `exit` says how it ended, `verdict` what that means and what to do; the verdict's code is the error's. `log` is where its whole log
    is: a URL in the store, or a path on the worker's machine where it could not be published.
    """

    exit_code = 1
    stage = "run_container"

    def __init__(self, message: str, exit: ContainerExit, verdict: Verdict, log: str = "") -> None:
        super().__init__(message)
        self.exit = exit
        self.verdict = verdict
        self.log = log
        self.code = verdict.code

    def __reduce__(self) -> tuple[type[AlgorithmFailed], tuple[str, ContainerExit, Verdict, str]]:
        """Pickle with all arguments: Prefect stores and rebuilds exceptions."""
        return type(self), (str(self), self.exit, self.verdict, self.log)


def first_sentence(error: BaseException) -> str:
    """The part of an error's message that stands alone, up to the first full stop that ends a sentence."""
    text = " ".join(str(error).split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]
