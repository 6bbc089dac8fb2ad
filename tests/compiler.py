"""Flags of XLA with which the tests compile in less than half the time. This imports no JAX."""

from importlib.metadata import version

# Workers of pytest use all cores, so that nothing is gained by parallel compilation.
COMPILER_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
# Without MLIR for fusions, compilation takes half the time. Later versions have no other way.
if version("jaxlib").startswith("0.10."):
    COMPILER_FLAGS += " --xla_cpu_use_fusion_emitters=false"
