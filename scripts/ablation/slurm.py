"""A study as a SLURM array: one task per run that is not finished."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from scripts.ablation.execute import unfinished
from scripts.ablation.study import Study
from utils.errors import ConfigError
from utils.files import atomic_path
from utils.runtime import ROOT

SCRIPT = "array.sbatch"
GRACE_SECONDS = 120


def job_script(study: Study, arguments: Sequence[str], options: Sequence[str]) -> str:
    """The file that sbatch takes.

    Two minutes before its time is over, a task gets SIGTERM, and training saves its state: submitted again, it goes on.

    Args:
        study: what is run.
        arguments: of ablate.sh, that describe the study.
        options: of sbatch, from the user; without --gres, --gpus... or -G, each task asks for one GPU.
    """
    asks_for_gpus = any(re.match(r"--gres|--gpus|-G", option) for option in options)
    directives = [
        f"--job-name=ablate-{study.folder.name}",
        f"--array={','.join(map(str, unfinished(study.runs)))}",
        "--ntasks=1",
        f"--signal=TERM@{GRACE_SECONDS}",
        f"--output={study.folder}/slurm-%A_%a.log",
        *([] if asks_for_gpus else ["--gres=gpu:1"]),
        *options,
    ]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {directive}" for directive in directives),
            f"cd {shlex.quote(str(ROOT))}",
            f'exec srun bash scripts/ablate.sh {shlex.join(arguments)} --only "$SLURM_ARRAY_TASK_ID"',
            "",
        ]
    )


def submit(study: Study, arguments: Sequence[str], options: Sequence[str]) -> str:
    """Write the array's file into the study's folder, and submit it.

    Returns:
        A sentence with the job's number.

    Raises:
        ConfigError: there is no sbatch, or it refuses.
    """
    if not unfinished(study.runs):
        return "all runs are finished: nothing is submitted"
    path = study.folder / SCRIPT
    with atomic_path(path) as part:
        part.write_text(job_script(study, arguments, options))
    if shutil.which("sbatch") is None:
        raise ConfigError(f"--slurm: there is no sbatch on the PATH; submit {path} where there is one.")
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"--slurm: sbatch refused {path}: {done.stderr.strip() or f'status {done.returncode}'}")
    job = done.stdout.strip().split(";")[0]
    return f"submitted {path} as job {job}, {len(unfinished(study.runs))} tasks"
