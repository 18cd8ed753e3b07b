"""Start tasks as srun does: `fake_srun.py NUM_TASKS SCRIPT ARGS...`.

As there: USR1 is passed on to the tasks, TERM kills them at once, and INT prints where they are.
"""

import os
import signal
import subprocess
import sys


def main() -> None:
    num_tasks, script, *arguments = sys.argv[1:]
    tasks = []
    for number in range(int(num_tasks)):
        environ = {**os.environ, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_NTASKS": num_tasks}
        tasks.append(subprocess.Popen([sys.executable, script, *arguments], env=environ))

    def pass_on(number: int) -> None:
        for task in tasks:
            task.send_signal(number)

    signal.signal(signal.SIGUSR1, lambda *_: pass_on(signal.SIGUSR1))
    signal.signal(signal.SIGTERM, lambda *_: pass_on(signal.SIGKILL))
    signal.signal(signal.SIGINT, lambda *_: sys.stderr.write("interrupt (one more within 1 sec to abort)\n"))
    statuses = [task.wait() for task in tasks]
    sys.exit(max(status if status >= 0 else 128 - status for status in statuses))


main()
