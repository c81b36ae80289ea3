"""Prerequisites as values: the seed's own YAML and what it expands to, order, quoting, and every refusal with its chain."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from oasis_flows import item, wrapper
from oasis_flows.command import as_text
from oasis_flows.errors import DescriptionError, InvalidPrerequisite
from oasis_flows.prerequisites import Found, Resolution, resolve
from oasis_flows.storages import Storage, mounts
from oasis_flows.template import in_command, in_text

SEED = Path(__file__).parents[1] / "openpai" / "marketplace"


@cache
def marketplace() -> dict[str, item.Item]:
    """The items of the seed's marketplace, as they are written there."""
    return {path.stem: item.parse(item.read(path.read_text())) for path in sorted(SEED.glob("*.yaml"))}


def resolved(
    *required: object, items: dict[str, object] | None = None, network: bool = True, working_dir: str = "/work"
) -> Resolution:
    known = marketplace() | {name: item.parse(fields, name) for name, fields in (items or {}).items()}

    def find(uri: str) -> Found:
        name = uri.removeprefix("marketplace://name/")
        if name not in known:
            raise InvalidPrerequisite(f"there is no {name}. Correct the name")
        return Found(known[name], name, "0" * 64)

    return resolve("detect", item.requirements(list(required), "prerequisites"), find, working_dir=working_dir, network=network)


def refusal(*required: object, **options: object) -> str:
    with pytest.raises(InvalidPrerequisite) as refused:
        resolved(*required, **options)  # type: ignore[arg-type]
    return str(refused.value)


def wish(name: str, **values: object) -> dict[str, object]:
    return {"name": f"marketplace://name/{name}", "template_variables": values}


# The seed


def test_a_dataset_comes_after_what_installs_its_tools():
    found = resolved(wish("mnist", dataPath="/dataset/mnist"))

    assert [(step.item.name, callback.event, callback.commands) for step, callback in found.callbacks] == [
        ("install_wget", "taskStarts", ("apt update", "apt install -y wget")),
        (
            "mnist",
            "taskStarts",
            (
                "mkdir -p /dataset/mnist",
                "wget http://1.2.3.4/mnist.zip -O /dataset/mnist",
                "cd /dataset/mnist",
                "unzip mnist.zip",
            ),
        ),
    ]


def test_two_datasets_of_one_storage_mount_it_once():
    found = resolved(wish("imagenet", dataPath="/data"), wish("imagenet_only_validation", dataPath="/validation"))

    assert [step.item.name for step in found.steps] == ["confignfs_pvc", "imagenet", "imagenet_only_validation"]
    assert found.storages == (Storage("confignfs", "/mnt/confignfs_pvc", True, "detect → imagenet → confignfs_pvc"),)
    assert [callback.commands for _, callback in found.callbacks] == [
        ("mkdir -p /data", "cp -r /mnt/confignfs_pvc/imagenet/* /data"),
        ("mkdir -p /validation", "cp -r /mnt/confignfs_pvc/imagenet/validation/* /validation"),
    ]


def test_the_debug_hook_waits_as_long_as_it_is_told():
    found = resolved(wish("debug_hook", min=30))

    assert [(callback.event, callback.commands) for _, callback in found.callbacks] == [
        ("taskFails", ('echo "will sleep for 30 minutes for debugging..."', "sleep 30m"))
    ]


# Order


@st.composite
def forests(draw: st.DrawFn) -> dict[str, object]:
    """Items of which each requires some of those before it, with one of two values."""
    names = [f"i{number}" for number in range(draw(st.integers(1, 8)))]
    items: dict[str, object] = {}
    for number, name in enumerate(names):
        below = draw(st.lists(st.tuples(st.sampled_from(names[:number]), st.integers(1, 2)), max_size=4)) if number else []
        items[name] = {
            "require": [{"name": other, "template_variables": {"v": value}} for other, value in below],
            "template_variables": [{"name": "v"}],
            "plugin_params": {"callbacks": [{"event": "taskStarts", "commands": [f"{name} {{{{ v }}}}"]}]},
        }
    return items


@given(forests(), st.data())
def test_what_is_required_comes_before_and_each_comes_once(items, data):
    asked = data.draw(st.lists(st.tuples(st.sampled_from(sorted(items)), st.integers(1, 2)), min_size=1, max_size=4))
    found = resolved(*({"name": name, "template_variables": {"v": value}} for name, value in asked), items=items)
    order = [(step.item.name, step.variables["v"]) for step in found.steps]

    assert len(set(order)) == len(order)
    assert set(asked) <= set(order)
    for position, (name, _) in enumerate(order):
        wanted = [(each["name"], each["template_variables"]["v"]) for each in items[name]["require"]]
        assert set(wanted) <= set(order[:position])
    assert [callback.commands[0] for _, callback in found.callbacks] == [f"{name} {value}" for name, value in order]


def test_a_tower_of_diamonds_is_climbed_once():
    items = {f"i{n}": {"require": [f"i{n - 1}", f"i{n - 1}"] if n else []} for n in range(45)}

    assert len(resolved("i44", items=items).steps) == 45


@pytest.mark.parametrize(("one", "other", "steps"), [(1, 1, 1), (1, "1", 1), (True, "true", 1), (1, True, 2), (1, 1.0, 2)])
def test_values_are_the_same_when_they_are_written_the_same(one, other, steps):
    items = {"a": {"template_variables": ["v"]}}

    assert len(resolved(*({"name": "a", "template_variables": {"v": v}} for v in (one, other)), items=items).steps) == steps


# Refusals


@pytest.mark.parametrize(
    ("required", "items", "said"),
    [
        (["nothing"], {}, "(detect → nothing): there is no nothing. Correct the name."),
        (["a"], {"a": {"require": ["b"]}}, "(detect → a → b): there is no b."),
        ([wish("mnist")], {}, "(detect → mnist): it asks for the template variable dataPath, which is not given. "),
        ([wish("mnist", dataPath="/d", more=1)], {}, "(detect → mnist): it has no template variable more. It has dataPath."),
        (["a"], {"a": {"require": ["b"]}, "b": {"require": ["c"]}, "c": {"require": ["b"]}}, "in a circle, b → c → b. Remove"),
        (["a"], {"a": {"require": ["a"]}}, "(detect → a → a): they require one another in a circle, a → a."),
        (["i60"], {f"i{n}": {"require": [f"i{n - 1}"] if n else []} for n in range(61)}, "more than 50 deep"),
        (
            [wish("debug_hook", min="1; rm -rf /")],
            {},
            "would be read as shell syntax in 'sleep {{ min }}m'. Write {{ min | quote }}",
        ),
        ([wish("confignfs_pvc", mountPath="mnt")], {}, "nothing can be mounted at 'mnt'. Write a whole path"),
        ([wish("confignfs_pvc", mountPath="/proc/x")], {}, "nothing can be mounted at '/proc/x', which is not free."),
        (
            [wish("confignfs_pvc", mountPath="/work/output/x")],
            {},
            "The storage confignfs, which detect → confignfs_pvc needs at /work/output/x, would cover /work/output,",
        ),
        ([wish("confignfs_pvc", mountPath="/work")], {}, "would cover /work/input"),
        (
            ["a", "b"],
            {name: {"requireStorages": [{"name": name, "mountPath": "/mnt/x/"}]} for name in "ab"},
            "Two storages are to be mounted at /mnt/x: a, which detect → a needs, and b, which detect → b needs.",
        ),
    ],
)
def test_a_refusal_names_the_chain_to_the_culprit_and_what_to_do(required, items, said):
    assert said in refusal(*required, items=items)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"plugin": "ssh"}, "there is no plugin 'ssh'. The plugins are cmd and pvc_storage"),
        ({"requires": []}, ""),
        ({"requires": ["a"]}, "there is no field requires. Did you mean require?"),
        (
            {"callbacks": [{"event": "taskStart", "commands": ["a"]}]},
            "there is no event 'taskStart'. The events are taskStarts,",
        ),
        ({"callbacks": [{"event": "taskStarts", "command": ["a"]}]}, "a callback has no command. Did you mean commands?"),
        ({"callbacks": [{"event": "taskStarts", "commands": "a"}]}, "commands of taskStarts is 'a' and must be a list"),
        ({"callbacks": [{"event": "taskStarts", "commands": [1]}]}, "1 is no command of taskStarts"),
        (
            {"callbacks": [{"event": "taskStarts", "commands": ["{{ x }}"]}]},
            "x is used and not declared. Add to template_variables",
        ),
        ({"callbacks": [{"event": "taskStarts", "commands": ["{{ x | upper }}"]}]}, "unknown filter. The only one is quote."),
        (
            {"callbacks": [{"event": "taskStarts", "commands": ["{{ secrets.A }}"]}]},
            "is no template variable. Write {{ name }}",
        ),
        ({"callbacks": [], "plugin_params": {"call": 1}}, "plugin_params has no call. Did you mean callbacks?"),
        ({"template_variables": [{"name": "a b"}]}, "declares no template variable. Write - name: dataPath"),
        ({"failurePolicy": "retry"}, "failurePolicy is 'retry' and must be fail or ignore"),
        ({"require": [{"uri": "x"}]}, "is no prerequisite. Write its name, or"),
        ({"require": [wish("a", v="{{ w }}")]}, "values are literals: nothing fills them in"),
        ({"require": [wish("a", v=[1])]}, "Write text or a number"),
        ({"plugin": "pvc_storage"}, "the name of a storage is missing"),
        ({"requireStorages": [{"name": "a", "mountPath": "/mnt/../x"}]}, "nothing can be mounted at '/mnt/../x'"),
        ({"requireStorages": [{"name": "a", "mountPath": "{{ x }}"}]}, "which only plugin_params may"),
        ({"plugin_params": {"cache": True, "callbacks": []}}, "Write both: path: /dataset, and a callback"),
        ({"plugin_params": {"path": "/x"}}, "Write cache: true beside it"),
        ({"network": "yes"}, "network is 'yes' and must be true or false"),
    ],
)
def test_a_specification_that_makes_no_sense_is_refused_with_advice(fields, said):
    if not said:
        assert item.parse(fields, "x").requires == ()
        return
    with pytest.raises(InvalidPrerequisite) as refused:
        item.parse(fields, "x")
    assert said in str(refused.value)


def test_the_older_form_and_the_older_events_mean_the_same():
    old = item.parse(
        {
            "plugin": "cmd",
            "callbacks": [{"event": "containerStart", "commands": ["a"]}, {"event": "containerExit", "commands": ["b"]}],
        },
        "x",
    )
    new = item.parse(
        {
            "plugin_params": {
                "callbacks": [{"event": "taskStarts", "commands": ["a"]}, {"event": "taskEnds", "commands": ["b"]}]
            }
        },
        "x",
    )

    assert old == new


@pytest.mark.parametrize(
    "text", ["a: [", "{{", "- a: 1\n- b: 2", "", "a: 1\na: 2", "1" * 5000, "root:x:0:0:root:/root:/bin/sh"]
)
def test_a_file_that_is_no_specification_is_refused_and_not_quoted(text):
    with pytest.raises(InvalidPrerequisite) as refused:
        item.read(text)
    assert "root:" not in str(refused.value)


# Templates

SAFE = st.text(st.sampled_from("abcXYZ019_./:@%+,-="), min_size=1, max_size=12)
ANY = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


def words(script: str) -> list[str]:
    """The words that a real shell gives to a program."""
    done = subprocess.run(
        ["sh", "-c", f"tell() {{ printf '%s\\0' \"$@\"; }}\n{script}"], capture_output=True, check=True, cwd="/"
    )
    return done.stdout.decode().split("\0")[:-1]


@settings(max_examples=60)
@given(ANY, st.sampled_from(["{}", '"a {} b"', "'a {} b'", '"$(tell {})"', "a{}b", '"a"{}', '"it\'s {}"', "$(: ; tell x) {}"]))
def test_a_quoted_value_is_one_word_whatever_it_is(value, place):
    before, _, after = place.partition("{}")
    found = words(in_command(f"tell {before}{{{{ v | quote }}}}{after} end", {"v": value}))

    plain = {
        "'a {} b'": f"a {value} b",
        '"a {} b"': f"a {value} b",
        "a{}b": f"a{value}b",
        '"a"{}': f"a{value}",
        '"it\'s {}"': f"it's {value}",
    }
    if place == "{}":
        assert found == [value, "end"]
    elif place in plain:
        assert found == [plain[place], "end"]
    else:
        assert found[-1] == "end"


@settings(max_examples=150)
@given(st.one_of(SAFE, ANY), st.sampled_from(["{}", '"a {} b"', "'a {} b'"]))
def test_an_unquoted_value_is_what_it_is_or_is_refused(value, place):
    before, _, after = place.partition("{}")
    template = f"tell {before}{{{{ v }}}}{after} end"
    try:
        command = in_command(template, {"v": value})
    except InvalidPrerequisite:
        # Who would read it as it is has to be told what to do: with the filter any value passes.
        assert in_command(template.replace("{{ v }}", "{{ v | quote }}"), {"v": value})
        return
    assert words(command) == [f"{before}{value}{after}".strip("'\""[place[0] == '"']) if place != "{}" else value, "end"]


@pytest.mark.parametrize(
    ("command", "value"),
    [
        ("tell {{ v }}>file", "2"),
        ("{{ v }} tell", "A=b"),
        ("if :; then {{ v }}; fi", "done"),
        ("tell {{ v }}", "a b"),
        ("tell {{ v }}", "~"),
        ("tell {{ v }}", ""),
        ("tell {{ v }}", "a*"),
        ('tell "{{ v }}"', "$(id)"),
        ('tell "{{ v }}"', 'a"b'),
        ("tell '{{ v }}'", "a'b"),
        ("tell `echo {{ v | quote }}`", "a b"),
        ("cat <<EOF\n{{ v | quote }}\nEOF", "$(id)"),
        ("sh -c 'echo {{ v | quote }}'", "$(id)"),
        ("echo ${A:-{{ v }}}", "a:b"),
        ("echo ${{ v }}", "{HOME}"),
    ],
)
def test_a_value_that_would_change_the_structure_of_a_command_is_refused(command, value):
    with pytest.raises(InvalidPrerequisite, match="would be read as shell syntax"):
        in_command(command, {"v": value})


def test_braces_that_name_nothing_and_comments_are_left_alone():
    text = "docker ps --format '{{.Names}}' {{}} {{ 1 }} # {{ v }}"

    assert in_command(text, {"v": "x"}) == text
    assert in_text("a {{v}} {{.b}}", {"v": True}) == f"a {as_text(True)} {{{{.b}}}}"


def test_a_secret_is_a_reference_in_every_place_and_refused_where_it_cannot_be_quoted():
    assert in_command("a {{ secret.x-y }} \"b {{ secret.x-y }}\" 'c {{ secret.x-y | quote }}'", {}) == (
        'a "${OASIS_SECRET_x_y}" "b ${OASIS_SECRET_x_y}" \'c \'"${OASIS_SECRET_x_y}"\'\''
    )
    with pytest.raises(InvalidPrerequisite, match=r'Write "\$OASIS_SECRET_x" there'):
        in_command("eval {{ secret.x }}", {})
    with pytest.raises(InvalidPrerequisite, match="is no command"):
        in_text("{{ secret.x }}", {})


# Storages


def test_a_storage_is_a_folder_or_a_volume_of_the_machine_and_closed_unless_somebody_writes():
    asked = [{"name": "a", "mountPath": "/mnt/x"}, {"name": "a", "mountPath": "/mnt/x", "readOnly": False}, {"name": "b"}]
    found = resolved(*"pqr", items={name: {"requireStorages": [one]} for name, one in zip("pqr", asked, strict=True)}).storages
    table = {"docker": {"a": {"path": "/srv/a"}, "b": {"volume": "vol", "readOnly": True}}}

    assert [(m.source, m.target, m.read_only) for m in mounts(found, table, "docker")] == [
        ("/srv/a", "/mnt/x", False),
        ("vol", "/mnt/b", True),
    ]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            {},
            'It has none. Add a row to the setting OASIS_FLOWS_STORAGES: {"docker": {"a": {"path": "/folder/of/the/machine"}}}.',
        ),
        ({"docker": {"b": {"path": "/x"}}, "kubernetes": {"a": {"pvc": "x"}}}, "It has b."),
        ({"docker": {"a": {"path": "x"}}}, "makes no sense for the storage a"),
        ({"docker": {"a": {"path": "/x", "volume": "v"}}}, "makes no sense for the storage a"),
        ({"docker": {"a": {"volume": "/etc"}}}, "makes no sense for the storage a"),
        ({"docker": {"a": {"path": "/x", "readOnly": True}}}, "read-only on this machine, and detect → p asks to write to it"),
    ],
)
def test_a_storage_that_a_machine_does_not_have_is_refused_with_the_setting_to_add(table, said):
    found = resolved("p", items={"p": {"requireStorages": [{"name": "a", "readOnly": False}]}}).storages

    with pytest.raises(DescriptionError) as refused:
        mounts(found, table, "docker")
    assert said in str(refused.value)


# What is kept


def test_what_is_kept_is_prepared_after_all_that_comes_before_it_and_then_only_mounted():
    def kept(name: str, *require: str) -> dict[str, object]:
        callbacks = [{"event": "taskStarts", "commands": [f"make {name}"]}, {"event": "taskEnds", "commands": ["end"]}]
        return {"require": list(require), "plugin_params": {"cache": True, "path": f"/data/{name}", "callbacks": callbacks}}

    tool = {"plugin_params": {"callbacks": [{"event": "taskStarts", "commands": ["get tool"]}]}}
    found = resolved("c", "d", items={"a": kept("a"), "b": tool, "c": kept("c", "a", "b"), "d": tool})

    assert [step.cache_path for step in found.cached] == ["/data/a", "/data/c"]
    first, second = (found.to_prepare(step) for step in found.cached)
    assert [c.commands[0] for _, c in first.callbacks] == ["make a"]
    assert [c.commands[0] for _, c in second.callbacks] == ["get tool", "make c"]
    assert [c.commands[0] for _, c in found.around_algorithm().callbacks] == ["end", "get tool", "end", "get tool"]
    assert "Two storages are to be mounted at /data/a" in refusal(
        "a", "x", items={"a": kept("a"), "x": kept("a", "b")} | {"b": tool}
    )


# The wrapper


@pytest.mark.parametrize("shell", [["dash"], ["bash", "--posix"], ["busybox", "sh"]])
def test_every_shell_reads_the_wrapper(shell):
    text = 'it\'s "$HOME" `id` \\ \n{{ v | quote }}'
    items = {
        "o'dd $x": {
            "template_variables": ["v"],
            "plugin_params": {"callbacks": [{"event": event, "commands": [text]} for event in item.EVENTS]},
            "share_environment": True,
        }
    }
    found = resolved({"name": "o'dd $x", "template_variables": {"v": "a'b"}}, items=items)
    script = wrapper.script(found, look_inside="docker exec $HOSTNAME", linger_seconds=60)

    subprocess.run([*shell, "-n", "-c", script], check=True)
    assert json.dumps(script)
