"""``python -m softprompt_fast`` is ``softprompt-fast``."""

import sys

from softprompt_fast.cli.main import main

sys.exit(main())
