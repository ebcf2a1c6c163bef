"""Experts and pools, the head that holds their tokens, the meta LLM, the decision. Imports nothing of ours.

Nothing is re-exported here: importing from the module that defines a name keeps torch out of what does not need it.
"""
