"""Interpreters that have imported torch and nothing else, all forked from one.

The import of torch takes longer than what tests ask of a new interpreter.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKING = """
import torch
def serve():
    import json, os, sys, traceback
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.dup2(write, 1)
            os.dup2(write, 2)
            code = 1
            try:
                exec(json.loads(line), {"__name__": "__main__"})
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(write)
        with open(read) as pipe:
            text = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, text]), flush=True)
serve()
"""


def printed(code: str) -> str:
    """What code prints in an interpreter of its own that has imported torch."""
    parent = _parent()
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(json.dumps(code) + "\n")
    parent.stdin.flush()
    status, text = json.loads(parent.stdout.readline())
    assert status == 0, text
    return str(text)


@cache
def _parent() -> subprocess.Popen[str]:
    """The interpreter that imports torch, and is forked for each code."""
    pipe, command = subprocess.PIPE, [sys.executable, "-c", FORKING]
    parent = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
    atexit.register(parent.communicate)
    return parent
