"""Fault injection: I/O errors at every call of every verb, and power cuts at every write.

    python -m tests.faults errors [VERB ...]     make the n-th call on files fail, for every n
    python -m tests.faults power [VERB ...]      replay every prefix of a command's writes

A library in C (`preload.c`, loaded by LD_PRELOAD) fails or records the calls of libc, which also
covers the C++ code of Orbax. Requires Linux and a C compiler.
"""
