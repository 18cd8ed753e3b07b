"""Whether a host can be reached by TCP from others: `python -m lmscale.launcher.reach listen` and `... connect HOST PORT`.

The listener prints its port, and goes on until standard input ends. No torch.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

_CONNECT_S = 5.0


def main(arguments: Sequence[str]) -> int:
    """Listen, or connect and say in one line why that fails."""
    if arguments[0] == "listen":
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        # Connections wait in its backlog: whoever is in there has come through.
        with socket.create_server(
            ("", 0), family=family, backlog=1024, dualstack_ipv6=family is socket.AF_INET6
        ) as listener:
            sys.stdout.write(f"{listener.getsockname()[1]}\n")
            sys.stdout.flush()
            sys.stdin.read()
        return 0
    _, host, port = arguments
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
