"""How verbs are found, and what each way of failing prints and returns."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import octavo
from octavo.cli.main import VERBS, Verb, app, build, load

RUNNER = CliRunner()

# A verb of the test's own, that fails as it is told.
FAILING = '''
import errno
from octavo.errors import ConfigError

def probe(how: str, as_json: bool = typer.Option(False, "--json")) -> None:
    """Fail."""
    if how == "user":
        raise ConfigError("the key `lr` is not a number.")
    if how == "disk":
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "data.jsonl")
    if how == "bug":
        raise ZeroDivisionError("ours")
    if how == "extra":
        raise ModuleNotFoundError("No module named 'trl'", name="trl")
    if how == "broken":
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
    if how == "interrupt":
        raise KeyboardInterrupt
'''


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """``call(*args)`` runs ``octavo probe ARGS``."""
    (tmp_path / "octavo_probe.py").write_text("import typer\n" + FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "octavo_probe", raising=False)
    monkeypatch.setitem(VERBS, "probe", Verb("octavo_probe", "Fail."))
    application = build()
    return lambda *args: RUNNER.invoke(application, ["probe", *args])


def test_version():
    assert RUNNER.invoke(app, ["--version"]).output == f"octavo {octavo.__version__}\n"


def test_overview_lists_every_verb_with_its_line():
    output = " ".join(re.sub(r"[│\s]+", " ", RUNNER.invoke(app, ["--help"], terminal_width=200).output).split())
    for name, verb in VERBS.items():
        assert f"{name} {verb.help}" in output


@pytest.mark.parametrize("name", VERBS)
def test_each_verb_has_a_file_of_its_own_and_help(name):
    assert VERBS[name].module == f"octavo.cli.{name}"
    command = load(name)
    assert command.name == name
    # A verb of several commands has its options on each of them.
    for call in [[name, inner] for inner in getattr(command, "commands", {})] or [[name]]:
        result = RUNNER.invoke(app, [*call, "--help"])
        assert result.exit_code == 0, call
        assert "--json" in result.output, call
    assert RUNNER.invoke(app, [name, "--help"]).exit_code == 0


@pytest.mark.parametrize("args", [[], ["inspekt"], ["inspect"], ["inspect", "--no-such-option", "x"], ["--nothing"]])
def test_wrong_call_is_2(args):
    assert RUNNER.invoke(app, args).exit_code == 2


def test_wrong_verb_is_named_with_a_suggestion():
    result = RUNNER.invoke(app, ["inspekt"])
    assert "inspekt" in result.stderr
    assert "Did you mean 'inspect'" in result.stderr


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("user", "the key `lr` is not a number."),
        ("disk", "[Errno 2] No such file or directory: 'data.jsonl'"),
        ("extra", "this needs trl, which is not installed. Run: pip install 'octavo[train]'"),
    ],
)
def test_users_error_is_one_line_and_1(probe, how, message):
    person, program = probe(how), probe(how, "--json")
    assert (person.exit_code, person.stdout, person.stderr) == (1, "", f"error: {message}\n")
    assert (program.exit_code, program.stderr) == (1, "")
    assert json.loads(program.stdout) == {"error": message}


@pytest.mark.parametrize(("how", "kind"), [("bug", ZeroDivisionError), ("broken", ModuleNotFoundError)])
def test_our_bug_keeps_its_traceback(probe, how, kind):
    assert isinstance(probe(how).exception, kind)


def test_interrupt_is_130(probe):
    result = probe("interrupt")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_verb_that_succeeds_is_0(probe):
    result = probe("nothing")
    assert (result.exit_code, result.output) == (0, "")


def test_real_verb_refuses_what_is_no_checkpoint(tmp_path):
    result = RUNNER.invoke(app, ["inspect", str(tmp_path), "--json"])
    assert result.exit_code == 1
    assert str(tmp_path.name) in json.loads(result.stdout)["error"]


def test_python_m_octavo_and_the_reader_that_leaves_the_pipe():
    """A process as a user starts it; ``head`` reads one line and goes."""
    run = subprocess.run(
        f"{sys.executable} -m octavo --help | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in run.stderr


def test_ctrl_c_in_a_process(tmp_path):
    """The signal itself, not the exception: exit code 130, no traceback."""
    (tmp_path / "slow_verb.py").write_text(
        "import time\ndef slow() -> None:\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    # a process that is started in the background, as CI may start this one, ignores ctrl-C until told otherwise
    script = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import octavo.cli.main as m\nm.VERBS['slow'] = m.Verb('slow_verb', 'Sleep.')\nm.build()(['slow'])"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(octavo.__file__).parent.parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever started the tests in the background had them ignore the signal, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (130, "interrupted\n")
