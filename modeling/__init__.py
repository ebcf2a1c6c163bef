"""Experts, pools, the head that holds the expert tokens, the meta LLM and the decision.

This package imports no other package of the project. It re-exports nothing: importing a name from the module that
defines it keeps torch out of modules that do not need it.
"""
