"""Fault injection: I/O errors at every call of every verb, power cuts at every write, odd files.

    python -m tests.faults errors [VERB ...]     make the n-th call on files fail, for every n
    python -m tests.faults power [VERB ...]      replay every prefix of a command's writes
    python -m tests.faults files [VERB ...]      put a pipe, a device or a loop in a file's place

A library in C (`preload.c`, loaded by LD_PRELOAD) fails or records the calls of libc, which also
covers the C++ code of Orbax. Requires Linux and a C compiler.
"""
