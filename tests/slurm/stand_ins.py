"""Programs that stand in for Apptainer and for srun with pyxis: they check what they are given, note it, and run the
command outside any container."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

# Like `apptainer exec`: options, an image, a command. It refuses to start inside itself, as there is no Apptainer in an
# image, and what it starts sees nothing of the host's PATH but the system's folders.
APPTAINER = """#!{python}
import json, os, sys
options, words = [], sys.argv[1:]
assert words.pop(0) == "exec", sys.argv
while words[0].startswith("--"):
    options.append(words.pop(0))
    if options[-1] == "--bind":
        options.append(words.pop(0))
image = words.pop(0)
assert "INSIDE" not in os.environ, "apptainer inside apptainer"
assert os.path.exists(image), image
with open({record!r}, "a") as file:
    file.write(json.dumps({{"options": options, "command": words, "node": os.environ["SLURMD_NODENAME"]}}) + "\\n")
os.execvpe(words[0], words, {{**os.environ, "INSIDE": image, "PATH": "/usr/bin:/bin"}})
"""

# Like srun with the plugin pyxis: takes the container's options away, which Slurm without the plugin refuses.
SRUN = """#!{python}
import json, os, sys
ours = [word for word in sys.argv[1:] if word.startswith("--container-")]
with open({record!r}, "a") as file:
    file.write(json.dumps(ours) + "\\n")
rest = [word for word in sys.argv[1:] if word not in ours]
os.execv({srun!r}, [{srun!r}, *rest])
"""


class StandIn:
    """A program in `folder`, and what it has noted."""

    def __init__(self, folder: Path, name: str, text: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._record = folder / name, folder / f"{name}.jsonl"
        self.path.write_text(text.format(python=sys.executable, record=str(self._record), srun=shutil.which("srun")))
        self.path.chmod(0o755)

    def noted(self) -> list:
        return [json.loads(line) for line in self._record.read_text().splitlines()]
