"""One file for each command of ``softprompt-fast``; its ``COMMAND`` says what it takes and does."""
