"""What an exception of the outside world means: obstore's, botocore's, fsspec's and the kernel's, as ours.

Classes are told apart by the module that they come from, so that nothing is imported for it.
"""

from __future__ import annotations

import errno
import re

from ..errors import (
    DatasetError,
    DatasetNotFound,
    OasisError,
    StoreDenied,
    StoreFull,
    StoreUnavailable,
    UnsafeName,
)


class Missing(DatasetNotFound):
    """The folder or bucket may be there, but this file is not."""


class OutOfRange(DatasetError):
    """The file has fewer bytes than those that were asked for."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LIBRARIES = frozenset(
    {"obstore", "botocore", "aiobotocore", "boto3", "aiohttp", "fsspec", "s3fs", "gcsfs", "adlfs", "urllib3", "requests"}
)

DENIED = _words(
    "AccessDenied AllAccessDisabled AuthFailure AuthorizationHeaderMalformed ExpiredToken Forbidden InvalidAccessKeyId "
    "InvalidSecurity InvalidToken NotSignedUp RequestTimeTooSkewed SignatureDoesNotMatch TokenRefreshRequired "
    "UnauthorizedAccess 401 403"
)
GONE = _words("NoSuchKey NoSuchVersion NotFound 404")
NO_NAME = _words("InvalidObjectName InvalidPathError KeyTooLongError XMinioInvalidObjectName")
FULL = _words("InsufficientCapacity InsufficientStorage QuotaExceeded XMinioStorageFull 507")
BUSY = _words(
    "BandwidthLimitExceeded InternalError OperationAborted RequestTimeout RequestTimeoutException ServiceUnavailable "
    "SlowDown Throttling TooManyRequests 408 429 500 502 503 504"
)
# Said of what was right when it was sent, as this package's is: a bit flipped on the way, or an answer was lost and it was sent twice.
DAMAGED = _words("BadDigest IncompleteBody InvalidDigest InvalidPart InvalidPartOrder NoSuchUpload XAmzContentSHA256Mismatch")
# Of https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html, what says that the request is wrong for good.
REFUSED = _words(
    "AccessPointAlreadyOwnedByYou AccountProblem BucketAlreadyExists BucketAlreadyOwnedByYou BucketNotEmpty EntityTooLarge "
    "EntityTooSmall IllegalLocationConstraintException InvalidAccessPoint InvalidArgument InvalidBucketName "
    "InvalidBucketState InvalidEncryptionAlgorithmError InvalidHostHeader InvalidLocationConstraint InvalidObjectState "
    "InvalidPayer InvalidPolicyDocument InvalidRange InvalidRegion InvalidRequest InvalidStorageClass InvalidTag "
    "InvalidURI MalformedXML MaxMessageLengthExceeded MetadataTooLarge MethodNotAllowed MissingContentLength "
    "MissingRequestBodyError MissingSecurityHeader NoSuchAccessPoint NotImplemented ObjectLockConfigurationNotFoundError "
    "PermanentRedirect PreconditionFailed Redirect RequestHeaderSectionTooLarge TemporaryRedirect TooManyBuckets "
    "UnexpectedContent UnsupportedArgument UnsupportedSignature"
)
NO_CREDENTIALS = _words(
    "NoCredentialsError PartialCredentialsError ProfileNotFound CredentialRetrievalError TokenRetrievalError "
    "SSOTokenLoadError UnauthorizedSSOTokenError InvalidConfigError ConfigParseError"
)

KNOWN = DENIED | GONE | NO_NAME | FULL | BUSY | DAMAGED | REFUSED | {"NoSuchBucket"}
BROKEN_OFF = _words("ConnectionError HTTPClientError IncompleteReadError ReadTimeoutError ConnectionClosedError")
BY_CLASS: dict[str, str] = {
    "NotFoundError": "404",
    "PermissionDeniedError": "403",
    "UnauthenticatedError": "401",
    "JoinError": "500",
}


def quoted(error: BaseException) -> str:
    """The outside world's own words, short, on one line, without the request's details."""
    text = str(error).partition("\n\nDebug source")[0]
    parts = [found[1] for tag in ("Code", "Message") if (found := re.search(f"<{tag}>([^<]+)</{tag}>", text))]
    if parts:
        return ": ".join(parts)
    words = " ".join(text.split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:300]}…"


def verdict(error: Exception, where: str, *, writing: bool) -> OasisError | None:
    """The error of ours that says what happened to `where`; `None` for an exception that is none of the outside world's."""
    roots = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    why = quoted(error)
    if isinstance(error, ModuleNotFoundError | ImportError):
        return DatasetError(f"{where} needs a driver that is not installed. {why}. Install it beside this package.")
    if type(error).__name__ in NO_CREDENTIALS:
        return _denied(where, why, writing)
    code = _code(error)
    if isinstance(error, OSError) and not code:
        return _by_errno(error, where, why, writing)
    if roots & LIBRARIES or isinstance(error, OSError):
        status = _status(error)
        return _by_code(status if status in ("401", "403", "404") and code not in KNOWN else code, where, why, writing)
    return None


def _code(error: Exception) -> str:
    """The S3 code, else the HTTP status, else "" (nothing answered)."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict) and isinstance(answer.get("Error"), dict):
        return str(answer["Error"].get("Code", "")) or "500"
    text = str(error)
    found = re.search(r"<Code>([\w.]+)</Code>", text) or re.search(r"status code: (\d{3})", text)
    if found:
        return found[1]
    names = {kind.__name__ for kind in type(error).__mro__}
    if type(error).__module__.startswith("obstore") and "GenericError" not in names:
        name = type(error).__name__
        return BY_CLASS.get(name) or (name if name in NO_NAME else "InvalidRequest")
    if "builder error" in text or ("BotoCoreError" in names and names.isdisjoint(BROKEN_OFF)):
        return "InvalidRequest"
    return ""


def _status(error: Exception) -> str:
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        return str((answer.get("ResponseMetadata") or {}).get("HTTPStatusCode", ""))
    return BY_CLASS.get(type(error).__name__, "")


def _by_code(code: str, where: str, why: str, writing: bool) -> OasisError:
    if code in DENIED:
        return _denied(where, why, writing)
    if code == "NoSuchBucket":
        return _no_bucket(where, writing)
    if code in GONE:
        return Missing(f"{where} is not there. Check the address. The store said: {why}")
    if code in FULL:
        return StoreFull(f"The store of {where} has no room left. Free some, or use another store. It said: {why}")
    if code in NO_NAME:
        return UnsafeName(f"{where} has a name that cannot be carried. Rename it. The client said: {why}")
    if code in DAMAGED:
        return StoreUnavailable(
            f"What was sent to {where} arrived damaged. Try again; check the network. The store said: {why}"
        )
    if not code or code in BUSY or re.fullmatch(r"5\d\d", code):
        return StoreUnavailable(
            f"The store of {where} did not answer, or broke off. Try again, and check its endpoint_url. It said: {why}"
        )
    # A status that S3 does not answer is one that it does, such as 206 or 404, with a bit that flipped.
    if code in REFUSED or re.fullmatch(r"30[1278]|4(0[09]|1[1236])|KMS\..*", code):
        kind = OutOfRange if code in ("InvalidRange", "416") else DatasetError
        return kind(f"The store refused a request for {where}. Check the URL, endpoint_url and region. It said: {why}")
    return StoreUnavailable(
        f"The store refused a request for {where} with a word that S3 does not have, or that arrived damaged. Try again; check the "
        f"network, the URL, endpoint_url and region. It said: {why}"
    )


def _by_errno(error: OSError, where: str, why: str, writing: bool) -> OasisError:
    number = error.errno
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(
            f"There is no room left for {where}. Free some space or raise the quota, then try again. The system said: {why}"
        )
    if isinstance(error, PermissionError) or number == errno.EROFS:
        return _denied(where, why, writing)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Missing(
            f"{where} is not there. Check the path; it must exist on the machine that runs this. The system said: {why}"
        )
    if number in (errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ):
        return UnsafeName(f"{where} has a name or link that this file system cannot follow. Rename it. The system said: {why}")
    if isinstance(error, IsADirectoryError | FileExistsError):
        return DatasetError(
            f"{where} is a folder where a file is needed, or the other way round. Move it away. The system said: {why}"
        )
    return StoreUnavailable(f"The store of {where} did not answer, or broke off. Try again. The system said: {why}")


def _denied(where: str, why: str, writing: bool) -> StoreDenied:
    right = "write to" if writing else "read"
    return StoreDenied(
        f"The store does not let us {right} {where}. Check access_key_id and secret_access_key of its DatasetStore document "
        f"(or the AWS_* environment), for a local path its owner and mode. It said: {why}"
    )


def _no_bucket(where: str, writing: bool) -> DatasetError:
    if writing:
        return DatasetError(
            f"The bucket of {where} does not exist. Create it first, or correct the URL; it is never created for you."
        )
    return DatasetNotFound(f"The bucket of {where} does not exist. Check the URL and the store's endpoint_url.")
