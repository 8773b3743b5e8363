"""What one installs: light to import, one version, and a wheel that is whole without the repository."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import kv_gym
from kv_gym.errors import UserError
from kv_gym.files import bundled

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "kv_gym" / "reference" / "model"
SAMPLE = ROOT / "traces" / "sample"


def run(command, cwd, **more):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def loaded_by(statement):
    """Names of the modules that are loaded after a statement in a fresh process."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    return set(json.loads(run([sys.executable, "-c", code], ROOT)))


# -- import ------------------------------------------------------------------------------------------------------


def test_importing_registers_the_environment_and_loads_nothing_heavy():
    modules = loaded_by("import kv_gym, gymnasium; assert 'KVEvict-v0' in gymnasium.registry")
    assert "kv_gym" in modules
    assert not modules & {"torch", "transformers", "h5py", "stable_baselines3", "matplotlib", "typer", "tensorboard"}


def test_every_public_name_is_there():
    for name in kv_gym.__all__:
        assert getattr(kv_gym, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'evolve'"):
        kv_gym.evolve  # noqa: B018


def test_the_package_is_a_command_too():
    done = subprocess.run([sys.executable, "-m", "kv_gym", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"kv-gym {kv_gym.__version__}\n")


def test_the_version_stands_in_one_place():
    written = [path for path in ("setup.cfg", "setup.py", "pyproject.toml", "CITATION.cff") if (ROOT / path).exists()]
    assert not [path for path in written if kv_gym.__version__ in _without_requirements((ROOT / path).read_text())]
    assert f'__version__ = "{kv_gym.__version__}"' in (ROOT / "kv_gym" / "__init__.py").read_text()


def _without_requirements(text):
    return "\n".join(line for line in text.splitlines() if ">=" not in line and "cff-version" not in line)


def test_constraints_pin_everything_that_is_required():
    pinned = [line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    lines = (ROOT / "setup.cfg").read_text().split("install_requires =")[1].split("[options.packages.find]")[0]
    required = [line.split(">=")[0].strip().lower() for line in lines.splitlines() if line.strip()]
    assert len(required) >= 10
    assert not {name.replace("-", "_") for name in required} - {name.replace("-", "_") for name in pinned}


# -- bundled data ------------------------------------------------------------------------------------------------


def test_what_is_required_is_in_the_list_of_what_the_core_installs():
    """And docs/deploy.md gives that list's figures."""
    found = json.loads((ROOT / "benchmarks" / "results" / "install_size.json").read_text())
    lines = (ROOT / "setup.cfg").read_text().split("install_requires =")[1].split("[options.packages.find]")[0]
    wanted = {line.split(">=")[0].strip().lower().replace("_", "-") for line in lines.splitlines() if line.strip()}
    names = {name.lower().replace("_", "-") for name in found["distributions"]}
    assert wanted - names == set(), "python benchmarks/install_size.py --json benchmarks/results/install_size.json"
    seconds, page = found["import_seconds"], (ROOT / "docs" / "deploy.md").read_text()
    assert f"{len(names)} distributions, {found['megabytes']:,.0f} MB" in page
    assert f"{seconds['least']:.2f} to {seconds['median']:.2f} seconds" in page and seconds["median"] < 0.5


def test_a_checkout_reads_its_own_top_level_folders():
    assert bundled("agents") == ROOT / "agents"
    assert sorted(path.suffix for path in bundled("agents").glob("*.yml"))


def test_missing_data_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("kv_gym.files._PACKAGE", tmp_path / "kv_gym")
    with pytest.raises(UserError, match=r"the bundled traces are missing \(.*_data.*traces\)"):
        bundled("traces")


def test_other_peoples_folders_beside_an_installed_package_are_not_taken(monkeypatch, tmp_path):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "smith.yml").touch()
    monkeypatch.setattr("kv_gym.files._PACKAGE", tmp_path / "kv_gym")
    with pytest.raises(UserError, match="the bundled agents are missing"):
        bundled("agents")


def test_unknown_data_is_a_programming_error():
    with pytest.raises(KeyError):
        bundled("weights")


# -- the wheel ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution of a copy of the repository."""
    work = tmp_path_factory.mktemp("build")
    unwanted = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    copytree(ROOT, work / "source", ignore=ignore_patterns(*unwanted))
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist"), "source"], work)
    return next((work / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs Python code in an empty folder, in an environment that holds the wheel and sees only the dependencies."""
    work = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", "env"], work)
    python = work / "env" / "bin" / "python"
    site = next((work / "env" / "lib").glob("python*/site-packages"))
    # a folder named in a .pth file is searched, and the .pth files in it (our editable install) are not read
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(folders)) + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], work)
    empty = work / "empty"
    empty.mkdir()

    def execute(code):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        ending = (
            "\nimport sys\n"
            "files = [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'kv_gym' and m.__file__]\n"
            f"assert files and all(f.startswith({str(site)!r}) for f in files), files\n"
        )
        return run([str(python), "-c", code + ending], empty, env=environment)

    return execute


@pytest.mark.slow
def test_the_wheel_holds_all_code_and_data_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "kv_gym").rglob("*.py")}
    data = {"kv_gym/py.typed"}
    data |= {str(path.relative_to(ROOT)) for path in [*MODEL.parent.glob("*.json"), *MODEL.glob("*")]}
    data |= {str(path.relative_to(ROOT)) for path in (ROOT / "kv_gym" / "evaluation" / "report" / "web").glob("*.*")}
    texts = ROOT / "kv_gym" / "evaluation" / "tasks" / "texts"
    data |= {str(path.relative_to(ROOT)) for path in texts.iterdir()}
    data |= {f"kv_gym/_data/agents/{path.name}" for path in (ROOT / "agents").glob("*.yml")}
    data |= {f"kv_gym/_data/page_agents/{path.name}" for path in (ROOT / "agents" / "pages").glob("*.yml")}
    data |= {f"kv_gym/_data/traces/{path.relative_to(SAMPLE)}" for path in SAMPLE.rglob("*") if path.is_file()}
    data |= {f"kv_gym/_data/requests/{path.name}" for path in (ROOT / "traces" / "requests").iterdir()}
    ours = {name for name in names if ".dist-info/" not in name}
    assert ours == code | data


@pytest.mark.slow
def test_the_wheel_names_its_version_and_command(wheel):
    archive = zipfile.ZipFile(wheel)
    read = lambda name: archive.read(f"kv_gym-{kv_gym.__version__}.dist-info/{name}").decode()  # noqa: E731
    assert f"Version: {kv_gym.__version__}\n" in read("METADATA")
    assert "kv-gym = kv_gym.cli:main" in read("entry_points.txt")


@pytest.mark.slow
def test_the_installed_package_makes_policies(installed):
    printed = installed("import kv_gym; print(kv_gym.list_policies(), kv_gym.make_policy('snapkv').window)")
    assert printed.strip() == f"{kv_gym.list_policies()} 32"


@pytest.mark.slow
def test_the_installed_package_finds_its_agents(installed):
    printed = installed("from kv_gym.files import bundled; print(sorted(p.name for p in bundled('agents').iterdir()))")
    assert printed.strip() == str(sorted(path.name for path in (ROOT / "agents").glob("*.yml")))


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no trace sample in traces/sample")
def test_the_installed_environment_replays_the_bundled_sample(installed):
    printed = installed(
        "import gymnasium, kv_gym\n"
        "env = gymnasium.make('KVEvict-v0')\n"
        "observation, info = env.reset(seed=0)\n"
        "observation, reward, *rest = env.step(env.action_space.sample())\n"
        "print(0 <= reward <= 1)"
    )
    assert printed.strip() == "True"


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="no reference model in kv_gym/reference/model")
def test_the_installed_reference_model_loads_offline(installed):
    printed = installed(
        "import kv_gym.reference, pathlib\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "folder = pathlib.Path(kv_gym.reference.__file__).parent / 'model'\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)\n"
        "tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)\n"
        "print(model.config.vocab_size == len(tokens))"
    )
    assert printed.strip() == "True"
