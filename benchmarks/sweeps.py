"""The λ × β sweep of one seed, with a critic that is soon trained: its wall time over what its stages took,
each counted once, and against separate runs.

The stages' times are those in the manifests of the sweep's own store: what is shared, and what each point has
for itself. All else (imports, composing, waiting, reports) is the sweep's overhead. A separate run is the
first point from an empty store, taken as the cost of each.
"""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from run import Measured

from selfcritique.artifacts import Store

LAMS, BETAS = (0.5, 1, 1.5), (0.1, 0.5, 1, 2)  # of experiment=lambda_beta
WORDS = (
    "experiment=ablation_base",
    "critic.train.epochs=1",  # no less is shared by a worse critic
    "critic.ask={mode:logit,samples:1,temperature:0.0}",
    "critic.gate.on_fail=warn",
    "rft.select={threshold:1,by:random}",
    "pairs.build={threshold:5.5,by:random}",
)


def seconds(folder: Path, *words: str) -> float:
    """Of the whole command in an empty folder."""
    folder.mkdir()
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "selfcritique", *words, *WORDS], cwd=folder, check=True)
    return time.perf_counter() - start


def measure() -> Measured:
    with TemporaryDirectory() as root:
        grid = [f"dpo.loss.{k}={','.join(map(str, v))}" for k, v in (("lam", LAMS), ("beta", BETAS))]
        sweep = Path(root) / "sweep"
        took = seconds(sweep, "-m", *grid)
        store = Store(sweep / "store")
        stages = {row["stage"] for row in store.ls()}
        made = [artifact for stage in stages for artifact in store.completed(stage)]
        one = (f"dpo.loss.lam={LAMS[0]}", f"dpo.loss.beta={BETAS[0]}")
        alone = seconds(Path(root) / "alone", *one)
    points = len(LAMS) * len(BETAS)
    about = {
        "points": points,
        "sweep, s": round(took, 1),
        "separate runs over the sweep": round(points * alone / took, 2),
    }
    ratio = took / sum(artifact.wall_s for artifact in made)
    return Measured(ratio, ratio, ratio, "times the stages' own time", "each distinct stage once", about)
