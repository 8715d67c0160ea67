"""The step, compiled: what is compiled, with which options, and where its results stay."""

from samfn.compiled.plan import missing_compiler, operations
from samfn.compiled.step import CompiledUpdate, compile_update

__all__ = ["CompiledUpdate", "compile_update", "missing_compiler", "operations"]
