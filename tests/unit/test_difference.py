"""What differs between two exports, and the layer that makes it, checked by applying it as an engine does."""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Mapping

import pytest
from hypothesis import given, strategies as st

from oasis_flows.difference import Difference, Kind, compare, exported, listing, write_layer
from oasis_flows.errors import TrainFailed

Tree = Mapping[str, bytes | str | None]  # a file's content, "→ target" of a link, "= name" of a hard link, None for a folder


def export(tree: Tree, mtime: int = 0) -> io.BytesIO:
    """A tree as an engine exports it: folders first."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, content in sorted(tree.items()):
            member = tarfile.TarInfo(path)
            member.mtime = mtime
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(member)
            elif isinstance(content, str):
                mark, _, member.linkname = content.partition(" ")
                member.type = tarfile.LNKTYPE if mark == "=" else tarfile.SYMTYPE
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    packed.seek(0)
    return packed


def layer_of(before: Tree, after: Tree, secrets: Mapping[str, str] | None = None) -> tuple[Difference, bytes]:
    found = compare(listing(export(before)), listing(export(after)))
    layer = io.BytesIO()
    write_layer(export(after), layer, found, secrets or {})
    return found, layer.getvalue()


def applied(tree: Tree, layer: bytes) -> dict[str, bytes | str | None]:
    """The tree with a layer on it, by the rules of the OCI's image specification."""
    result = dict(tree)
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        for member in tar:
            folder, name = posixpath.split(member.name)
            if name.startswith(".wh."):
                gone = posixpath.join(folder, name[4:])
                for path in [path for path in result if path == gone or path.startswith(f"{gone}/")]:
                    del result[path]
        for member in tar:
            if posixpath.basename(member.name).startswith(".wh."):
                continue
            body = tar.extractfile(member) if member.isreg() else None
            if not member.isdir():
                for path in [path for path in result if path.startswith(f"{member.name}/")]:
                    del result[path]
            if body is not None:
                result[member.name] = body.read()
            elif member.isdir():
                result[member.name] = None
            else:
                result[member.name] = f"{'=' if member.islnk() else '→'} {member.linkname}"
    return result


def kinds(found: Difference) -> dict[str, str]:
    return {change.path: str(change.kind) for change in found.changes}


def test_every_kind_of_change():
    before: Tree = {"a": None, "a/same": b"1", "a/old": b"1", "a/gone": b"1", "d": None, "d/x": b"", "d/e": None, "d/e/y": b""}
    after: Tree = {"a": None, "a/same": b"1", "a/old": b"22", "new": None, "new/file": b"333", "new/link": "→ ../a"}

    found, layer = layer_of(before, after)

    assert kinds(found) == {
        "a/gone": "removed", "a/old": "changed", "d": "removed", "d/e": "removed", "d/e/y": "removed", "d/x": "removed",
        "new": "added", "new/file": "added", "new/link": "added",
    }  # fmt: skip
    assert (found.size, found.count(Kind.REMOVED)) == (5, 5)
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        assert [name for name in tar.getnames() if ".wh." in name] == ["a/.wh.gone", ".wh.d"]
    assert applied(before, layer) == after
    assert Difference.from_lines(found.lines()) == found


def test_times_are_no_content():
    tree: Tree = {"a": None, "a/b": b"1"}

    assert compare(listing(export(tree)), listing(export(tree, mtime=99))).changes == ()


def test_what_engine_and_mounts_put_there_is_none():
    after: Tree = {
        ".dockerenv": b"", "dev": None, "dev/x": b"", "etc": None, "etc/hosts": b"h", "sbin": None, "sbin/docker-init": b"",
        "data": None, "data/in": None, "data/in/x": b"patient", "other": None, "other/in": None, "other/kept": b"", "tmp": None,
    }  # fmt: skip

    found = compare({}, listing(export(after)), ("/data/in", "/other/in", "/tmp"))

    assert kinds(found) == {"other": "added", "other/kept": "added"}


def test_hard_links():
    found, layer = layer_of({}, {"a": b"1", "b": "= a"})
    assert kinds(found) == {"a": "added", "b": "added"}
    assert applied({}, layer) == {"a": b"1", "b": "= a"}
    with pytest.raises(TrainFailed, match="made /b a second name of /a"):
        layer_of({"a": b"1"}, {"a": b"1", "b": "= a"})


def test_exported_files_only():
    before, after = (
        listing(export({"m": b"0", "k": b"1"})),
        listing(export({"m": b"1", "k": b"1", "n": b"", "l": "→ m", "x": b""})),
    )

    assert kinds(exported(before, after, ["/m", "/k", "/n"])) == {"m": "changed", "k": "kept", "n": "added"}
    for missing, why in (("/nowhere", "there is none"), ("/l", "no regular file")):
        with pytest.raises(TrainFailed, match=why):
            exported(before, after, [missing])


@pytest.mark.parametrize("padding", [0, (1 << 20) - 3, 1 << 20])
def test_a_secret_does_not_travel(padding):
    with pytest.raises(TrainFailed, match="secret TOKEN into /model") as caught:
        layer_of({}, {"model": b"x" * padding + b"s3cret-value"}, {"TOKEN": "s3cret-value", "OTHER": "nothing of it"})
    assert "s3cret" not in str(caught.value)


NAMES = st.sampled_from(["a", "b", "a/x", "a/y", "b/z", "b/z/w"])


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    tree: dict[str, bytes | str | None] = {}
    for path in sorted(draw(st.sets(NAMES))):
        parents = [posixpath.dirname(path)] if "/" in path else []
        parents += [posixpath.dirname(parents[0])] if parents and "/" in parents[0] else []
        if any(tree.get(parent) is not None for parent in parents):
            continue
        tree.update(dict.fromkeys(parents))
        tree[path] = draw(st.sampled_from([None, b"1", b"22", "→ elsewhere"]))
    return tree


@given(trees(), trees())
def test_the_layer_makes_the_one_tree_of_the_other(before, after):
    _, layer = layer_of(before, after)

    assert applied(before, layer) == after
