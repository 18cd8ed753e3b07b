"""Start ranks as DeepSpeed's launcher does, without importing it: `fake_launcher.py NUM_RANKS MODULE ARGS...`.

As there: a rank that ends with another status than 0 gets the others terminated, and its status returned; a terminated
launcher terminates its ranks and returns 1.
"""

import os
import signal
import subprocess
import sys
import time


def main() -> None:
    num_ranks, script, *arguments = sys.argv[1:]
    ranks = []
    for number in range(int(num_ranks)):
        environ = {**os.environ, "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": num_ranks}
        ranks.append(subprocess.Popen([sys.executable, script, *arguments], env=environ))

    def end(status: int) -> None:
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            try:
                rank.wait(5)
            except subprocess.TimeoutExpired:
                rank.kill()
        sys.exit(status)

    signal.signal(signal.SIGTERM, lambda *_: end(1))
    while any(rank.poll() is None for rank in ranks):
        failed = next((rank.returncode for rank in ranks if rank.poll() not in (None, 0)), None)
        if failed is not None:
            end(failed if failed > 0 else 1)
        time.sleep(0.02)


main()
