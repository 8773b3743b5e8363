"""Puts the sample traces and the agents' settings, which live at the top of the repository, into the wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
DATA = {  # folder in kv_gym/_data -> files
    "agents": ("agents", "*.yml"),
    "page_agents": ("agents/pages", "*.yml"),
    "requests": ("traces/requests", "*"),
    "traces": ("traces/sample", "**/*"),
}


class BuildWithData(build_py):
    """The ordinary build, and the files that `kv_gym.files` looks for."""

    def run(self) -> None:
        """Build; an editable install reads the data where it lies."""
        super().run()
        if self.editable_mode:
            return
        for name, (folder, pattern) in DATA.items():
            for file in sorted(ROOT.joinpath(folder).glob(pattern)):
                if file.is_file():
                    target = Path(self.build_lib, "kv_gym", "_data", name, file.relative_to(ROOT / folder))
                    self.mkpath(str(target.parent))
                    self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithData})
