"""The READMEs: scripts that run when pasted, commands and flags that exist, links that lead somewhere."""

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.forked import python

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "REPRODUCTION.md", *sorted(ROOT.glob("[a-z]*/README.md"))]
READMES += [*sorted(ROOT.glob("evograd/*/README.md")), *sorted(ROOT.glob("resources/*/README.md"))]
READMES += sorted(ROOT.glob("resources/*.md"))  # tables that are results
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"<!-- table:[\w-]+ -->.*?<!-- /table -->", re.DOTALL)
EXPERIMENTS = ("rotation", "label_noise_mwn", "cross_domain_fewshot", "metaxl")
NOT_RUN = 0  # blocks marked ```python no-run: those that need several processes or CUDA


def name(readme):
    return str(readme.relative_to(ROOT))


def text(readme):
    return readme.read_text(encoding="utf-8")


def blocks():
    """(README, number of the line of its fence, info string, code) of every block of Python."""
    for readme in READMES:
        for block in FENCE.finditer(text(readme)):
            if block["info"].startswith("python"):
                yield readme, text(readme)[: block.start()].count("\n") + 1, block["info"], block["body"]


BLOCKS = [pytest.param(code, id=f"{name(readme)}:{line}") for readme, line, info, code in blocks() if info == "python"]


@cache
def run(code):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run([python(), "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_all_readmes_are_looked_at():
    names = {name(readme) for readme in READMES}
    folders = ("illustration_1d", *EXPERIMENTS, "evograd", "evograd/lab", "resources/examples")
    assert {"README.md", *(f"{folder}/README.md" for folder in folders)} <= names


# --- Python


@pytest.mark.parametrize("code", BLOCKS)
def test_a_block_of_python_runs_as_it_stands(code):
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_few_blocks_are_not_run():
    infos = [info for *_, info, _ in blocks()]
    assert len(BLOCKS) >= 3
    assert set(infos) <= {"python", "python no-run"}
    assert infos.count("python no-run") == NOT_RUN


def test_the_first_script_learns_which_labels_are_wrong():
    """Its heart is five lines."""
    _, _, _, code = next(blocks())
    heart = code.split("# The five lines.\n")[1].split("\n\n")[0].splitlines()
    assert len(heart) == 5
    assert "trajectory.step(" in heart[0]
    (right, wrong), (right_then, wrong_then) = [
        map(float, re.findall(r"[01]\.\d\d", line)) for line in run(code).stdout.splitlines()
    ]
    assert right == wrong == 0.5
    assert right_then > 0.7 and wrong_then < 0.3


# --- commands


def shell_text(readme):
    """Its lines, without Python and generated tables; lines that end with a backslash joined, and $A as A="…" says."""
    plain = FENCE.sub(lambda block: "" if block["info"].startswith("python") else block["body"], TABLE.sub("", text(readme)))
    plain = re.sub(r" *\\\n *", " ", plain)
    for variable, value in re.findall(r"^    ([A-Z])=\"([^\"]*)\"$", plain, re.MULTILINE):
        plain = plain.replace(f"${variable} ", f"{value} ").replace(f"${variable}\n", f"{value}\n")
    return plain


def commands():
    """(README, words) of every `python -m X …`, `bash X …` and `./X …`, in code spans and in indented lines."""
    for readme in READMES:
        found = []
        for line in shell_text(readme).splitlines():
            if line.startswith("    "):
                found.append(re.split(r"\s{2,}| #|   |[|;>]", line.strip())[0])
            else:
                found += re.findall(r"`([^`]+)`", line)
        for command in found:
            with contextlib.suppress(ValueError):  # a span that is no shell
                words = shlex.split(command)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
                    words.pop(0)
                ours = words and ("-m" in words if re.fullmatch(r"(\S*/)?python3?|torchrun", words[0]) else words[0] == "bash")
                if ours or words and re.fullmatch(r"\./\w+\.sh", words[0]):
                    yield readme, command, words


def target(words):
    """(what runs, its arguments): a module of ours, or a script."""
    if "-m" in words:
        i = words.index("-m")
        return words[i + 1], words[i + 2 :]
    return (words[1], words[2:]) if words[0] == "bash" else (words[0], words[1:])


@cache
def help_of(module):
    """What `python -m module --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(["--help"])
    assert end.value.code == 0
    return printed.getvalue()


def knows(module, flag):
    return re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", help_of(module)) is not None


def readers(script):
    """The modules that further arguments of a shell script go to."""
    if script == "resources/quality.sh":
        return [f"{experiment}.train" for experiment in EXPERIMENTS]
    if script == "resources/examples/run.sh":
        return [f"resources.examples.{example}" for example in ("data_mixture", "loss_weights", "augmentation")]
    experiment = Path(script).parent.name
    return [f"{experiment}.train"] if script.endswith("/run.sh") else []


COMMANDS = [(name(readme), command, words) for readme, command, words in commands()]


def test_commands_name_modules_scripts_and_flags_that_exist():
    assert len(COMMANDS) > 50
    for where, command, words in COMMANDS:
        what, arguments = target(words)
        if what.startswith("<experiment>."):
            modules = [what.replace("<experiment>", experiment) for experiment in EXPERIMENTS]
        elif "/" in what:
            assert (ROOT / what).is_file(), (where, command)
            modules = readers(what)
        else:
            assert importlib.util.find_spec(what), (where, command)
            modules = [what]
        further = [f"{e}.train" for e in EXPERIMENTS] if what == "resources.displacement" else []  # it passes flags on to them
        for flag in re.findall(r"--[a-z][\w-]*", " ".join(arguments)):
            own = "/" in what and flag in (ROOT / what).read_text(encoding="utf-8")
            own = own or any(knows(module, flag) for module in further)
            assert own or (modules and all(knows(module, flag) for module in modules)), (where, command, flag)


def test_variables_before_a_script_are_read_by_it():
    shared = (ROOT / "resources/run_commands.sh").read_text(encoding="utf-8")
    n = 0
    for readme in READMES:
        for before, script in re.findall(r"((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) +)+)bash (\S+\.sh)", shell_text(readme)):
            source = (ROOT / script).read_text(encoding="utf-8") + shared
            for variable in re.findall(r"([A-Z_]+)=", before):
                assert f"{variable}=${{{variable}" in source, (name(readme), script, variable)
                n += 1
            for value in re.findall(r"PRETRAIN=\"([^\"]*)\"", before):
                assert all(knows("cross_domain_fewshot.pretrain", flag) for flag in re.findall(r"--[\w-]+", value)), value
    assert n > 10


def test_flags_that_stand_alone_are_somebodys():
    modules = [f"{experiment}.{script}" for experiment in EXPERIMENTS for script in ("train", "compare")]
    modules += readers("resources/examples/run.sh")
    modules += ["cross_domain_fewshot.scale", "cross_domain_fewshot.pretrain", "evograd.lab.report", "evograd.lab.figures"]
    scripts = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.sh"), *ROOT.glob("*/*.sh")])
    for readme in READMES:
        for flag in re.findall(r"`(--[a-z][\w-]*)", shell_text(readme)):
            assert flag in scripts or any(knows(module, flag) for module in modules), (name(readme), flag)


# --- links, lines, the tree of files


def anchors(readme):
    """The names by which GitHub links to headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text(readme)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_links_and_images_lead_somewhere(readme):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text(readme)))
    for link in [link for link in links if not link.startswith(("http://", "https://"))]:
        path, _, anchor = link.partition("#")
        there = readme.parent / path
        assert there.exists(), link
        if anchor:
            page = there / "README.md" if there.is_dir() and path else there if path else readme
            assert anchor in anchors(page), link


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_lines_are_short_and_name_no_place_of_one_machine(readme):
    content = text(readme)
    long = [line for line in TABLE.sub("", content).splitlines() if len(line) > 140 and not line.startswith("|")]
    assert not long
    assert not re.findall(r"(?<![\w.])/(?:work|home|root|tmp|mnt|Users)/\S*", content)


def test_the_first_readme_is_short():
    assert len(text(ROOT / "README.md").splitlines()) <= 200


def tree():
    """(path, comment) of every line of README.md's tree of files."""
    section = text(ROOT / "README.md").split("## Where things are\n")[1]
    folders = []
    for line in section.splitlines():
        entry = re.fullmatch(r"    (?P<indent> *)(?P<name>\S+) {2,}(?P<comment>\S.*)", line)
        if entry:
            depth = len(entry["indent"]) // 2
            folders = [*folders[:depth], entry["name"]]
            yield "".join(folders), entry["comment"]


def test_the_tree_names_every_folder_and_no_file_that_is_not_there():
    paths = [path for path, _ in tree()]
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]
    assert all((ROOT / path).is_dir() == path.endswith("/") for path in paths)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: the folders of a user's own cannot be told from ours")
    folders = {line.split("/")[0] + "/" for line in listed.stdout.splitlines() if "/" in line and not line.startswith(".")}
    assert folders <= set(paths)
