"""The shell script that runs callbacks around an algorithm, in its container; pure text.

It gets the algorithm's argument vector as its own and keeps to what every POSIX shell has, without any other program. In the
folder `FOLDER`, which the run gives it, it notes what happens, for whoever reads it afterwards (module `callbacks`):

    N.began N.ended   the Nth list of commands, by their times
    N.at              the number of the command that was begun last
    N.failed          its exit code, where that is not 0
    algorithm         the algorithm's own exit code, once it has ended and there are callbacks to come
    refused           127 or 126: there is no such program as the algorithm's, or it is not executable

Without end callbacks the algorithm takes the script's place, and nothing of it stays. With some, the algorithm is a child of
the script, which passes signals on; a shell lets such a child begin with SIGINT and SIGQUIT ignored, and only some shells can
undo that. Nobody stops a container by these two.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from .prerequisites import Resolution, Step
from .template import secret_variable

SHELL = "/bin/sh"
FOLDER = "/run/oasis-flows"
ALGORITHM, REFUSED = "algorithm", "refused"
# What the script itself says, on stderr, begins so.
MARK = "oasis-flows: "

_HEAD = r"""
_oasis_child= _oasis_signal= _oasis_stop= _oasis_failed= _oasis_late= _oasis_code=
_oasis_pass() {
  _oasis_signal=$1
  [ "$1" != TERM ] || _oasis_stop=1
  [ -z "$_oasis_child" ] || kill -s "$1" "$_oasis_child" 2>/dev/null
}
for _oasis_each in HUP INT QUIT USR1 USR2 TERM; do trap "_oasis_pass $_oasis_each" "$_oasis_each"; done
# The exit code of a child, which a signal in between does not change.
_oasis_wait() {
  _oasis_child=$1 _oasis_code=
  [ -z "$_oasis_signal" ] || kill -s "$_oasis_signal" "$1" 2>/dev/null
  while :; do
    _oasis_signal=
    wait "$1"
    _oasis_now=$?
    # After a signal, 127 says that its end had been told already.
    [ "$_oasis_now" = 127 ] && [ -n "$_oasis_code" ] || _oasis_code=$_oasis_now
    [ -n "$_oasis_signal" ] || break
  done
  _oasis_child=
}
_oasis_note() {
  : >"FOLDER/$1.ended"
  [ "$_oasis_code" != 0 ] || return
  echo "$_oasis_code" >"FOLDER/$1.failed"
  echo "oasis-flows: $3 ended with exit code $_oasis_code$4" >&2
  [ "$2" = ignore ] || _oasis_late=${_oasis_late:-$_oasis_code}
}
_oasis_there() {
  [ -e "$1" ] || return
  [ -x "$1" ] && [ ! -d "$1" ] || { _oasis_why=126; return 1; }
}
_oasis_find() {
  _oasis_why=127
  case $1 in
    */*) _oasis_there "$1" && return ;;
    *) set -f; IFS=:; for _oasis_each in $PATH; do _oasis_there "${_oasis_each:-.}/$1" && return; done ;;
  esac
  echo "$_oasis_why" >"FOLDER/refused"
  echo "oasis-flows: $1: there is no such program" >&2
  exit "$_oasis_why"
}
""".replace("FOLDER", FOLDER)

_SHARE = r"""_oasis_pwd=$PWD; export _oasis_pwd; umask 077; export -p >/tmp/.oasis-flows-environment"""
_SHARED = r"""if [ -e /tmp/.oasis-flows-environment ]; then
  . /tmp/.oasis-flows-environment; : >/tmp/.oasis-flows-environment; cd "$_oasis_pwd"; unset _oasis_pwd
fi"""


def has_end_callbacks(resolution: Resolution) -> bool:
    """Is anything done after the algorithm?"""
    return any(callback.event != "taskStarts" for _, callback in resolution.callbacks)


def argv(resolution: Resolution, *, look_inside: str, linger_seconds: float) -> tuple[str, ...]:
    """The argument vector that runs the callbacks around the one that follows it.

    Start callbacks run in the order of the steps; then, in the reverse order, those for the algorithm's success or failure;
    then, again in the reverse order, those for its end. A failed start callback keeps the algorithm from starting and counts
    as its failure. `look_inside` is the command by which people get into the container; `$HOSTNAME` in it is filled in there.
    """
    return (SHELL, "-c", script(resolution, look_inside=look_inside, linger_seconds=linger_seconds), "oasis-flows")


def script(resolution: Resolution, *, look_inside: str, linger_seconds: float) -> str:
    """The script alone; see `argv`."""
    hidden = "".join(f"unset {secret_variable(block)}; " for block in resolution.secrets)
    # Variables that shells make, and that the algorithm would not have without one.
    start = f'_oasis_find "$1"; {hidden}unset PWD OLDPWD SHLVL; exec "$@"'
    parts = [_HEAD.strip(), *_lists(resolution, "taskStarts", 'if [ -z "$_oasis_late$_oasis_stop" ]; then')]
    parts += ["_oasis_failed=$_oasis_late _oasis_late="]
    if not has_end_callbacks(resolution):
        parts += ['[ -z "$_oasis_failed" ] || exit "$_oasis_failed"', '[ -z "$_oasis_stop" ] || exit 143', start]
        return "\n".join(parts) + "\n"
    hold = f"The container stays meanwhile, {linger_seconds:g} s at most. To look inside: {look_inside}"
    parts += [
        'if [ -n "$_oasis_failed$_oasis_stop" ]; then _oasis_result=${_oasis_failed:-143}; else',
        f"( {start} ) &",
        "_oasis_wait $!",
        "_oasis_result=$_oasis_code",
        "fi",
        f'echo "$_oasis_result" >{FOLDER}/{ALGORITHM}',
        *_lists(resolution, "taskSucceeds", 'if [ "$_oasis_result" = 0 ]; then'),
        *_lists(resolution, "taskFails", 'if [ "$_oasis_result" != 0 ]; then', say=hold),
        *_lists(resolution, "taskEnds", "if :; then"),
        '[ "$_oasis_result" != 0 ] || _oasis_result=${_oasis_late:-0}',
        'exit "$_oasis_result"',
    ]
    return "\n".join(parts) + "\n"


def _lists(resolution: Resolution, event: str, condition: str, say: str = "") -> Iterator[str]:
    numbered = [(n, step, c.commands) for n, (step, c) in enumerate(resolution.callbacks) if c.event == event]
    for number, step, commands in numbered if event == "taskStarts" else reversed(numbered):
        label = f"{event} of {step.item.name}"
        yield condition
        if say:
            yield f'echo "oasis-flows: {_in_double(label)} begins. {say}" >&2'
        yield from _list(number, step, commands, label, shared=event == "taskStarts" and step.item.shares_environment)
        yield "fi"


def _list(number: int, step: Step, commands: Sequence[str], label: str, *, shared: bool) -> Iterator[str]:
    policy, outcome = ("ignore", ", which is ignored") if step.item.ignores_failure else ("fail", "")
    yield f": >{FOLDER}/{number}.began"
    # Not `( … ) || …`: there the shell would not leave at the first failure.
    yield "(\nset --; set -e"
    for position, command in enumerate(commands, 1):
        yield f"echo {position} >{FOLDER}/{number}.at\neval {shlex.quote(command)}"
    if shared:
        yield _SHARE
    yield ") &\n_oasis_wait $!"
    yield f"_oasis_note {number} {policy} {shlex.quote(label)} {shlex.quote(outcome)}"
    if shared:
        yield _SHARED


def _in_double(text: str) -> str:
    return "".join(f"\\{c}" if c in '"$`\\' else c for c in text)
