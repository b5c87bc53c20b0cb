"""The Triton kernels, installed as ``softprompt_fast.kernels``; nothing is imported here."""
