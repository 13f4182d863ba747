"""The commands that need no GPU: `memlab predict | solve | plan`.

Their exit status says the answer: 0 it fits, 3 it does not, 2 what was given cannot be used. It is
1 where the script itself fails, with the traceback that Python would have shown.
"""

from .arguments import COMMANDS, add_commands
from .run import run_command

__all__ = ["COMMANDS", "add_commands", "run_command"]
